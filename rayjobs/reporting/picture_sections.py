"""Sections of pictures that a run keeps for its report: thumbnails, with their captions in `pictures.json`.

A picture shows one image, or two side by side, so that a pair stays a pair on a phone too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cafo.errors import ImageError
from cafo.images import load_image
from rayjobs.errors import DataError
from rayjobs.reporting.html import Fold, Gallery, Section
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import atomic_path, read_json, write_json
from rayjobs.storage.paths import inside, read_bytes

PICTURES = "pictures.json"
SIDE = 160
"""Pixels of a thumbnail's longer side."""


class Picture(NamedTuple):
    """Image files that are shown as one picture, and its caption, which is its alternative text too."""

    files: tuple[Path, ...]
    caption: str


@dataclass(frozen=True, kw_only=True)
class PictureSection:
    """One section of the report."""

    title: str
    pictures: Sequence[Picture]
    note: str = ""
    group: str = ""
    """Sections of one group are folded together, under this title."""


def write_picture_sections(folder: Path, sections: Sequence[PictureSection]) -> None:
    """Write thumbnails into `folder/pictures`, and `pictures.json`; an image that cannot be read is left out."""
    listed = []
    for number, section in enumerate(sections):
        images = []
        for place, picture in enumerate(section.pictures):
            thumbnail = _side_by_side(picture.files)
            if thumbnail is None:
                continue
            name = f"pictures/{number:02d}-{place:02d}.jpg"
            with atomic_path(folder / name) as temporary:
                thumbnail.save(temporary, format="JPEG")
            images.append({"file": name, "caption": picture.caption})
        wide = bool(section.pictures) and all(len(picture.files) > 1 for picture in section.pictures)
        entry = {"title": section.title, "note": section.note, "group": section.group, "wide": wide, "images": images}
        listed.append(entry)
    write_json(folder / PICTURES, listed)


def read_picture_sections(folder: Path) -> Iterator[Gallery | Fold]:
    """Yield the sections that `write_picture_sections` has written, without empty ones; none if there is no file.

    Groups of sections follow, each as one fold.

    Raises DataError for a file that is no such list.
    """
    path = folder / PICTURES
    folds: dict[str, list[Section]] = {}
    listed = read_json(path) if path.is_file() else []
    if not isinstance(listed, list):
        raise DataError(f"{path} is no list of sections of pictures")
    for section in listed:
        try:
            images = [(read_bytes(inside(folder, image["file"])), image["caption"]) for image in section["images"]]
            title, note, wide = section["title"], section["note"], section["wide"]
            group = section.get("group", "")
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is no list of sections of pictures: {error!r}") from error
        if images and group:
            folds.setdefault(group, []).append(Gallery(title, images, note, wide))
        elif images:
            yield Gallery(title, images, note, wide)
    for group, sections in folds.items():
        yield Fold(group, sections)


def _side_by_side(files: Sequence[Path]) -> Image.Image | None:
    """The thumbnails of some images in one row; None if one of them cannot be read."""
    thumbnails = []
    for file in files:
        try:
            thumbnail = load_image(cached_path(file))
        except (ImageError, OSError):  # the file may be gone since it was encoded
            return None
        thumbnail.thumbnail((SIDE, SIDE))
        thumbnails.append(thumbnail)
    if len(thumbnails) == 1:
        return thumbnails[0]
    row = Image.new("RGB", (len(thumbnails) * SIDE, max(t.height for t in thumbnails)), "gray")
    for place, thumbnail in enumerate(thumbnails):
        row.paste(thumbnail, (place * SIDE + (SIDE - thumbnail.width) // 2, (row.height - thumbnail.height) // 2))
    return row
