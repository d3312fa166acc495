"""Recognise files that hold something else than their name says."""

from pathlib import Path

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_SIGNATURES = {
    b"GGUF": "a GGUF file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "a database",
}
"""First bytes of files that are taken for files of tensors, and what they are."""


def check_content(path: Path, error: type[ValueError], *, gzip: bool = False) -> None:
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


def describe_content(path: Path) -> str:
    """Name the kind of a file, such as "a GGUF file" or "JSON", as far as its first bytes tell; empty if they do not.

    Raises OSError if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(200)
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    if not head:
        return "an empty file"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return ""
    return "JSON" if text[:1] in (b"{", b"[") else "text"
