"""Read LLaVA-style conversations as instruction records.

    {"id": …, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A bird."}, …]}

Each answer becomes one record. The question before it is the instruction; all earlier turns, beginning with a system
turn if there is one, are the input, which loses its beginning where a sequence is too long. `<image>` is removed from
the question: the adapter reads the image apart from the text.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapter.errors import RecordError
from adapter.records.files import check_text, read_rows
from adapter.records.instruct import rejected_record

_SYSTEM, _HUMAN, _MODEL = ("system",), ("human", "user"), ("gpt", "assistant")
_TAG = "<image>"


def read_conversations(path: str | Path) -> Iterator[dict[str, str]]:
    """Read every answer of a `.json`, `.jsonl` or `.parquet` file of conversations, in order.

    Yields instruction records with a `group` besides, equal for records of one conversation or of one image, so that
    a split can keep them together. A malformed conversation yields one `rejected_record`.

    Raises RecordError, naming the file and the place, for a file that `read_rows` refuses.
    """
    for index, (place, row, error) in enumerate(read_rows(path)):
        try:
            if error:
                raise RecordError(error)
            yield from list(_answer_records(row))
        except RecordError as error:
            name = f"conversation {index}" + (f", id {row['id']!r}" if isinstance(row, dict) and "id" in row else "")
            yield rejected_record(f"{place}, {name}", str(error))


def _answer_records(row: Any) -> Iterator[dict[str, str]]:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if isinstance(row, dict) and turns is None and "instruction" in row:
        raise RecordError("it is an instruction record, which the format alpaca reads, not a conversation")
    if isinstance(row, dict) and turns is None and "messages" in row:
        raise RecordError("chat 'messages' are not read; rewrite them as 'conversations' of 'from' and 'value'")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"a conversation is an object with a list of 'conversations', got {row!r:.60}")
    image = row.get("image") or ""
    if not isinstance(image, str):
        raise RecordError(f"'image' must be a path, got {image!r:.60}")
    check_text(image, "'image'")
    first = int(isinstance(turns[0], dict) and turns[0].get("from") in _SYSTEM)  # index of the first question
    texts = [
        _turn_text(turns, i, _SYSTEM if i < first else (_HUMAN, _MODEL)[(i - first) % 2]) for i in range(len(turns))
    ]
    if len(turns) % 2 != first or len(turns) == first:
        raise RecordError(f"the last of {len(turns)} turns has no answer")
    history = texts[:first]
    group = image or hashlib.sha256(repr(turns).encode()).hexdigest()
    for i in range(first, len(turns), 2):
        question, answer = texts[i], texts[i + 1]
        if _TAG in answer:
            raise RecordError(f"turn {i + 1}: {_TAG} in an answer")
        if _TAG in question:
            if not image:
                raise RecordError(f"turn {i}: speaks of {_TAG}, but the record names no 'image'")
            question = question.replace(_TAG, "").strip()
        yield {"instruction": question, "input": "\n".join(history), "output": answer, "image": image, "group": group}
        history += [question, answer]


def _turn_text(turns: list[Any], i: int, speakers: tuple[str, ...]) -> str:
    """The text of turn i, which must be one of the speakers'."""
    turn = turns[i]
    if i == 0 and isinstance(turn, dict) and turn.get("from") in _MODEL:
        raise RecordError(
            f"turn 0 is an answer of {turn['from']!r} without a question; remove it, or put a question before it"
        )
    if not isinstance(turn, dict) or turn.get("from") not in speakers or not isinstance(turn.get("value"), str):
        raise RecordError(f"turn {i}: expected {{'from': '{speakers[0]}', 'value': text}}, got {turn!r:.60}")
    return check_text(turn["value"], f"turn {i}")
