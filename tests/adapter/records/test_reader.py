"""Records of every format in every file: recognised by their columns, one bad record costing one record."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapter.errors import RecordError
from adapter.records.reader import read_records, recognise

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "i", "input": None, "output": "o"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SAID},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "text": {"text": "t"},
}
RECORDS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "i", "input": "", "output": "o", "image": ""},
    "messages": {"messages": TURNS, "image": ""},
    "sharegpt": {"messages": TURNS, "image": ""},
    "prompt_completion": {"prompt": "p", "completion": "c", "image": ""},
    "text": {"text": "t", "image": ""},
}


def write(path: Path, *rows: Any) -> Path:
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    records = list(read_records(path, **options))
    assert all(record.pop("group", True) for record in records)
    return records


@pytest.mark.parametrize("format", list(ROWS))
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_every_format_is_recognised_by_its_columns(tmp_path: Path, format: str, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", ROWS[format], {**ROWS[format], "id": 7, "other": None})
    assert read(path) == read(path, format=format) == [RECORDS[format]] * 2
    assert recognise(path) == [format]
    if format == "sharegpt":
        assert read(path, format="llava") == [RECORDS[format]] * 2
    for other in ROWS.keys() - {format}:
        rejected = read(path, format=other, keep_rejected=True)
        assert all(re.match(r"the record has no '\w+'; its columns are", record["rejected"]) for record in rejected)
        assert f"it looks like a record of the format {format}" in rejected[0]["rejected"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])  # Parquet has every column in every row, mostly null
def test_records_of_mixed_formats_count_each_by_its_own_columns(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", *ROWS.values(), *reversed(ROWS.values()))
    assert read(path) == [*RECORDS.values(), *reversed(RECORDS.values())]
    assert recognise(path) == list(ROWS)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({**ROWS["alpaca"], "text": "i o"}, "alpaca"),
        ({"prompt": "q", "prompt_id": "7", "messages": TURNS}, "messages"),
        ({"prompt": "q", "text": "t"}, "text"),
        ({"messages": None, **ROWS["prompt_completion"]}, "prompt_completion"),
    ],
)
def test_a_record_with_columns_of_several_formats(tmp_path: Path, row: Any, format: str) -> None:
    assert read(write(tmp_path / "a.jsonl", row)) == [RECORDS[format]]


def test_csv_holds_texts_and_conversations_as_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", {"messages": json.dumps(TURNS), "prompt": "", "completion": ""})
    assert read(path) == [RECORDS["messages"]]
    rows = [{"prompt": 'say "hi",\nplease', "completion": "hi"}, {"prompt": "x", "completion": ""}]
    path = write(tmp_path / "b.csv", *rows)
    assert read(path) == [{**row, "image": ""} for row in rows]


def test_prompts_and_completions_as_turns(tmp_path: Path) -> None:
    earlier = [{"role": "system", "content": "s"}, *TURNS, {"role": "user", "content": "r"}]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": earlier, "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": earlier, "completion": "b"},
    )
    unlearned = [*earlier[:2], {**earlier[2], "weight": 0}, earlier[3]]
    expected = {"messages": [*unlearned, {"role": "assistant", "content": "b"}], "image": ""}
    assert read(path) == [expected, expected]
    asked = read(path, answered=False)
    assert asked == [{**expected, "messages": unlearned}] * 2


def test_columns_with_other_names(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "text": "t", "messages": TURNS} for i in range(2)]
    columns = {"instruction": "question", "output": "answer"}
    expected = [{"instruction": f"q{i}", "input": "", "output": f"a{i}", "image": ""} for i in range(2)]
    for name in ("a.jsonl", "a.parquet"):
        path = write(tmp_path / name, *rows)
        assert read(path, columns=columns) == read(path, columns=columns, format="alpaca") == expected
        assert recognise(path, columns) == ["alpaca"]
        assert read(path, columns={"messages": "messages"}) == [RECORDS["messages"]] * 2
        assert read(path, columns={"prompt": "question", "completion": "text"}, answered=False)[1]["prompt"] == "q1"
    both = write(tmp_path / "b.jsonl", {"instruction": "wrong", "output": "wrong", **rows[0]})
    assert read(both, columns=columns) == expected[:1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_that_the_file_lacks(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, *[{"question": "q", "output": "o"}] * 3)
    columns = {"instruction": "question", "input": "context"}
    with pytest.raises(RecordError, match=rf"{name}: no column 'context', which data\.columns names; its columns a"):
        list(read_records(path, columns=columns, keep_rejected=True))
    if name != "a.jsonl":  # a table says it before its first record
        with pytest.raises(RecordError, match="no column 'context'"):
            next(read_records(path, columns=columns, keep_rejected=True))
    else:  # its records may each have other keys
        write(path, {"question": "q", "output": "o"}, {"question": "q", "context": "c", "output": "o"})
        assert [record["input"] for record in read(path, columns=columns)] == ["", "c"]


BAD = json.dumps({**ROWS["alpaca"], "instruction": "half \ud83d of a pair"})


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"instruction": "i"}', r"the record has no 'output'; its columns are 'instruction'$"),
        ("17", "a record must be an object, got 17"),
        ("{}", "the columns say no format: they are none; expected messages, conversations"),
        ('{"question": "q"}', r"the columns say no format: they are 'question'; .*; data\.columns maps other names"),
        ('{"instruction": "i", "output": 7}', "'output' must be text, got 7"),
        ('{"instruction": "i", "output": NaN}', "'output' must be text, got nan"),
        ('{"instruction": "i", "output": 36893488147419103232}', "'output' must be text, got 36893488147419103232"),
        (f'{{"instruction": "i", "output": {"9" * 5000}}}', "malformed JSON: Exceeds the limit"),
        (BAD, r"'instruction' holds '\\ud83d' at character 6, half of a surrogate pair"),
        ('{"instruction": "i" "output": "o"}', "malformed JSON: Expecting ',' delimiter.*; it begins with"),
        ("{'instruction': 'i', 'output': 'o'}", "malformed JSON"),
        ('{"instruction": "i", "output": "o",}', "malformed JSON"),
        ('{"instruction": "i", "output": ' + "[" * 9999 + "]" * 9999 + "}", "malformed JSON"),
        (b'{"instruction": "caf\xe9", "output": "o"}', "not UTF-8: byte 0xe9 at 21; save the file as UTF-8"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the conversation has no answer"),
        ('{"prompt": "p"}', "the record has no 'completion'; its columns are 'prompt'"),
        ('{"prompt": 3, "completion": "c"}', "'prompt' must be text, got 3"),
        ('{"prompt": "p", "completion": ["c"]}', r"'completion' must be text, got \['c'\]"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": 3}',
            "'completion' must be turns like the",
        ),
        ('{"text": ["t"]}', r"'text' must be text, got \['t'\]"),
    ],
)
def test_one_bad_record_costs_one_record(tmp_path: Path, name: str, bad: str | bytes, message: str) -> None:
    texts = [json.dumps({"instruction": f"do {i}", "output": f"out {i}"}).encode() for i in range(5)]
    texts.insert(3, bad if isinstance(bad, bytes) else bad.encode())
    content = b"[" + b",\n".join(texts) + b"]" if name == "a.json" else b"\n".join(texts)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    records = list(read_records(tmp_path / name, keep_rejected=True))
    rejected = records.pop(3)
    assert [record["output"] for record in records] == [f"out {i}" for i in range(5)]
    place = "item" if name == "a.json" else "line"
    assert rejected["place"] == f"{place} 4"
    assert re.match(message, rejected["rejected"])
    with pytest.raises(RecordError, match=rf"{place} 4: {message}"):
        list(read_records(tmp_path / name))


def test_a_bad_row_of_parquet_costs_one_record(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c", None, b"e"]).cast(pa.binary()).view(pa.string())  # unchecked, as in a file
    pq.write_table(pa.table({"instruction": texts, "output": ["o"] * 5}), tmp_path / "a.parquet")
    records = list(read_records(tmp_path / "a.parquet", format="alpaca", keep_rejected=True))
    assert [record.get("instruction") for record in records] == ["a", None, "c", None, "e"]
    assert [f"{record['place']}: {record['rejected']}" for record in records if "rejected" in record] == [
        "row 1: a value is damaged, or a text is not UTF-8 (Invalid UTF8 sequence at string index 0)",
        "row 3: 'instruction' must be text, got None",
    ]


@pytest.mark.parametrize(("kind", "coded"), [("parquet", False), ("arrow", False), ("arrow", True)])
def test_a_bad_text_of_a_conversation_costs_this_conversation_alone(tmp_path: Path, kind: str, coded: bool) -> None:
    """Its bytes lie beside those of other rows: in lists, in structs, and in the dictionary of a coded column."""
    said = [text for i in range(5) for text in (b"question %d" % i, b"answer %d" % i)]
    texts = pa.array([b"\xff" if text == b"answer 2" else text for text in said]).view(pa.string())
    if coded:
        texts = pa.DictionaryArray.from_arrays(pa.array(range(10)), texts)
    turns = pa.StructArray.from_arrays([pa.array(["user", "assistant"] * 5), texts], ["role", "content"])
    table = pa.table({"messages": pa.ListArray.from_arrays(pa.array(range(0, 12, 2), pa.int32()), turns)})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    records = list(read_records(path, keep_rejected=True))
    assert [record["place"] for record in records if "rejected" in record] == ["row 2"]
    answers = [record["messages"][1]["content"] for record in records if "rejected" not in record]
    assert answers == ["answer 0", "answer 1", "answer 3", "answer 4"]


def test_a_rejected_record_names_its_id(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"id": "x7", "conversations": SAID[:1]})
    (rejected,) = read_records(tmp_path / "a.jsonl", keep_rejected=True)
    assert rejected == {
        "image": "",
        "place": "line 1, id 'x7'",
        "rejected": "the conversation has no answer: no assistant turn follows a user turn",
    }


def test_records_that_are_to_be_answered(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "i"},
        {"instruction": "i", "output": 7},
        {"messages": TURNS[:1]},
        {"messages": TURNS},
        {"conversations": [*SAID, SAID[0]]},
        {"prompt": "p"},
        {"text": "t"},
    )
    records = read(path, answered=False, keep_rejected=True)
    assert records[0] == records[1] == {**RECORDS["alpaca"], "output": ""}
    assert records[2] == {"messages": TURNS[:1], "image": ""}
    assert records[4] == {"messages": [*TURNS, TURNS[0]], "image": ""}
    assert records[5] == {"prompt": "p", "completion": "", "image": ""}
    assert [record.get("rejected", "")[:30] for record in records] == [
        "", "", "", "the conversation ends with an ", "", "", "it is a plain text, which hold",
    ]  # fmt: skip


def test_a_file_of_nothing_usable_has_no_format(tmp_path: Path) -> None:
    assert recognise(write(tmp_path / "a.jsonl", {"question": "q"})) == []
    with pytest.raises(RecordError, match="no such file"):
        recognise(tmp_path / "none.json")
