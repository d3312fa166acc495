"""List the images of a data set that keeps one folder per class, and tell what else lies there.

A file is an image by the suffix of its name, since no file is opened here. Whatever is left out is counted and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cafo.errors import DatasetError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpf", ".jpx"),
        *(".png", ".apng", ".gif", ".webp", ".avif", ".avifs", ".tif", ".tiff"),
        *(".bmp", ".dib", ".ico", ".tga", ".pcx", ".qoi", ".ppm", ".pgm", ".pbm", ".pnm"),
    }
)
"""Suffixes of raster images that Pillow reads. Where Pillow was built without a format, its images are unreadable."""

_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})
_SHOWN = 5


class Listing(NamedTuple):
    """The images of class folders, and what was ignored."""

    images: dict[str, list[str]]
    """folder → file names of its images, sorted"""
    notices: tuple[str, ...]
    """one sentence for each kind of entry that was ignored"""


def list_class_folders(root: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the class folders of `root`, sorted, and notices about what else lies there.

    Hidden folders and those that an operating system adds are no classes.

    Raises:
        DatasetError: there is none, or a name is not UTF-8.
    """
    names, ignored, images = [], [], []
    for entry in root.iterdir():
        if not entry.is_dir():
            if is_image_name(entry.name):
                images.append(entry.name)
        elif entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
            ignored.append(entry.name)
        else:
            names.append(entry.name)
    if not names:
        raise DatasetError(f"{root} has no class folders; give the folder that holds one folder per class")
    if wrong := [name for name in names if not is_utf8(name)]:
        raise DatasetError(f"{root}: the name of the class folder {readable(wrong[0])} is not UTF-8; rename the folder")
    notices = [
        _notice(images, "image beside the class folders", "images beside the class folders", "no class is theirs"),
        _notice(ignored, "hidden or system folder", "hidden or system folders", ""),
    ]
    return tuple(sorted(names)), tuple(notice for notice in notices if notice)


def list_images(root: Path, folders: Iterable[str]) -> Listing:
    """List the images that lie directly in the given folders below `root`. A missing folder has no images."""
    images: dict[str, list[str]] = {}
    hidden: list[str] = []
    nested: list[str] = []
    other: list[str] = []
    misnamed: list[str] = []
    for folder in folders:
        images[folder] = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in (root / folder).iterdir():
                path = f"{folder}/{entry.name}"
                if entry.name.startswith("."):
                    hidden.append(path)
                elif not is_image_name(entry.name):
                    (nested if entry.is_dir() else other).append(path)
                elif not is_utf8(entry.name):
                    misnamed.append(path)
                else:
                    images[folder].append(entry.name)
        images[folder].sort()
    suffixes = Counter(Path(path).suffix.lower() or "none" for path in sorted(other)).most_common(_SHOWN)
    kinds = ", ".join(f"{suffix}: {count}" for suffix, count in suffixes)
    notices = [
        _notice(other, "file without an image's suffix", "files without an image's suffix", kinds),
        _notice(nested, "folder in a class folder", "folders in class folders", "images lie directly in their class's"),
        _notice(misnamed, "image whose name is not UTF-8", "images whose names are not UTF-8", "rename them"),
        _notice(hidden, "hidden file", "hidden files", ""),
    ]
    return Listing(images, tuple(notice for notice in notices if notice))


def refuse_empty_classes(root: Path, listing: Listing) -> None:
    """Raise DatasetError, which names the class folders without an image and what lies there instead."""
    empty = [folder for folder, files in listing.images.items() if not files]
    if not empty:
        return
    found = []
    for folder in empty[:_SHOWN]:
        entries = sorted(entry.name for entry in (root / folder).iterdir() if not entry.name.startswith("."))
        found.append(f"{folder} (holds {', '.join(readable(name) for name in entries[:3]) or 'nothing'})")
    raise DatasetError(
        f"{root}: {len(empty)} of {len(listing.images)} class folders have no image: "
        f"{', '.join(found)}{' …' if len(empty) > _SHOWN else ''}; give the folder whose subfolders are the classes, "
        f"with the images directly in them, and remove a folder that is no class. An image ends in one of "
        f"{', '.join(sorted(IMAGE_SUFFIXES))}"
    )


def is_image_name(name: str) -> bool:
    """Return whether a file is taken for an image: it has an image's suffix and is not hidden."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


def is_utf8(text: str) -> bool:
    """Return whether text can be written as UTF-8, which a file name of another encoding cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(name: str) -> str:
    """Return a name with the bytes that are not UTF-8 as escapes, so that it can be printed."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _notice(paths: Sequence[str], one: str, many: str, detail: str) -> str:
    """Return a sentence that counts and names what was ignored; empty if nothing was."""
    if not paths:
        return ""
    shown = ", ".join(readable(path) for path in sorted(paths)[:_SHOWN]) + (" …" if len(paths) > _SHOWN else "")
    what = f"1 {one} was ignored" if len(paths) == 1 else f"{len(paths):,} {many} were ignored"
    return f"{what}{f' ({detail})' if detail else ''}: {shown}"
