"""Read instruction records, and encode them as token ids and labels.

A record is `{instruction, input?, output, image?}`. Its sequence is BOS + prompt + output + EOS, of which only output
and EOS are labelled. The image is a path and no part of the sequence. Files are JSON (an array), JSONL or Parquet; they
are read record by record, never whole.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
import pyarrow.parquet as pq

from adapter.errors import AdapterError, RecordError
from adapter.tokenizer import Tokenizer

READ_BYTES = 1 << 16
"""How much of a JSON file is read at a time."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """The text that an instruction is put into, with or without an input."""

    with_input: str
    """Contains `{instruction}` and `{input}`."""
    without_input: str
    """Contains `{instruction}`."""

    def __post_init__(self) -> None:
        for name, fields in (("with_input", ("{instruction}", "{input}")), ("without_input", ("{instruction}",))):
            for field in fields:
                if field not in getattr(self, name):
                    raise AdapterError(f"prompt template {name!r} must contain {field}")

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt of an instruction; an empty input counts as none."""
        text = self.with_input if input else self.without_input
        # One pass of `re.sub`, not str.format: braces in the user's own text are not fields.
        fields = {"{instruction}": instruction, "{input}": input}
        return re.sub("{instruction}|{input}", lambda field: fields[field.group()], text)

    @classmethod
    def read(cls, path: str | Path) -> "PromptTemplate":
        """Read `{"with_input": …, "without_input": …}` from a JSON file.

        Raises AdapterError, naming the file, if it is not JSON or a template or field is missing.
        """
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(with_input=fields["with_input"], without_input=fields["without_input"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise AdapterError(
                f"{path}: a prompt template is a JSON object with 'with_input' and 'without_input': {error}"
            ) from error


ALPACA = PromptTemplate(
    with_input=(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    without_input=(
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
)
"""The two templates of Stanford Alpaca, which LLaMA-Adapter is trained with."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as token ids, of which ids[label_start:] are labelled."""

    ids: list[int]
    label_start: int
    input: str = ""
    """The record's input, shortened if the sequence would have been too long."""


def encode_record(
    record: dict[str, str], tokenizer: Tokenizer, template: PromptTemplate = ALPACA, *, max_length: int = 512
) -> Example:
    """Encode a record as BOS + prompt + output + EOS, in at most `max_length` ids.

    A sequence that is too long loses tokens from the left of its input first, then from the right of its output; EOS
    stays. Raises RecordError if not even one token of the output would be left before EOS.
    """
    output, input = record["output"], record.get("input") or ""
    prompt = tokenizer.encode(template.render(record["instruction"], input), bos=True, eos=False)
    answer = _encode_answer(record, prompt, tokenizer, template)
    pieces = tokenizer.encode(input, bos=False, eos=False) if input else []
    while pieces and len(prompt) + len(answer) > max_length:
        pieces = pieces[len(prompt) + len(answer) - max_length :]
        input = tokenizer.decode(pieces)
        prompt = tokenizer.encode(template.render(record["instruction"], input), bos=True, eos=False)
        answer = _encode_answer({**record, "input": input}, prompt, tokenizer, template)
    room = max_length - len(prompt)
    if len(answer) > room:
        if room < 2 or not output:
            raise RecordError(f"the prompt alone has {len(prompt)} tokens, which leaves no label within {max_length}")
        answer = [*answer[: room - 1], tokenizer.eos_id]
    return Example(ids=prompt + answer, label_start=len(prompt), input=input)


def _encode_answer(
    record: dict[str, str], prompt: list[int], tokenizer: Tokenizer, template: PromptTemplate
) -> list[int]:
    """The ids of output + EOS that follow the prompt's when both are encoded together, as the official code does.

    Where a piece would span the end of the prompt, the output is encoded alone, so that the prompt's ids are those that
    generation will see.
    """
    text = template.render(record["instruction"], record.get("input") or "") + record["output"]
    together = tokenizer.encode(text, bos=True, eos=True)
    if together[: len(prompt)] == prompt:
        return together[len(prompt) :]
    return tokenizer.encode(record["output"], bos=False, eos=True)


def read_records(path: str | Path, *, answered: bool = True) -> Iterator[dict[str, str]]:
    """Read and check the records of a `.json` (array), `.jsonl` or `.parquet` file, in order, in bounded memory.

    Yields records with the text fields instruction, input, output and image; a missing input or image is ''.
    answered: False for records that are still to be answered, which need no `output`; a missing one is ''.

    Raises RecordError, naming the file and the item, line or row, for malformed content and for fields that are missing
    or not text.
    """
    for place, record in read_rows(path):
        yield _checked(record, f"{path}, {place}", answered)


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Read the rows of a `.json` (array), `.jsonl` or `.parquet` file, in order, unchecked, in bounded memory.

    Yields (place, row), the place as "item 3" of an array, counted from 1, "line 3" of a JSONL file, counted from 1, or
    "row 3" of a Parquet file, counted from 0.

    Raises RecordError, naming the file and the place, for malformed content.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"{path}: no such file; expected records as .json, .jsonl or .parquet")
    readers = {".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise RecordError(f"{path}: cannot read {path.suffix or 'a file without ending'}; use {', '.join(readers)}")
    yield from readers[path.suffix](path)


def _checked(record: Any, place: str, answered: bool) -> dict[str, str]:
    if not isinstance(record, dict):
        raise RecordError(f"{place}: a record must be an object with 'instruction' and 'output', got {record!r:.60}")
    for name in ("instruction", "output") if answered else ("instruction",):
        if name not in record:
            raise RecordError(f"{place}: the record has no {name!r}; its keys are {sorted(record)}")
    fields = {name: record.get(name, "") for name in ("instruction", "input", "output", "image")}
    fields = {name: "" if value is None and name in ("input", "image") else value for name, value in fields.items()}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise RecordError(f"{place}: {name!r} must be text, got {value!r:.60}")
    return fields


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise RecordError(f"{path}, line {number}: malformed JSON: {error.msg}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        start = file.read(1)
        while start and start in b" \t\r\n":
            start = file.read(1)
        if start != b"[":
            hint = "an object per line belongs in a .jsonl file" if start == b"{" else "the file is no JSON array"
            raise RecordError(f"{path}: expected a JSON array of records; {hint}")
        file.seek(0)
        number = 0
        try:
            for number, record in enumerate(ijson.items(file, "item", buf_size=READ_BYTES, use_float=True), 1):
                yield f"item {number}", record
        except ijson.JSONError as error:
            message = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
            summary = message.splitlines()[0]
            if "trailing garbage" in summary:
                summary = f"the array ends after item {number}, but the file goes on"
            raise RecordError(f"{path}, item {number + 1}: malformed JSON: {summary}") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a readable Parquet file: {error}") from error
    row = 0
    with file:
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                yield f"row {row}", record
                row += 1
