"""Instruction records to token ids and labels.

A record is `{instruction, input?, output, image?}`, the image a path, which is no part of the sequence: that is BOS +
prompt + output + EOS, and only output and EOS carry a label. Files are read record by record, never whole: JSON (an
array), JSONL and Parquet.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from adapter.errors import AdapterError, RecordError
from adapter.tokenizer import Tokenizer

READ_CHARS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How an instruction, with or without an input, becomes a prompt."""

    with_input: str
    without_input: str

    def __post_init__(self) -> None:
        for name, fields in (("with_input", ("{instruction}", "{input}")), ("without_input", ("{instruction}",))):
            for field in fields:
                if field not in getattr(self, name):
                    raise AdapterError(f"prompt template {name!r} must contain {field}")

    def render(self, instruction: str, input: str = "") -> str:
        text = self.with_input if input else self.without_input
        # In one pass and not by str.format: braces in the user's own text are no fields.
        fields = {"{instruction}": instruction, "{input}": input}
        return re.sub("{instruction}|{input}", lambda field: fields[field.group()], text)

    @classmethod
    def read(cls, path: str | Path) -> "PromptTemplate":
        """Reads `{"with_input": …, "without_input": …}` from a JSON file. Raises ValueError naming what is missing."""
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
"""The two templates of Stanford Alpaca, which LLaMA-Adapter was trained with."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as ids; ids[label_start:] are labelled."""

    ids: list[int]
    label_start: int
    input: str = ""
    """What is left of the record's input."""


def encode_record(
    record: dict[str, str], tokenizer: Tokenizer, template: PromptTemplate = ALPACA, *, max_length: int = 512
) -> Example:
    """A record's BOS + prompt + output + EOS in at most `max_length` ids.

    A sequence that is too long loses tokens from the left of its input first, then from the right of its output; EOS
    stays. Raises RecordError if not even one token of the output would be left beside EOS.
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
    """Output + EOS as the pieces that follow the prompt when both are encoded together, as the official code does.

    Where a piece straddles the boundary, the output is encoded alone, so that a prompt's ids are always those that
    generation will see.
    """
    text = template.render(record["instruction"], record.get("input") or "") + record["output"]
    together = tokenizer.encode(text, bos=True, eos=True)
    if together[: len(prompt)] == prompt:
        return together[len(prompt) :]
    return tokenizer.encode(record["output"], bos=False, eos=True)


def read_records(path: str | Path, *, answered: bool = True) -> Iterator[dict[str, str]]:
    """Every record of a `.json` (array), `.jsonl` or `.parquet` file, checked, in order, in bounded memory.

    Records that are yet to be answered need no `output`; theirs is then ''.

    Raises RecordError naming file and line (or row) of whatever is malformed, or of a field that is missing or no text.
    """
    for place, record in read_rows(path):
        yield _checked(record, f"{path}, {place}", answered)


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Every item of a `.json` (array), `.jsonl` or `.parquet` file with its line or row, unchecked, in bounded memory.

    Raises RecordError naming file and line (or row) of whatever is malformed.
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
    """A JSON array's items, decoded one by one from a sliding window of text."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text, at, line, ended = file.read(READ_CHARS), 0, 1, False

        def refill() -> None:
            nonlocal text, at, ended
            more = file.read(max(READ_CHARS, len(text)))
            ended = not more
            text, at = text[at:] + more, 0

        def skip_space() -> str:
            """Moves to the next character that is no white space, and returns it ('' at the end of the file)."""
            nonlocal at, line
            while True:
                while at < len(text) and text[at] in " \t\r\n":
                    line += text[at] == "\n"
                    at += 1
                if at < len(text) or ended:
                    return text[at : at + 1]
                refill()

        if (first := skip_space()) != "[":
            hint = "an object per line belongs in a .jsonl file" if first == "{" else "the file is no JSON array"
            raise RecordError(f"{path}, line {line}: expected a JSON array of records; {hint}")
        at += 1
        if skip_space() == "]":
            return
        while True:
            try:
                skip_space()
                record, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                if not ended:  # the record may only be cut by the window
                    refill()
                    continue
                where = line + text.count("\n", at, error.pos)
                raise RecordError(f"{path}, line {where}: malformed JSON: {error.msg}") from error
            if end == len(text) and not ended and not isinstance(record, dict):  # a number may go on
                refill()
                continue
            yield f"line {line}", record
            line += text.count("\n", at, end)
            at = end
            if (follows := skip_space()) not in ("", ",", "]"):
                raise RecordError(f"{path}, line {line}: malformed JSON: expected ',' or ']' after a record")
            at += 1
            if follows == "]":
                return
            if not follows:
                raise RecordError(f"{path}, line {line}: malformed JSON: the file ends inside the array")


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
