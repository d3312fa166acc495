"""LLaVA-style conversations as instruction records.

    {"id": …, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A bird."}, …]}

Each answer is a record of its own: the question before it is the instruction, the turns before that are the input,
which loses its beginning where a sequence is too long. The place of the image among the words does not matter here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter.instruct import RecordError, read_rows

_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")
_TAG = "<image>"


def read_conversations(path: str | Path) -> Iterator[dict[str, str]]:
    """Every answer of a `.json`, `.jsonl` or `.parquet` file of conversations, with the turns before it, in order.

    Raises RecordError naming file and line (or row) of whatever is malformed.
    """
    for place, row in read_rows(path):
        yield from _answers(row, f"{path}, {place}")


def _answers(row: Any, place: str) -> Iterator[dict[str, str]]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{place}: a conversation is an object with a list of 'conversations', got {row!r:.60}")
    image = row.get("image") or ""
    if not isinstance(image, str):
        raise RecordError(f"{place}: 'image' must be a path, got {image!r:.60}")
    if len(turns) % 2:
        raise RecordError(f"{place}: the last of {len(turns)} turns has no answer")
    before: list[str] = []
    for i in range(0, len(turns), 2):
        question = _said(turns[i], _HUMAN, f"{place}, turn {i}")
        answer = _said(turns[i + 1], _MODEL, f"{place}, turn {i + 1}")
        if _TAG in question:
            if not image:
                raise RecordError(f"{place}, turn {i}: speaks of {_TAG}, but the record names no 'image'")
            question = question.replace(_TAG, "").strip()
        yield {"instruction": question, "input": "\n".join(before), "output": answer, "image": image}
        before += [question, answer]


def _said(turn: Any, who: tuple[str, ...], place: str) -> str:
    if not isinstance(turn, dict) or turn.get("from") not in who or not isinstance(turn.get("value"), str):
        raise RecordError(f"{place}: expected {{'from': '{who[0]}', 'value': text}}, got {turn!r:.60}")
    return turn["value"]
