"""Open files of records as bytes: plain, or compressed by gzip or Zstandard."""

import io
from pathlib import Path
from typing import BinaryIO, cast

from adapter.errors import RecordError
from adapter.file_kind import check_content

MAX_ROW_BYTES = 1 << 28
"""A longer row is taken for a missing bracket, quote or end of line."""

BOM = b"\xef\xbb\xbf"

_CODECS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}
_NAMES = {".gz": "gzip", ".zst": "Zstandard"}
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def kind_of(path: str | Path) -> str:
    """The ending that says what a file holds, in small letters and without the ending of its compression."""
    name = Path(str(path).lower())
    return name.with_suffix("").suffix if name.suffix in _CODECS else name.suffix


def compression_of(path: str | Path) -> str:
    """The ending of a file's compression, `.gz` or `.zst`; empty for a file that is not compressed by its name."""
    ending = Path(path).suffix.lower()
    return ending if ending in _CODECS else ""


def check_stored_content(path: Path) -> None:
    """Raise RecordError, naming the file, if it is empty, or holds something else than its name says."""
    with path.open("rb") as file:
        head = file.read(4)
    ending = compression_of(path)
    for other, magic in _MAGIC.items():
        if other != ending and head.startswith(magic):
            raise RecordError(f"{path}: compressed by {_NAMES[other]}; unpack it, or let its name end in {other}")
    check_content(path, RecordError, gzip=ending == ".gz")
    if not head:
        raise RecordError(f"{path}: the file is empty")
    if ending and not head.startswith(_MAGIC[ending]):
        raise RecordError(f"{path}: not compressed by {_NAMES[ending]}, as {ending} says; rename the file")


def open_bytes(path: Path) -> BinaryIO:
    """Open a file as a buffered stream of its bytes, which are unpacked as they are read.

    A compressed file that is cut short or damaged raises OSError where the damage is reached.
    """
    ending = compression_of(path)
    if not ending:
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression=_CODECS[ending])), 1 << 16)


def read_text_head(path: Path, size: int = 1 << 16) -> bytes:
    """The first bytes of a file of text, without byte order mark. Raises RecordError if they are UTF-16 or UTF-32."""
    with open_bytes(path) as file:
        head = file.read(size)
    if head.startswith(_UTF_16_MARKS) or (b"\0" in head[:4] and head[:4].strip(b"\0")):
        raise RecordError(
            f"{path}: UTF-16 or UTF-32, not UTF-8; save it as UTF-8, such as by `iconv -f UTF-16 -t UTF-8`"
        )
    return head.removeprefix(BOM)
