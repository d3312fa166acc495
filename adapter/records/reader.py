"""Read records of every format out of a file, each checked, or replaced by the reason why it cannot be used.

    format             columns                  record that is yielded
    alpaca             instruction, input?,     {instruction, input, output, image}
                       output, image?
    messages           messages                 {messages: [{role, content, …}, …], image, group, tools?, notes?}
    sharegpt, llava    conversations, image?    the same
    prompt_completion  prompt, completion       {prompt, completion, image, group}, or the same
    text               text                     {text, image, group}

`auto` takes each record for what its columns say. `group` is equal for records that belong on one side of a split.
`notes` counts, by what was done, turns of the conversation that were dropped or merged (`adapter.records.chat`).
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from adapter.errors import RecordError
from adapter.records.chat import chat_record
from adapter.records.files import check_below, is_table, read_rows
from adapter.records.instruction import completion_record, instruction_record, text_record
from adapter.records.row import Row, rejected_record

AUTO = "auto"

_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Columns that a record of each format needs; only the first, if it is to be answered. `auto` tries them in order."""

_SAME_FORMAT = {"llava": "sharegpt"}

_LOOKED_AT = 16
"""Usable records of a file by which its format is named."""


def read_records(
    path: str | Path,
    *,
    format: str = AUTO,
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
    keep_rejected: bool = False,
) -> Iterator[dict[str, Any]]:
    """Read and check the records of a file, in order, in bounded memory.

    format: of all records; `auto` for each one's own. columns: {column: its name in the file}, where it has another.
    answered: False for records that are still to be answered. keep_rejected: yield a `rejected_record` for each record
    that cannot be used, instead of raising for the first.

    Raises RecordError, naming the file and the place, for a record that cannot be used; and, whatever `keep_rejected`,
    for a file that `read_rows` refuses, and for one without a column that `columns` names.
    """
    for row, record, error in checked_rows(path, format=format, columns=columns, answered=answered):
        if not error:
            yield record
        elif keep_rejected:
            id = row.value.get("id") if isinstance(row.value, Mapping) else None
            yield rejected_record(row.location if id is None else f"{row.location}, id {id!r:.60}", error)
        else:
            raise RecordError(f"{path}, {row.location}: {error}")


def recognise(path: str | Path, columns: Mapping[str, str] | None = None) -> list[str]:
    """The formats of a file's first usable records, in the order in which they appear; empty if there is none.

    Raises RecordError, naming the file, for a file that cannot be read.
    """
    rows = (row for row, _, error in checked_rows(path, columns=columns) if not error)
    return list(dict.fromkeys(_format_of(row.value, columns or {}, answered=True) for row in islice(rows, _LOOKED_AT)))


def checked_rows(
    path: str | Path,
    *,
    format: str = AUTO,
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
) -> Iterator[tuple[Row, dict[str, Any], str]]:
    """Read each row of a file with its record and ""; or with an empty record and the reason why it cannot be used.

    The arguments, and the files that are refused, are those of `read_records`.
    """
    columns = columns or {}
    missing, seen = set(columns.values()), dict[str, None]()
    for row in read_rows(path):
        record, error = dict[str, Any](), row.error
        if isinstance(row.value, Mapping) and missing:
            seen |= dict.fromkeys(map(str, row.value))
            missing -= row.value.keys()
            if missing and is_table(path):
                break
        if not error:
            try:
                record = _parse(row.value, format, columns, answered)
            except RecordError as problem:
                error = str(problem)
        yield row, record, error
    if missing and seen:
        names = ", ".join(repr(name) for name in sorted(missing))
        raise RecordError(f"{path}: no column {names}, which data.columns names; its columns are {', '.join(seen)}")


def _parse(row: Any, format: str, columns: Mapping[str, str], answered: bool) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise RecordError(f"a record must be an object, got {row!r:.60}")
    found = _format_of(row, columns, answered)
    format = _SAME_FORMAT.get(format, format)
    row = {**row, **{column: row.get(name) for column, name in columns.items()}}
    if format == AUTO and not found:
        raise RecordError(
            f"the columns say no format: they are {', '.join(map(repr, row)) or 'none'}; expected messages, "
            "conversations, instruction and output, prompt and completion, or text; data.columns maps other names"
        )
    format = found if format == AUTO else format
    for column in _COLUMNS[format][: None if answered else 1]:
        if column not in row:
            hint = f"; it looks like a record of the format {found}" if found not in ("", format) else ""
            raise RecordError(f"the record has no {column!r}; its columns are {', '.join(map(repr, row))}{hint}")
    record = _PARSERS[format](row, answered)
    check_below(record.get("image", ""), "'image'")
    return record


def _format_of(row: Mapping[str, Any], columns: Mapping[str, str], answered: bool) -> str:
    """The format that a row's columns say, empty for none. Columns that are mapped count before others."""
    present = {column for column, name in columns.items() if row.get(name) is not None}
    given = present | {name for name, value in row.items() if value is not None}
    formats = sorted(_COLUMNS, key=lambda format: not present.intersection(_COLUMNS[format]))
    whole = (format for format in formats if given.issuperset(_COLUMNS[format][: None if answered else 1]))
    return next(whole, next((format for format in formats if _COLUMNS[format][0] in given), ""))


_PARSERS: dict[str, Callable[[Mapping[str, Any], bool], dict[str, Any]]] = {
    "messages": lambda row, answered: chat_record(row, row["messages"], answered=answered, key="messages"),
    "sharegpt": lambda row, answered: chat_record(row, row["conversations"], answered=answered, key="conversations"),
    "alpaca": lambda row, answered: instruction_record(row, answered=answered),
    "prompt_completion": lambda row, answered: completion_record(row, answered=answered),
    "text": lambda row, answered: text_record(row, answered=answered),
}
