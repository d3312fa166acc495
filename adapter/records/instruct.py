"""Read instruction records, and encode them as token ids and labels.

A record is `{instruction, input?, output, image?}`. Its sequence is BOS + prompt + output + EOS, of which only output
and EOS are labelled. The image is a path and no part of the sequence. `adapter.records.files` has the files' formats.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import AdapterError, RecordError
from adapter.records.files import check_text, read_rows
from adapter.tokenizers.base import Tokenizer

_FIELDS = ("instruction", "input", "output", "image")


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
            fields = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            return cls(with_input=fields["with_input"], without_input=fields["without_input"])
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:  # ValueError: malformed JSON or UTF-8
            raise AdapterError(
                f"{path}: a prompt template is a JSON object in UTF-8 with 'with_input' and 'without_input': {error}"
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


def read_records(path: str | Path, *, answered: bool = True, keep_rejected: bool = False) -> Iterator[dict[str, str]]:
    """Read and check the records of a `.json` (array), `.jsonl` or `.parquet` file, in order, in bounded memory.

    Yields records with the text fields instruction, input, output and image; a missing input or image is ''.
    answered: False for records that are still to be answered, which need no `output`; a missing one is ''.
    keep_rejected: yield a `rejected_record` for each record that cannot be used, instead of raising for the first.

    Raises RecordError, naming the file and the item, line or row, for a record that is malformed, or whose fields are
    missing or not text; and, whatever `keep_rejected`, for a file that `read_rows` refuses.
    """
    for place, row, error in read_rows(path):
        try:
            if error:
                raise RecordError(error)
            record = _checked(row, answered)
        except RecordError as error:
            if not keep_rejected:
                raise RecordError(f"{path}, {place}: {error}") from error
            record = rejected_record(place, str(error))
        yield record


def rejected_record(place: str, reason: str) -> dict[str, str]:
    """An empty record in place of one that cannot be used, with its `place` in the file, and the reason `rejected`."""
    return {**dict.fromkeys(_FIELDS, ""), "place": place, "rejected": reason}


def _checked(record: Any, answered: bool) -> dict[str, str]:
    if not isinstance(record, dict):
        raise RecordError(f"a record must be an object with 'instruction' and 'output', got {record!r:.60}")
    for name in ("instruction", "output") if answered else ("instruction",):
        if name not in record:
            hint = f"its keys are {list(record)!r:.200}"
            if "conversations" in record:
                hint = "it is a conversation, which the format llava reads"
            elif "messages" in record:
                hint = (
                    "chat 'messages' are not read; rewrite them as 'conversations' of 'from' and 'value', format llava"
                )
            raise RecordError(f"the record has no {name!r}; {hint}")
    fields = {name: record.get(name, "") for name in _FIELDS}
    if not answered and not isinstance(fields["output"], str):
        fields["output"] = ""  # it is not read, so it may be anything
    fields = {name: "" if value is None and name in ("input", "image") else value for name, value in fields.items()}
    return {name: check_text(value, repr(name)) for name, value in fields.items()}
