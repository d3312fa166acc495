"""Conversations: every spelling of them becomes the same messages, and what cannot be used says which turn and why."""

import json
from typing import Any

import pytest

from adapter.errors import RecordError
from adapter.records.chat import FIRST_DROPPED, LAST_DROPPED, MERGED, chat_record

SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def turns(said: str) -> list[dict[str, Any]]:
    """ "s u a" as messages: each word is a role's first letter, and its place is the text."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[letter], "content": f"{letter}{i}"} for i, letter in enumerate(said.split())]


def sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"from": SHAREGPT[message["role"]], "value": message["content"]} for message in messages]


def read(messages: Any, answered: bool = True, key: str = "messages", **row: Any) -> dict[str, Any]:
    return chat_record(row, messages, answered=answered, key=key)


def short(record: dict[str, Any]) -> str:
    return " ".join(message["content"].replace("\n\n", "+") for message in record["messages"])


@pytest.mark.parametrize(
    ("said", "left", "notes"),
    [
        ("u a", "u0 a1", {}),
        ("s u a u a u a", "s0 u1 a2 u3 a4 u5 a6", {}),
        ("u a t a", "u0 a1 t2 a3", {}),
        ("u a t t a u a", "u0 a1 t2 t3 a4 u5 a6", {}),
        ("a u a", "u1 a2", {FIRST_DROPPED: 1}),
        ("s a u a", "s0 u2 a3", {FIRST_DROPPED: 1}),
        ("a t a u a", "u3 a4", {FIRST_DROPPED: 3}),
        ("u a u", "u0 a1", {LAST_DROPPED: 1}),
        ("u a t", "u0 a1", {LAST_DROPPED: 1}),
        ("u a t u", "u0 a1", {LAST_DROPPED: 2}),
        ("u u a a a u a", "u0+u1 a2+a3+a4 u5 a6", {MERGED: 3}),
        ("s s u a", "s0+s1 u2 a3", {MERGED: 1}),
        ("a a u u a u u", "u2+u3 a4", {MERGED: 3, FIRST_DROPPED: 1, LAST_DROPPED: 1}),
    ],
)
def test_what_is_kept_merged_and_dropped(said: str, left: str, notes: dict[str, int]) -> None:
    record = read(turns(said))
    assert short(record) == left
    assert record.get("notes", {}) == notes
    same = read(sharegpt(turns(said)), key="conversations")
    assert (same["messages"], same.get("notes", {})) == (record["messages"], notes)


@pytest.mark.parametrize(
    ("said", "left"),
    [("u", "u0"), ("s u a u", "s0 u1 a2 u3"), ("u a t", "u0 a1 t2"), ("a u", "u1"), ("u a u u", "u0 a1 u2+u3")],
)
def test_a_conversation_to_be_answered_ends_with_what_is_to_be_answered(said: str, left: str) -> None:
    assert short(read(turns(said), answered=False)) == left
    with pytest.raises(RecordError, match="ends with an answer"):
        read(turns(f"{said} a"), answered=False)


@pytest.mark.parametrize("name", ["human", "user"])
@pytest.mark.parametrize("answerer", ["gpt", "chatgpt", "bing", "bard", "assistant", "model"])
def test_roles_by_all_their_names(name: str, answerer: str) -> None:
    said = [{"from": "developer", "value": "s"}, {"from": name, "value": "q"}, {"from": answerer, "value": "a"}]
    roles = [{"role": turn["from"], "content": turn["value"]} for turn in said]
    expected = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "a"))]
    assert read(said)["messages"] == read(roles)["messages"] == read(json.dumps(said))["messages"] == expected


def test_content_in_parts_and_an_image_in_llavas_way() -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "image", "image": None}, "is it?"]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A bird."}]}]
    record = read(said, image="a/b.jpg")
    assert [message["content"] for message in record["messages"]] == ["What is it?", "A bird."]
    assert (record["image"], record["group"]) == ("a/b.jpg", "a/b.jpg")
    tagged = sharegpt([{"role": "user", "content": "<image>\nWhat is it?"}, said[1] | {"content": "A bird."}])
    assert read(tagged, key="conversations", image="a/b.jpg") == record
    with pytest.raises(RecordError, match="turn 0: a part of the content is 'image'; only text is read, and one image"):
        read(said)
    plain = read([{"role": "user", "content": "Draw <image> in SVG"}, turns("u a")[1]])
    assert plain["messages"][0]["content"] == "Draw <image> in SVG"  # without an image it is a text like others


def test_conversations_of_one_content_or_one_image_are_one_group() -> None:
    one, other = read(turns("u a")), read(turns("u a u a"))
    assert one["group"] == read(sharegpt(turns("u a")), key="conversations")["group"] != other["group"]
    assert read(turns("u a"), image="i")["group"] == read(turns("u a u a"), image="i")["group"]


WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "days": [1, None]}}}


def test_tool_calls_in_every_spelling() -> None:
    inner = WEATHER["function"]
    as_text = {"name": "weather", "arguments": json.dumps(inner["arguments"])}
    spelled = [
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": as_text, "id": None}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([inner])},
        {"from": "function_call", "value": json.dumps(inner)},
        {"from": "function_call", "value": json.dumps(as_text)},
    ]
    rest = [{"role": "tool", "content": "sunny", "tool_call_id": "7"}, {"role": "assistant", "content": "Sun."}]
    for call in spelled:
        record = read([{"role": "user", "content": "q"}, call, *rest], tools=json.dumps([{"name": "weather"}]))
        assert record["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [WEATHER]}
        assert record["messages"][2:] == rest
        assert record["tools"] == [{"name": "weather"}]
    both = read([{"role": "user", "content": "q"}, turns("a")[0], spelled[0], spelled[3], *rest])
    assert both["messages"][1] == {"role": "assistant", "content": "a0", "tool_calls": [WEATHER, WEATHER]}
    assert both["notes"] == {MERGED: 2}


def test_a_system_text_beside_the_turns_and_answers_that_are_not_learned() -> None:
    said = turns("u a u a")
    said[1]["weight"] = 0
    record = read(said, system="Be brief.")
    assert record["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [message.get("weight") for message in record["messages"]] == [None, None, 0, None, None]
    assert read(turns("s u a"), system="Be brief.")["messages"] == read(turns("s u a"))["messages"]


CALL = {"role": "assistant", "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (3, "'messages' must be a list of turns, got 3"),
        ([], "'messages' must be a list of turns"),
        ("hello", "'messages' must be JSON, got 'hello'"),
        ("[" * 9999, "'messages' must be JSON"),
        ([3], "turn 0: expected {'role': 'user', 'content': text}, got 3"),
        ([*turns("u"), {}], "turn 1: unknown role None"),
        ([*turns("u"), {"role": "narrator", "content": "x"}], "turn 1: unknown role 'narrator'; known are system, dev"),
        ([*turns("u"), {"role": ["user"], "content": "x"}], r"turn 1: unknown role \['user'\]"),
        ([*turns("u"), {"role": "assistant", "content": None}], "turn 1 must be text, got None"),
        ([*turns("u"), {"role": "assistant", "content": {"a": 1}}], "turn 1 must be text, got {'a': 1}"),
        (
            [*turns("u"), {"role": "assistant", "content": "a \ud83d"}],
            r"turn 1 holds '\\ud83d' at character 3, half of",
        ),
        ([*turns("u a"), {"role": "tool", "content": "x", "name": "\ud83d"}], r"turn 2, 'name' holds '\\ud83d'"),
        ([*turns("u"), {"role": "user", "content": [{"type": "text"}]}], "turn 1 must be text, got None"),
        ([*turns("u"), {"role": "user", "content": [{"type": "audio"}]}], "turn 1: a part of the content is 'audio'"),
        (turns("u"), "has no answer: no assistant turn follows a user turn"),
        (turns("s u"), "has no answer"),
        (turns("a u"), "has no answer"),
        (turns("s"), "has no user turn"),
        (turns("s a a"), "has no user turn"),
        (turns("u s a"), "turn 1: a system turn stands after others; it belongs at the beginning"),
        (turns("u a s u a"), "turn 2: a system turn stands after others"),
        (turns("u t a"), "a tool's result follows a user turn"),
        (turns("u a t u a"), "a user turn follows a tool's result, which the assistant has not answered"),
        ([*turns("u"), CALL, *turns("u a")], "a turn of the user follows a tool call without its result"),
        ([*turns("u"), CALL, *turns("a")], "a turn of the assistant follows a tool call without its result"),
        ([{**CALL, "role": "user", "content": "x"}, *turns("a")], "turn 0: 'tool_calls' of 'user'; only the assistant"),
        ([*turns("u"), {"role": "gpt", "tool_calls": [{"f": 1}]}], "turn 1: a tool call is {'name'"),
        (
            [*turns("u"), {"from": "function_call", "value": "f(x)"}],
            r"turn 1, function_call must be JSON, got 'f\(x",
        ),
        ([*turns("u"), {"from": "function_call", "value": "3"}], "turn 1: a tool call is {'name'"),
        (
            [*turns("u"), {"role": "gpt", "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]}],
            r"a tool call holds '\\ud83d'",
        ),
        ([*turns("u"), {"role": "gpt", "tool_calls": [{"name": "f", "arguments": {"a": b"x"}}]}], "a tool call is no"),
        ([*turns("u"), turns("a")[0] | {"weight": 2}], "turn 1: 'weight' must be 0 or 1, got 2"),
        ([*turns("u"), turns("a")[0] | {"weight": 0}, *turns("a")], "consecutive turns of the assistant differ in 'we"),
    ],
)
def test_what_cannot_be_used_says_which_turn_and_why(said: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(said)


@pytest.mark.parametrize(
    ("said", "row", "message"),
    [
        (
            [{"content": "<image> q", "role": "user"}, *turns("a")],
            {},
            "turn 0: speaks of <image>, but the record names",
        ),
        ([*turns("u"), {"role": "assistant", "content": "b <image>"}], {"image": "i"}, "turn 1: <image> in an"),
        (turns("u a"), {"image": 3}, "'image' must be a path, got 3"),
        (turns("u a"), {"image": "\ud83d"}, "'image' holds"),
        (turns("u a"), {"tools": {"a": 1}}, "'tools' must be a list"),
        (turns("u a"), {"tools": "weather"}, "'tools' must be JSON"),
        (turns("u a"), {"system": 3}, "'system' must be text, got 3"),
    ],
)
def test_what_stands_beside_the_turns_is_checked(said: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(said, key="conversations", **row)
