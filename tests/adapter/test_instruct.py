"""Instruction records: read in bounded memory with errors that say where, encoded so that labels are never lost."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapter import instruct
from adapter.errors import RecordError
from adapter.instruct import ALPACA, PromptTemplate, encode_record, read_records
from adapter.tokenizer import Tokenizer

TEMPLATE = PromptTemplate(with_input="do {instruction} with {input} :", without_input="do {instruction} :")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer(tiny_base)


def record(output: str, input: str = "", instruction: str = "cat") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output, "image": ""}


def test_sequence_is_bos_prompt_output_eos_with_labels_on_output_and_eos(tokenizer: Tokenizer) -> None:
    example = encode_record(record("the red hill"), tokenizer, TEMPLATE)
    prompt = tokenizer.encode("do cat :", bos=True, eos=False)
    assert example.ids[: example.label_start] == prompt
    assert example.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.ids[example.label_start : -1]).strip() == "the red hill"


def test_a_piece_across_the_boundary_leaves_the_prompt_as_generation_sees_it(tokenizer: Tokenizer) -> None:
    glued = PromptTemplate(with_input="{instruction}{input}", without_input="{instruction}")
    example = encode_record(record("at on", instruction="the c"), tokenizer, glued)
    assert example.ids[: example.label_start] == tokenizer.encode("the c", bos=True, eos=False)
    assert example.label_start < len(example.ids)


def test_empty_output_labels_eos(tokenizer: Tokenizer) -> None:
    example = encode_record(record(""), tokenizer, TEMPLATE)
    assert example.ids[example.label_start :] == [tokenizer.eos_id]


def test_too_long_loses_the_left_of_the_input_and_keeps_the_answer(tokenizer: Tokenizer) -> None:
    words = [f"{word}" for word in random.Random(0).choices(["cat", "dog", "hill", "mat"], k=60)]
    whole = record("the red hill", input=" ".join(words))
    example = encode_record(whole, tokenizer, TEMPLATE, max_length=64)
    text = tokenizer.decode(example.ids[: example.label_start])
    assert len(example.ids) <= 64
    assert example.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.ids[example.label_start : -1]).strip() == "the red hill"
    assert text.startswith("do cat with")
    assert " ".join(words[-4:]) in text
    assert len(example.ids) > 48  # no more than needed was dropped


def test_too_long_an_answer_keeps_its_left_and_eos(tokenizer: Tokenizer) -> None:
    whole = encode_record(record("the red hill " * 20), tokenizer, TEMPLATE)
    cut = encode_record(record("the red hill " * 20), tokenizer, TEMPLATE, max_length=33)
    assert cut.ids == [*whole.ids[:32], tokenizer.eos_id]


def test_a_prompt_that_fills_the_window_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RecordError, match="leaves no label within 16"):
        encode_record(record("the", instruction="hill " * 40), tokenizer, TEMPLATE, max_length=16)


def test_alpaca_templates() -> None:
    with_input = ALPACA.render("Add {input}.", "1 {instruction}")
    assert with_input.endswith("### Instruction:\nAdd {input}.\n\n### Input:\n1 {instruction}\n\n### Response:")
    assert "### Input:" not in ALPACA.render("Add.")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"with_input": "{instruction}|{input}", "without_input": "{instruction}|"}))
    assert PromptTemplate.read(path).render("a {x}", "b") == "a {x}|b"
    path.write_text(json.dumps({"with_input": "{instruction}", "without_input": "{instruction}"}))
    with pytest.raises(ValueError, match=r"must contain \{input\}"):
        PromptTemplate.read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"t\.json"):
        PromptTemplate.read(path)


ROWS = [record(f'out {i} "q" é', input="x" * (i % 7), instruction=f"do\n{i}") for i in range(57)]


@pytest.mark.parametrize("read_bytes", [3, 50, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_formats_agree_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, indent: int | None
) -> None:
    monkeypatch.setattr(instruct, "READ_BYTES", read_bytes)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=indent))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        assert list(read_records(tmp_path / name)) == ROWS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"instruction": "i", "output": "o"},\n {"instruction": "i" "output"}]', "item 2: malformed JSON"),
        ("a.json", '[{"instruction": "i", "output": "o"}\n\n', "item 2: malformed JSON: .*premature EOF"),
        ("a.json", '[\n{"instruction": "i", "output": "o"},\n{"instruction": "i"', "item 2: malformed JSON"),
        ("a.json", '{"instruction": "i", "output": "o"}', r"a\.json: .*an object per line belongs in a \.jsonl"),
        ("a.json", '[{"instruction": "i", "output": "o"} 5]', "item 2: malformed JSON"),
        ("a.json", '[{"instruction": "i"}]', "item 1: the record has no 'output'"),
        ("a.json", "[17]", "item 1: a record must be an object"),
        ("a.json", '[{"instruction": "i", "output": "o"}]\n[]', "ends after item 1, but the file goes on"),
        ("a.json", '[{"instruction": "i", "output": "o"}] and more', "ends after item 1, but the file goes on"),
        ("a.json", " []]", "ends after item 0, but the file goes on"),
        ("a.json", "", "expected a JSON array of records; the file is no JSON array"),
        ("a.jsonl", '{"instruction": "i", "output": "o"}\n{"instruction": \n', "line 2: malformed JSON"),
        ("a.jsonl", '\n{"instruction": "i", "output": 7}\n', "line 2: 'output' must be text, got 7"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.csv", "", r"cannot read \.csv; use"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match=message) as error:
        list(read_records(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


def test_missing_file_and_missing_output_where_none_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such file"):
        list(read_records(tmp_path / "none.json"))
    (tmp_path / "a.jsonl").write_text('{"instruction": "i"}\n')
    assert list(read_records(tmp_path / "a.jsonl", answered=False)) == [record("", instruction="i")]


def test_reading_is_bounded_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    rows = json.dumps([record("o" * 1000, instruction=str(i)) for i in range(20_000)])
    (tmp_path / "a.json").write_text(rows)
    size = len(rows)
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read_records(tmp_path / "a.json")) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2
