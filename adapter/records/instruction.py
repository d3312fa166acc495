"""Check instructions with their answers, prompts with their completions, and plain texts."""

import hashlib
from collections.abc import Mapping
from typing import Any

from adapter.errors import RecordError
from adapter.records.chat import chat_record, is_message_list
from adapter.records.files import check_text


def instruction_record(row: Mapping[str, Any], *, answered: bool) -> dict[str, Any]:
    """The record `{instruction, input, output, image}`; a missing input or image is ''.

    answered: False for a record that is to be answered, which needs no output. Raises RecordError.
    """
    record = {name: row.get(name) for name in ("instruction", "input", "output", "image")}
    record |= {name: "" for name in ("input", "image") if record[name] is None}
    if not answered and not isinstance(record["output"], str):
        record["output"] = ""  # it is not read, so it may be anything
    return {name: check_text(value, repr(name)) for name, value in record.items()}


def completion_record(row: Mapping[str, Any], *, answered: bool) -> dict[str, Any]:
    """The record `{prompt, completion, image, group}`, whose prompt stands in no template; or a conversation.

    Prompt and completion are texts, or lists of turns as TRL has them; the completion's answers alone are then learned.
    answered: False for a prompt that is to be completed. Raises RecordError.
    """
    prompt, completion = row["prompt"], row.get("completion")
    if is_message_list(prompt):
        turns = [{**turn, "weight": 0} for turn in prompt]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if answered and not is_message_list(completion):
            raise RecordError(f"'completion' must be turns like the prompt, got {completion!r:.60}")
        return chat_record(row, turns + (completion or []) if answered else turns, answered=answered, key="messages")
    texts = [check_text(prompt, "'prompt'"), check_text(completion, "'completion'") if answered else ""]
    image = check_text(row.get("image") or "", "'image'")
    return {"prompt": texts[0], "completion": texts[1], "image": image, "group": image or _digest(*texts)}


def text_record(row: Mapping[str, Any], *, answered: bool) -> dict[str, Any]:
    """The record `{text, image, group}`, all of which is learned. Raises RecordError."""
    if not answered:
        raise RecordError("it is a plain text, which holds nothing to answer")
    text = check_text(row["text"], "'text'")
    return {"text": text, "image": "", "group": _digest(text)}


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
