"""Read the rows of files of records one by one, in bounded memory: JSON, CSV, Parquet and Arrow.

A row that cannot be parsed costs that row alone: it comes with the reason, and the next rows follow. A file whose
structure is broken, such as an array without its end, is refused, because an unknown part of it is missing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adapter.errors import RecordError
from adapter.records.arrow_file import read_arrow, read_parquet
from adapter.records.byte_stream import check_stored_content, compression_of, kind_of
from adapter.records.csv_file import read_csv
from adapter.records.json_file import read_json
from adapter.records.row import Row

_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
_WITH_OWN_COMPRESSION = (".parquet", ".arrow")

EXPECTED = f"{', '.join(_READERS)}; all but the last two also as .gz or .zst"
"""The endings of files of records, for messages."""


def is_record_file(path: str | Path) -> bool:
    """Return whether a name has the ending of a file that `read_rows` reads."""
    return kind_of(path) in _READERS and not (compression_of(path) and kind_of(path) in _WITH_OWN_COMPRESSION)


def is_table(path: str | Path) -> bool:
    """Return whether every row of a file of this name has the same columns."""
    return kind_of(path) in _TABLES


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read the rows of a file in order, unchecked, in bounded memory.

    Raises RecordError, naming the file and the location in it, for a file that is missing, empty, cut short, in another
    encoding, or not a list of rows.
    """
    path = Path(path)
    if path.is_dir():
        raise RecordError(f"{path}: a folder; name a file of records")
    if not path.is_file():
        raise RecordError(f"{path}: no such file; expected records as {EXPECTED}")
    if not is_record_file(path):
        raise RecordError(f"{path}: cannot read {path.suffix or 'a file without ending'}; use {EXPECTED}")
    location = ""
    try:
        check_stored_content(path)
        for row in _READERS[kind_of(path)](path):
            yield row
            location = f" after {row.location}"
    except OSError as error:
        packed = ", truncated or corrupt" if compression_of(path) else ""
        raise RecordError(f"{path}: cannot be read{location}{packed} ({error})") from error


def check_text(value: Any, name: str) -> str:
    """Return the value if it is text that can be written as UTF-8. Raises RecordError, which names it, otherwise.

    JSON can spell half of a surrogate pair, such as `\\ud83d` alone: what is left of a character that was cut in two.
    """
    if not isinstance(value, str):
        raise RecordError(f"{name} must be text, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{name} holds {value[error.start]!r} at character {error.start + 1}, half of a surrogate pair, which is "
            "no text; repair or remove the record"
        ) from error
    return value


def check_below(path: str, name: str) -> str:
    """Return a path that stays below the folder it is relative to. Raises RecordError, which names it, otherwise."""
    if path.startswith(("/", "\\")) or ".." in path.replace("\\", "/").split("/"):
        raise RecordError(f"{name} is {path!r:.80}, which leads out of the folder of the images; give a path below it")
    return path
