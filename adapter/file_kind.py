"""Recognise files that hold something else than their name says."""

from pathlib import Path

from adapter.errors import AdapterError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_content(path: Path, error: type[AdapterError], *, gzip: bool = False) -> None:
    """Raise `error`, naming the file, for a Git LFS pointer, an HTML page or a gzip archive where data should be.

    A file that cannot be opened is left to the reader that wanted it. gzip: a gzip archive is right.
    """
    try:
        with path.open("rb") as file:
            head = file.read(200)
    except OSError:
        return
    if head.startswith(_LFS_POINTER):
        raise error(
            f"{path}: a Git LFS pointer instead of the file; run `git lfs pull` in its repository, or download the file"
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise error(f"{path}: an HTML page, perhaps of a login or an error; download the file itself")
    if head.startswith(b"\x1f\x8b") and not gzip:
        raise error(f"{path}: compressed by gzip; unpack it first")
