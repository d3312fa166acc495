"""Read conversations: chat `messages`, and ShareGPT's and LLaVA's `conversations`.

    {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A bird."}, …]}
    {"id": …, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                       {"from": "gpt", "value": "A bird."}, …]}

Both become `{"messages": [{"role", "content", …}, …], "image", "group"}` with the roles system, user, assistant and
tool, in this order: a system turn or none; then user and assistant in turn, where an assistant that called tools is
followed by their results and speaks again. What deviates is put right where its meaning is plain, and otherwise
rejected:

- Consecutive turns of one role are merged, parted by a blank line.
- Turns before the first user turn, and after the last assistant turn, are dropped.
- A system turn in the middle, a tool's result without an assistant before it, an unknown role, and a conversation
  without a user or without an answer are rejected.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from adapter.errors import RecordError
from adapter.json_object import parse_json
from adapter.records.files import check_text

Message = dict[str, Any]

FIRST_DROPPED = "turns dropped before the first question"
LAST_DROPPED = "turns dropped after the last answer"
MERGED = "turns merged with one of the same role before"

_CALL = "function_call"
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    _CALL: "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Names of roles, and the role that each is."""

_TEXTS = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")
"""Further keys of a message that are kept; their values are texts."""

_TAG = "<image>"


def chat_record(row: Mapping[str, Any], turns: Any, *, answered: bool, key: str) -> dict[str, Any]:
    """The record of a conversation.

    turns: the list of turns, or its JSON. answered: False for a conversation that is to be answered, which ends with a
    user's or a tool's turn; what stands after that is not dropped but refused. key: the name of the list in the row.

    Raises RecordError, naming the turn, for a conversation that cannot be used.
    """
    image = row.get("image") or ""
    if not isinstance(image, str):
        raise RecordError(f"'image' must be a path, got {image!r:.60}")
    check_text(image, "'image'")
    if isinstance(turns, str):
        turns = _parse_json(turns, repr(key))
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"{key!r} must be a list of turns, got {turns!r:.60}")
    tagged = bool(image) or key != "messages"
    messages = [_message(turn, i, row, image=image, tagged=tagged) for i, turn in enumerate(turns)]
    if (system := row.get("system")) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(system, "'system'")})
    notes = Counter[str]()
    messages = _ordered(messages, notes, answered=answered)
    group = image or hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
    record: dict[str, Any] = {"messages": messages, "image": image, "group": group}
    if tools := _tools(row.get("tools")):
        record["tools"] = tools
    return {**record, "notes": dict(notes)} if notes else record


