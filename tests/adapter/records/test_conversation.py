import json
import re

import pytest

from adapter.errors import RecordError
from adapter.records.conversation import read_conversations


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
    first, second, third = read_conversations(path)
    assert first == {
        "instruction": "What is it?", "input": "", "output": "A bird.", "image": "a/b.jpg", "group": "a/b.jpg",
    }  # fmt: skip
    assert second == {**first, "instruction": "Red?", "input": "What is it?\nA bird.", "output": "Yes."}
    alone = {"instruction": "Hello", "input": "", "output": "Hi.", "image": ""}
    assert {name: third[name] for name in alone} == alone


def test_records_of_one_conversation_are_one_group(tmp_path):
    talk = {"conversations": turns("Hello", "Hi.", "Red?", "Yes.")}
    groups = [record["group"] for record in read_conversations(write(tmp_path / "a.json", talk, RAW, talk))]
    assert groups[:2] == groups[3:]
    assert groups[2] != groups[0] == groups[1]


def test_a_system_turn_stands_before_all_others(tmp_path):
    row = {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hello", "Hi.", "Red?", "Yes.")]}
    records = list(read_conversations(write(tmp_path / "a.json", row)))
    assert [record["input"] for record in records] == ["Be brief.", "Be brief.\nHello\nHi."]


RAW = {"id": "x7", "conversations": turns("a", "b")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": 3}, "a list of 'conversations'"),
        ({"conversations": []}, "a list of 'conversations'"),
        ({"conversations": turns("a", "b", "c")}, "the last of 3 turns has no answer"),
        ({"conversations": turns("a", "b")[::-1]}, "turn 0 is an answer of 'gpt' without a question; remove it"),
        ({"conversations": turns("a", "b", "c")[1:]}, "turn 0 is an answer of 'gpt' without a question"),
        ({"conversations": turns("a", "b", "c", "d")[1:]}, "turn 0 is an answer of 'gpt' without a question"),
        ({"conversations": turns("a \ud83d", "b")}, r"turn 0 holds '\\ud83d' at character 3, half of a surrogate pair"),
        ({"conversations": None, "messages": []}, "chat 'messages' are not read; rewrite them as 'conversations'"),
        ({"conversations": None, "instruction": "i", "output": "o"}, "an instruction record, which the format alpaca"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "the last of 1 turns has no answer"),
        ({"conversations": [*turns("a", "b"), {"from": "system", "value": "s"}, *turns("c")]}, "turn 2: expected"),
        ({"conversations": turns("<image> a", "b")}, "turn 0: speaks of <image>, but"),
        ({"image": "i", "conversations": turns("<image> a", "b <image>")}, "turn 1: <image> in an answer"),
        ({"image": 3, "conversations": turns("a", "b")}, "'image' must be a path, got 3"),
        ({"conversations": [{"from": "human", "value": 3}, {}]}, "turn 0: expected"),
    ],
)
def test_an_odd_conversation_is_rejected_with_its_place_and_reason(tmp_path, row, message):
    first, odd, last = read_conversations(write(tmp_path / "a.json", RAW, {**RAW, **row}, RAW))
    assert first == last
    assert odd["place"] == "item 2, conversation 1, id 'x7'"
    assert re.search(message, odd["rejected"])
    assert not odd["output"]


def test_what_is_no_list_of_conversations_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"conversations": [')
    with pytest.raises(RecordError, match=r"a\.json, item 1: malformed JSON"):
        list(read_conversations(tmp_path / "a.json"))
    (odd,) = read_conversations(write(tmp_path / "a.json", "text"))
    assert (odd["place"], odd["rejected"][:29]) == ("item 1, conversation 0", "a conversation is an object w")
    (tmp_path / "a.json").write_text("""[{"a" 1}, {'a'}]""")
    first, second = read_conversations(tmp_path / "a.json")
    assert [first["place"], second["place"]] == ["item 1, conversation 0", "item 2, conversation 1"]
    assert all("malformed JSON" in record["rejected"] for record in (first, second))
