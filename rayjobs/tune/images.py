"""The images that a sweep has used, by class name, path and content: its record, and images that are there twice."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from rayjobs.errors import DataError
from rayjobs.storage.files import read_parquet, write_parquet

IMAGES = "images.parquet"
_SHOWN = 3


class SweepImage(NamedTuple):
    """An image of a sweep; a row of `images.parquet`."""

    role: str
    """`train`, `generated` or `val`"""
    class_name: str
    path: str
    content: str
    """fingerprint of the file"""


def write_images(folder: Path, images: Sequence[SweepImage]) -> None:
    """Write `images.parquet`."""
    write_parquet(folder / IMAGES, pa.Table.from_pylist([image._asdict() for image in images]))


def read_images(folder: Path) -> list[SweepImage]:
    """Read `images.parquet`; a folder without it has no images.

    Raises:
        DataError: the file is damaged.
    """
    if not (folder / IMAGES).exists():
        return []
    try:
        return [SweepImage(**row) for row in read_parquet(folder / IMAGES).to_pylist()]
    except (DataError, TypeError) as error:
        raise DataError(f"{folder / IMAGES} is no whole list of images ({error}); sweep under another name") from error


def image_changes(before: Iterable[SweepImage], now: Iterable[SweepImage]) -> Iterator[str]:
    """Yield how the images of a sweep differ from earlier ones, with the first names of each kind of difference."""
    old, new = ({(image.role, image.path): image for image in images} for images in (before, now))
    kinds: dict[str, list[str]] = {}
    for (role, path), image in old.items():
        other = new.get((role, path))
        if other is None:
            kinds.setdefault(f"{role} images are no longer there", []).append(path)
        elif other.class_name != image.class_name:
            name = f"{path} ({image.class_name!r}, now {other.class_name!r})"
            kinds.setdefault(f"{role} images have another class", []).append(name)
        elif other.content != image.content:
            kinds.setdefault(f"{role} images have another content", []).append(path)
    for role, path in new:
        if (role, path) not in old:
            kinds.setdefault(f"{role} images are new", []).append(path)
    for kind, paths in kinds.items():
        yield f"{len(paths)} {kind}: {_first(paths)}"


def duplicate_notices(images: Iterable[SweepImage], others: Iterable[SweepImage] = ()) -> Iterator[str]:
    """Yield sentences about images of equal content that have two classes, or that are in two splits.

    Args:
        images: images to compare with one another or, if `others` are given, with those.
        others: images of a sweep that was finished before.
    """
    first = {image.content: image for image in others}
    compare_all = not first
    kinds: dict[str, list[str]] = {}
    for image in images:
        same = first.setdefault(image.content, image) if compare_all else first.get(image.content, image)
        pair = f"{same.path} = {image.path}"
        if same.class_name != image.class_name:
            kinds.setdefault("have the same content and two classes", []).append(pair)
        elif same.role != image.role:
            kinds.setdefault(f"are in {same.role} and in {image.role} by content", []).append(pair)
    for kind, pairs in kinds.items():
        yield f"{len(pairs)} pairs of images {kind}: {_first(pairs)}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
