import json

import pytest

from adapter.conversation import read_conversations
from adapter.instruct import RecordError


def turns(*said):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]


def write(path, *rows):
    path.write_text(json.dumps(rows))
    return path


def test_every_answer_is_a_record_with_the_turns_before_it(tmp_path):
    path = write(
        tmp_path / "a.json",
        {"id": "1", "image": "a/b.jpg", "conversations": turns("<image>\nWhat is it?", "A bird.", "Red?", "Yes.")},
        {"id": "2", "conversations": turns("Hello", "Hi.")},
    )
    assert list(read_conversations(path)) == [
        {"instruction": "What is it?", "input": "", "output": "A bird.", "image": "a/b.jpg"},
        {"instruction": "Red?", "input": "What is it?\nA bird.", "output": "Yes.", "image": "a/b.jpg"},
        {"instruction": "Hello", "input": "", "output": "Hi.", "image": ""},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1}, "a list of 'conversations'"),
        ({"conversations": []}, "a list of 'conversations'"),
        ({"conversations": turns("a", "b", "c")}, "the last of 3 turns has no answer"),
        ({"conversations": turns("a", "b")[::-1]}, "turn 0: expected {'from': 'human'"),
        ({"conversations": turns("<image> a", "b")}, "turn 0: speaks of <image>, but"),
        ({"image": 3, "conversations": turns("a", "b")}, "'image' must be a path, got 3"),
        ({"conversations": [{"from": "human", "value": 3}, {}]}, "turn 0: expected"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, row, message):
    with pytest.raises(RecordError, match=rf"a\.json, line 1.*{message}"):
        list(read_conversations(write(tmp_path / "a.json", row)))