def is_message_list(value: Any) -> bool:
    """Return whether a value is a list of turns, and not a text."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) for turn in value)


def _message(turn: Any, i: int, row: Mapping[str, Any], *, image: str, tagged: bool) -> Message:
    """Turn i as a message. tagged: `<image>` in a text stands for the image, and is no text."""
    if not isinstance(turn, Mapping):
        raise RecordError(f"turn {i}: expected {{'role': 'user', 'content': text}}, got {turn!r:.60}")
    named, content = (
        next((turn[name] for name in names if turn.get(name) is not None), None)
        for names in (("role", "from"), ("content", "value"))
    )
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise RecordError(f"turn {i}: unknown role {named!r:.60}; known are {', '.join(_ROLES)}")
    message: Message = {"role": role}
    for name in _TEXTS:
        if turn.get(name) is not None:
            message[name] = check_text(turn[name], f"turn {i}, {name!r}")
    calls = _tool_calls(turn.get("tool_calls"), i)
    if named == _CALL:
        calls, content = _tool_calls(_parse_json(content, f"turn {i}, {_CALL}"), i), None
    if calls:
        if role != "assistant":
            raise RecordError(f"turn {i}: 'tool_calls' of {named!r}; only the assistant calls tools")
        message["tool_calls"] = calls
    if content is None and calls:
        content = ""
    text = _text(content, i, image)
    if tagged and _TAG in text:
        if role == "assistant":
            raise RecordError(f"turn {i}: {_TAG} in an answer")
        if not image:
            raise RecordError(f"turn {i}: speaks of {_TAG}, but the record names no 'image'")
        text = text.replace(_TAG, "").strip()
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise RecordError(f"turn {i}: 'weight' must be 0 or 1, got {weight!r:.60}")
    if weight == 0 and role == "assistant":
        message["weight"] = 0
    return {"role": role, "content": text, **message}


def _text(content: Any, i: int, image: str) -> str:
    """The text of a content, which is a text or a list of parts; a part that is the record's image is left out."""
    if not isinstance(content, list):
        return check_text(content, f"turn {i}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        if kind in ("text", "input_text", "output_text"):
            texts.append(check_text(part.get("text") if isinstance(part, Mapping) else part, f"turn {i}"))
        elif not (image and isinstance(kind, str) and "image" in kind):
            raise RecordError(
                f"turn {i}: a part of the content is {kind!r:.60}; only text is read, and one image by its path in the "
                "record's 'image'"
            )
    return "".join(texts)


def _ordered(messages: Sequence[Message], notes: Counter[str], *, answered: bool) -> list[Message]:
    """The messages in an order that chat templates accept; `notes` counts what was merged and dropped."""
    merged: list[Message] = []
    for i, message in enumerate(messages):
        if merged and _continues(merged[-1], message):
            merged[-1] = _merge(merged[-1], message)
            notes[MERGED] += 1
        elif message["role"] == "system" and merged:
            raise RecordError(f"turn {i}: a system turn stands after others; it belongs at the beginning")
        else:
            merged.append(message)
    system = merged[:1] if merged[0]["role"] == "system" else []
    turns = merged[len(system) :]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        raise RecordError("the conversation has no user turn")
    if first:
        notes[FIRST_DROPPED] += first
    turns = turns[first:]
    if answered:
        end = 1 + max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        if not end:
            raise RecordError("the conversation has no answer: no assistant turn follows a user turn")
        if end < len(turns):
            notes[LAST_DROPPED] += len(turns) - end
        turns = turns[:end]
    elif turns[-1]["role"] == "assistant":
        raise RecordError("the conversation ends with an answer; one to be answered ends with a user turn")
    _check_order(turns)
    return system + turns


def _continues(last: Message, message: Message) -> bool:
    """Return whether a message belongs to the turn before it. Results of tools stay apart, as each answers one call."""
    if last["role"] != message["role"] or last["role"] == "tool":
        return False
    return "tool_calls" not in last or "tool_calls" in message


def _merge(first: Message, second: Message) -> Message:
    """Two messages of one role as one."""
    if first.get("weight") != second.get("weight"):
        raise RecordError(f"consecutive turns of the {first['role']} differ in 'weight'")
    merged = {**second, **first}
    merged["content"] = "\n\n".join(text for text in (first["content"], second["content"]) if text)
    if calls := first.get("tool_calls", []) + second.get("tool_calls", []):
        merged["tool_calls"] = calls
    return merged


def _check_order(turns: Sequence[Message]) -> None:
    """Raise RecordError for a turn that cannot follow the one before it."""
    for before, turn in pairwise(turns):
        role, last = turn["role"], before["role"]
        if role == "tool" and last == "user":
            raise RecordError("a tool's result follows a user turn; it belongs after an assistant's call")
        if role == "user" and last == "tool":
            raise RecordError("a user turn follows a tool's result, which the assistant has not answered")
        if "tool_calls" in before and role != "tool":
            raise RecordError(f"a turn of the {role} follows a tool call without its result")


def _tool_calls(calls: Any, i: int) -> list[dict[str, Any]]:
    """Tool calls as `{"type": "function", "function": {"name", "arguments"}, "id"?}`, with arguments as an object."""
    if isinstance(calls, str):
        calls = _parse_json(calls, f"turn {i}, 'tool_calls'")
    if not calls:
        return []
    parsed = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecordError(f"turn {i}: a tool call is {{'name': …, 'arguments': …}}, got {call!r:.60}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parse_json(arguments, f"turn {i}, 'arguments'")
        parsed_call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str):
            parsed_call["id"] = call["id"]
        parsed.append(_check_json(parsed_call, f"turn {i}, a tool call"))
    return parsed


def _tools(tools: Any) -> list[Any]:
    """The schemas of the tools that a conversation offers."""
    if isinstance(tools, str) and tools.strip():
        tools = _parse_json(tools, "'tools'")
    if not tools:
        return []
    if not isinstance(tools, list):
        raise RecordError(f"'tools' must be a list of schemas, got {tools!r:.60}")
    return [_check_json(tool, "'tools'") for tool in tools]


def _parse_json(text: Any, name: str) -> Any:
    check_text(text, name)
    try:
        return parse_json(text)
    except ValueError as error:
        raise RecordError(f"{name} must be JSON, got {text!r:.60}: {error}") from error


def _check_json(value: Any, name: str) -> Any:
    """The value if it is plain JSON with texts that can be written; Parquet has other types too."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RecordError(f"{name} is no JSON: {error}") from error
    check_text(text, name)
    return value
