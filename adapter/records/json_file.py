"""Read the rows of a JSON array or of JSON lines one by one, in bounded memory.

The items of an array are found by their brackets and strings, and each is then parsed alone, as lines are. An
incremental parser such as ijson can go on neither after a syntax error nor after a NaN, which Python's own `json.dump`
writes, and it reads half of a surrogate pair as "?".
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter.errors import RecordError
from adapter.records.byte_stream import BOM, MAX_ROW_BYTES, kind_of, open_bytes, read_text_head
from adapter.records.row import Row

READ_BYTES = 1 << 16
"""Size of each read of an array."""

_FIRST_LINE_BYTES = 1 << 24
"""Length up to which the first line of a `.json` file is read to see whether it is an object by itself."""

_SPACE = b" \t\r\n"
_TOKEN = re.compile(rb'[][{},]|"(?:[^"\\]+|\\.)*("?)', re.DOTALL)
"""The tokens that decide where an item ends. Group 1 is None for a bracket or comma, empty for a string without end."""

_WITHIN_ITEM = re.compile(rb'(?:[^][{}"]+|"[^"\\]*")*')
"""The text inside an item that can be skipped at once: all up to the next bracket, or a string with a backslash."""


def read_json(path: Path) -> Iterator[Row]:
    """Read the items of an array, or the objects of JSON lines. The content says which: many `.json` files hold lines.

    Raises RecordError, naming the file and the place, for a file that is neither, or an array without its end.
    """
    start = read_text_head(path).lstrip(_SPACE)
    if start.startswith(b"["):
        for number, text in enumerate(_array_items(path), 1):
            yield _parse(f"item {number}", text)
    elif kind_of(path) != ".json" or _is_lines(path):
        yield from _read_lines(path)
    else:
        raise RecordError(f"{path}: expected a JSON array of records, or one object per line; {_describe_other(start)}")


def _parse(location: str, text: bytes) -> Row:
    try:
        return Row(location, json.loads(text.decode()))
    except UnicodeDecodeError as error:
        byte = text[error.start]
        return Row(location, None, f"not UTF-8: byte {byte:#04x} at {error.start + 1}; save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python converts
        return Row(location, None, f"malformed JSON: {error}; it begins with {text[:40].decode(errors='replace')!r}")


def _read_lines(path: Path) -> Iterator[Row]:
    number = 0
    with open_bytes(path) as file:
        while lines := file.readline(MAX_ROW_BYTES):
            if len(lines) == MAX_ROW_BYTES:
                raise RecordError(f"{path}, line {number + 1}: longer than {MAX_ROW_BYTES:,} bytes; is it one line?")
            for line in lines.splitlines():  # at CR too
                number += 1
                if text := line.removeprefix(BOM).strip(_SPACE):
                    yield _parse(f"line {number}", text)


def _is_lines(path: Path) -> bool:
    """Return whether the file's first line is an object by itself, and no wrapper of the list of records."""
    with open_bytes(path) as file:
        text = b""
        while not text and (line := file.readline(_FIRST_LINE_BYTES)):
            text = line.removeprefix(BOM).strip(_SPACE)
        first = _parse("", text).value
        if not isinstance(first, dict):
            return False
        return bool(file.read(1 << 10).strip(_SPACE)) or _wrapped_list(first) is None


def _wrapped_list(item: dict[str, Any]) -> str | None:
    """The key of the list of objects that an object wraps, unless it is a list of a conversation's turns."""
    for key, value in item.items():
        is_list = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        if is_list and not {"role", "from", "content", "value"} & value[0].keys():
            return key
    return None


def _describe_other(start: bytes) -> str:
    """Describe a file that begins like this and holds no list of records, and what to do about it."""
    if not start.startswith(b"{"):
        return "the file is neither" if start else "the file is empty"
    if lists := re.search(rb'"([^"\\]+)"\s*:\s*\[\s*[{\]]', start):
        return f"the file is one object, with a list under {lists[1].decode(errors='replace')!r}: save that list alone"
    return "the file is one object: put it into brackets, or save the list of records alone"


def _array_items(path: Path) -> Iterator[bytes]:
    """Yield the text of each item of the file's array.

    Raises RecordError where the array's end cannot be found, or is not the end of the file.
    """
    text, start = b"", 0  # what was read, and where the item begins in it
    position, depth, number = 0, 0, 0  # start of the search for a token, open brackets there, the item's number
    with open_bytes(path) as file:
        while number == 0 or depth:
            if depth > 1 and (skipped := _WITHIN_ITEM.match(text, position)):
                position = skipped.end()
            token = _TOKEN.search(text, position)
            if token is None or token[1] == b"":
                if len(text) - start > MAX_ROW_BYTES:
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
