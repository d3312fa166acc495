"""Read the rows of JSON, JSONL and Parquet files one by one, in bounded memory.

A row that cannot be parsed costs that row alone: it comes with the reason, and the next rows follow. A file whose
structure is broken, such as an array without its end, is refused, because an unknown part of it is missing.

The items of a JSON array are found by their brackets and strings, and each is then parsed alone, as the lines of JSONL
are. An incremental parser such as ijson can go on neither after a syntax error nor after a NaN, which Python's own
`json.dump` writes, and it reads half of a surrogate pair as "?".
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from adapter.errors import RecordError
from adapter.file_kind import check_content

READ_BYTES = 1 << 16
"""Size of each read of a JSON file."""

MAX_ITEM_BYTES = 1 << 28
"""A longer item of an array is taken for a missing bracket or quote."""

_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_TOKEN = re.compile(rb'[][{},]|"(?:[^"\\]+|\\.)*("?)', re.DOTALL)
"""The tokens that decide where an item ends. Group 1 is None for a bracket or comma, empty for a string without end."""

_WITHIN_ITEM = re.compile(rb'(?:[^][{}"]+|"[^"\\]*")*')
"""The text inside an item that can be skipped at once: all up to the next bracket, or a string with a backslash."""


class Row(NamedTuple):
    """One row of a file, or the reason why it cannot be read."""

    location: str
    """ "item 3" of an array or "line 3" of a JSONL file, counted from 1; "row 3" of a Parquet file, counted from 0."""
    value: Any
    error: str = ""


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read the rows of a `.json` (array), `.jsonl` or `.parquet` file, in order, unchecked, in bounded memory.

    JSON is UTF-8, with or without a byte order mark.

    Raises RecordError, naming the file and the location in it, for a file that is missing, cut short, in another
    encoding, or not a list of rows.
    """
    path = Path(path)
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    if path.is_dir():
        raise RecordError(f"{path}: a folder; name a file of records, or read it as format scienceqa")
    if not path.is_file():
        raise RecordError(f"{path}: no such file; expected records as .json, .jsonl or .parquet")
    if path.suffix not in readers:
        raise RecordError(f"{path}: cannot read {path.suffix or 'a file without ending'}; use {', '.join(readers)}")
    check_content(path, RecordError)
    yield from readers[path.suffix](path)


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


def _parse(location: str, text: bytes) -> Row:
    try:
        return Row(location, json.loads(text.decode()))
    except UnicodeDecodeError as error:
        byte = text[error.start]
        return Row(location, None, f"not UTF-8: byte {byte:#04x} at {error.start + 1}; save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python converts
        return Row(location, None, f"malformed JSON: {error}; it begins with {text[:40].decode(errors='replace')!r}")


def _json_start(path: Path) -> bytes:
    """The beginning of a JSON file, without byte order mark and white space. Raises RecordError for UTF-16."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (b"\0" in head[:4] and head[:4].strip(b"\0")[:1] in (b"[", b"{")):
        raise RecordError(
            f"{path}: UTF-16 or UTF-32, not UTF-8; save it as UTF-8, such as by `iconv -f UTF-16 -t UTF-8`"
        )
    return head.removeprefix(_BOM).lstrip(_SPACE)


def _read_jsonl(path: Path) -> Iterator[Row]:
    if _json_start(path).startswith(b"["):
        raise RecordError(f"{path}: expected one JSON object per line; a JSON array belongs in a .json file: rename it")
    number = 0
    with path.open("rb") as file:
        for lines in file:
            for line in lines.splitlines():  # at CR too
                number += 1
                if text := line.removeprefix(_BOM).strip(_SPACE):
                    yield _parse(f"line {number}", text)


def _read_json(path: Path) -> Iterator[Row]:
    start = _json_start(path)
    if not start.startswith(b"["):
        raise RecordError(f"{path}: expected a JSON array of records; {_describe_other_json(start)}")
    for number, text in enumerate(_array_items(path), 1):
        yield _parse(f"item {number}", text)


def _describe_other_json(start: bytes) -> str:
    """Describe a file that begins like this and is no array, and what to do about it."""
    if not start.startswith(b"{"):
        return "the file is no JSON array" if start else "the file is empty"
    first, _, rest = start.partition(b"\n")
    line = _parse("", first.strip(_SPACE)).value
    if isinstance(line, dict) and (rest.strip(_SPACE) or {"instruction", "conversations"} & line.keys()):
        return "an object per line belongs in a .jsonl file: rename it"
    if lists := re.search(rb'"([^"\\]+)"\s*:\s*\[\s*[{\]]', start):
        return f"the file is one object, with a list under {lists[1].decode(errors='replace')!r}: save that list alone"
    return "the file is one object: put it into brackets, or save the list of records alone"


def _array_items(path: Path) -> Iterator[bytes]:
    """Yield the text of each item of the file's array.

    Raises RecordError where the array's end cannot be found, or is not the end of the file.
    """
    text, start = b"", 0  # what was read, and where the item begins in it
    position, depth, number = 0, 0, 0  # start of the search for a token, open brackets there, the item's number
    with path.open("rb") as file:
        while number == 0 or depth:
            if depth > 1 and (skipped := _WITHIN_ITEM.match(text, position)):
                position = skipped.end()
            token = _TOKEN.search(text, position)
            if token is None or token[1] == b"":
                if len(text) - start > MAX_ITEM_BYTES:
                    raise RecordError(f"{path}, item {number}: malformed JSON: a bracket or quote is missing")
                more = file.read(max(READ_BYTES, len(text) - start))  # doubles, so that long items stay linear
                if not more:
                    raise RecordError(
                        f"{path}, item {number}: malformed JSON: the file ends within it; is it cut short?"
                    )
                position = (len(text) if token is None else token.start()) - start
                text, start = text[start:] + more, 0
                continue
            position, symbol = token.end(), token[0]
            depth += (symbol in b"[{") - (symbol in b"]}")
            if number == 0:  # the array's own bracket
                start, number = position, 1
            elif depth == 0 and symbol == b"}":
                raise RecordError(f"{path}, item {number}: malformed JSON: a bracket is missing before its end")
            elif depth == 0 or (depth == 1 and symbol == b","):
                item = text[start : token.start()].strip(_SPACE)
                if depth or number > 1 or item:
                    yield item
                    number += 1
                start = position
        rest = text[start:]
        while not rest.strip(_SPACE):
            rest = file.read(READ_BYTES)
            if not rest:
                return
    raise RecordError(f"{path}: malformed JSON: the array ends after item {number - 1}, but the file goes on")


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in _batch_rows(batch):
                    yield Row(f"row {number}", *row)
                    number += 1
    except (OSError, pa.ArrowException) as error:
        after = f" after row {number - 1}" if number else ""
        raise RecordError(f"{path}: not a readable Parquet file{after}, truncated or corrupt ({error})") from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, str]]:
    """Each row and "", or None and the reason why it cannot be read."""
    try:
        yield from ((row, "") for row in batch.to_pylist())
    except UnicodeDecodeError:  # raised before the first row is there
        for i in range(len(batch)):
            try:
                yield batch.slice(i, 1).to_pylist()[0], ""
            except UnicodeDecodeError as error:
                yield None, f"not UTF-8: byte {error.object[error.start]:#04x} in a text"
