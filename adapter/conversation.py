"""LLaVA-style conversations as instruction records.

    {"id": …, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A bird."}, …]}

Each answer is a record of its own: the question before it is the instruction, the turns before that, a system turn
first of all, are the input, which loses its beginning where a sequence is too long. The place of the image among the
words does not matter here.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter.errors import RecordError
from adapter.instruct import read_rows

_SYSTEM, _HUMAN, _MODEL = ("system",), ("human", "user"), ("gpt", "assistant")
_TAG = "<image>"


def read_conversations(path: str | Path) -> Iterator[dict[str, str]]:
    """Every answer of a `.json`, `.jsonl` or `.parquet` file of conversations, with the turns before it, in order.

    Records of one conversation, or of one image, have one `group`. An odd conversation is one record that is empty but
    for `rejected`, the reason. Raises RecordError naming file and line (or row) of what is no list of conversations.
    """
    for index, (place, row) in enumerate(read_rows(path)):
        try:
            yield from list(_answers(row))
        except RecordError as error:
            name = f"conversation {index}" + (f", id {row['id']!r}" if isinstance(row, dict) and "id" in row else "")
            empty = dict.fromkeys(("instruction", "input", "output", "image"), "")
            yield {**empty, "rejected": f"{path}, {place}, {name}: {error}"}


def _answers(row: Any) -> Iterator[dict[str, str]]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"a conversation is an object with a list of 'conversations', got {row!r:.60}")
    image = row.get("image") or ""
    if not isinstance(image, str):
        raise RecordError(f"'image' must be a path, got {image!r:.60}")
    first = int(isinstance(turns[0], dict) and turns[0].get("from") in _SYSTEM)
    before = [_said(turns, i, _SYSTEM) for i in range(first)]
    if len(turns) % 2 != first or len(turns) == first:
        raise RecordError(f"the last of {len(turns)} turns has no answer")
    group = image or hashlib.sha256(repr(turns).encode()).hexdigest()
    for i in range(first, len(turns), 2):
        question, answer = _said(turns, i, _HUMAN), _said(turns, i + 1, _MODEL)
        if _TAG in answer:
            raise RecordError(f"turn {i + 1}: {_TAG} in an answer")
        if _TAG in question:
            if not image:
                raise RecordError(f"turn {i}: speaks of {_TAG}, but the record names no 'image'")
            question = question.replace(_TAG, "").strip()
        yield {"instruction": question, "input": "\n".join(before), "output": answer, "image": image, "group": group}
        before += [question, answer]


def _said(turns: list[Any], i: int, who: tuple[str, ...]) -> str:
    turn = turns[i]
    if not isinstance(turn, dict) or turn.get("from") not in who or not isinstance(turn.get("value"), str):
        raise RecordError(f"turn {i}: expected {{'from': '{who[0]}', 'value': text}}, got {turn!r:.60}")
    return turn["value"]
