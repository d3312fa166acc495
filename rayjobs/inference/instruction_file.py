"""A file of instructions to answer: its records, those that are set aside, and the file of the answers.

Every record has its row in the answers, at its own place, with all of its fields; the answer of a record that was set
aside is null, and `error` says why.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from adapter.errors import AdapterError
from adapter.records.encoding import encode_prompt
from adapter.records.reader import checked_rows
from adapter.templates import Template
from adapter.tokenizers.base import Tokenizer
from rayjobs.inference.batch import Record
from rayjobs.storage.files import write_parquet, write_text

ANSWER_FILE = pa.schema(
    [
        ("instruction", pa.string()),
        ("input", pa.string()),
        ("image", pa.string()),
        ("answer", pa.string()),  # null if there is none
        ("error", pa.string()),  # why there is none, otherwise null
        ("record", pa.string()),  # the whole record as JSON; null if it could not be parsed
    ]
)
"""The columns of answers in Parquet. Fields of records have mixed types, so those that are not known stand in JSON."""


@dataclass(frozen=True, kw_only=True)
class InstructionRow:
    """One record of a file of instructions."""

    location: str
    """its place in the file, such as "line 3" """
    fields: Any
    """as it stands in the file: an object, or what stands in its place; None if it could not be parsed"""
    record: Record
    """its text fields, checked; empty if it cannot be used"""
    error: str = ""
    """why it cannot be answered; it is then set aside"""


def read_instructions(path: Path) -> list[InstructionRow]:
    """Read every record of a file. Raises RecordError for a file that cannot be read."""
    return [
        InstructionRow(location=row.location, fields=row.value, record=record, error=error)
        for row, record, error in checked_rows(path, answered=False)
    ]


def set_aside(
    rows: Iterable[InstructionRow], template: Template, tokenizer: Tokenizer, window: int
) -> Iterator[InstructionRow]:
    """The rows, with an error in those that cannot be answered, such as those that fill the base's window."""
    for row in rows:
        yield replace(row, error=row.error or describe_error(row.record, template, tokenizer, window))


def describe_error(record: Record, template: Template, tokenizer: Tokenizer, window: int) -> str:
    """Describe why a record cannot be answered in a template; empty if it can."""
    try:
        encode_prompt(record, tokenizer, template, window=window)
    except AdapterError as error:
        return str(error)
    return ""


def join_answers(rows: Sequence[InstructionRow], answers: Iterable[Record]) -> list[tuple[InstructionRow, str | None]]:
    """Every row with its answer; None, and an error in the row, for those that were set aside.

    answers: the rows of `ANSWERS` of the records that were not set aside before, in order.
    """
    remaining = iter(answers)
    joined: list[tuple[InstructionRow, str | None]] = []
    for row in rows:
        answered = {} if row.error else next(remaining)
        error = row.error or answered["image_error"]
        joined.append((replace(row, error=error), None if error else answered["answer"]))
    return joined


def rejected_rows(file: str, rows: Iterable[InstructionRow]) -> list[dict[str, str]]:
    """{file, record, reason} of the rows that were set aside."""
    return [{"file": file, "record": row.location, "reason": row.error} for row in rows if row.error]


def shown_answer(row: InstructionRow, answer: str | None) -> Record:
    """A record and its answer in the order in which a person reads them."""
    given = row.fields if isinstance(row.fields, dict) else {}
    shown = {"instruction": given.get("instruction", _question(row.record)), "input": given.get("input") or ""}
    if given.get("image"):
        shown["image"] = given["image"]
    return {**shown, "answer": answer, "error": row.error or None}


def _question(record: Record) -> str | None:
    """The text to answer of a record that is no instruction: the last turn of a conversation, or the prompt."""
    messages = record.get("messages")
    return messages[-1]["content"] if messages else record.get("prompt")


def write_answers(path: Path, answers: Sequence[tuple[InstructionRow, str | None]]) -> None:
    """Write answers as Parquet (`ANSWER_FILE`) or as JSON lines, by the path's suffix.

    A JSON line has the record's other fields after the answer, under their own names. Only a field that has the name of
    a key that is written here, `answer` or `error`, is renamed, to `record_answer` or `record_error`.
    """
    if path.suffix == ".parquet":
        rows = [_parquet_row(row, answer) for row, answer in answers]
        write_parquet(path, pa.Table.from_pylist(rows, ANSWER_FILE))
    else:
        write_text(path, "".join(_to_json(_line(row, answer)) + "\n" for row, answer in answers))


def _line(row: InstructionRow, answer: str | None) -> dict[str, Any]:
    line = shown_answer(row, answer)
    for name, value in (row.fields if isinstance(row.fields, dict) else {}).items():
        if name in ("answer", "error"):
            name = f"record_{name}"
            while name in row.fields:
                name = f"record_{name}"
        line.setdefault(name, value)
    return line


def _parquet_row(row: InstructionRow, answer: str | None) -> dict[str, str | None]:
    shown = shown_answer(row, answer)
    texts = {name: text for name, text in shown.items() if isinstance(text, str) and _encodable(text)}
    return {**texts, "record": None if row.fields is None else _to_json(row.fields)}


def _to_json(value: Any) -> str:
    """JSON in readable characters; half of a surrogate pair, which UTF-8 cannot hold, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return text if _encodable(text) else json.dumps(value, default=_plain)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> str:
    """Text for what Parquet has and JSON has not: bytes in Base64, and dates, times and decimals as they are read."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
