"""Chunks of records in a store: sequences with their labels, what was left out, and what a template refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapter.records.encoding import encode_record, encode_text
from adapter.templates import ChatTemplate, Template
from adapter.tokenizers.base import Tokenizer
from adapter.tokenizers.load import load_tokenizer
from rayjobs.config import load
from rayjobs.data import token_store
from rayjobs.data.loader import collate_micro_batch
from rayjobs.data.records import DataConfig
from rayjobs.data.sampler import ElasticBatchSampler, window_micro_batches
from rayjobs.data.token_part import read_index, read_records
from rayjobs.data.token_store import SHORTENED, TOO_LONG, UNLABELLED, TokenStore
from rayjobs.storage.counted_reader import CountedReader
from tests.adapter.chat_templates import GEMMA_RAISES, THINKING


@pytest.fixture
def tokenizer(tiny_base: Path) -> Tokenizer:
    return load_tokenizer(tiny_base)


def talk(*texts: str, system: str = "") -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def write(folder: Path, base: Path, records: list[Any], template: Template, max_length: int = 90) -> dict[str, Any]:
    """The report of a chunk, whose part is then in the folder."""
    (folder / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = load(DataConfig, {"path": str(folder / "r.jsonl")}).sources()
    encoding = token_store._Encoding(tokenizer=str(base), max_length=max_length, val_fraction=0, images=False)
    (batch,) = token_store._read_chunks({"source": sources, "number": [0]})
    report = token_store._write_chunk(batch, folder, [template], encoding, None)
    return {name: value for name, (value,) in report.items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    (part,) = folder.glob("train-*.parquet")
    reader = CountedReader()
    return read_records(read_index(str(folder), [part.name], reader), reader)


def test_sequences_are_those_of_the_library_and_what_they_lost_is_counted(
    tmp_path: Path, tiny_base: Path, tokenizer: Tokenizer
) -> None:
    template = ChatTemplate(source=THINKING)
    records = [talk("cat", "sat"), talk("cat", "sat", "dog", "ran"), talk(*["the cat sat", "on"] * 9, system="big")]
    report = write(tmp_path, tiny_base, records, template, max_length=170)
    examples = [encode_record(record, tokenizer, template, max_length=170) for record in records]
    found = [(row["tokens"], [tuple(span) for span in row["label_spans"]]) for row in rows(tmp_path)]
    assert found == [(example.ids, example.label_spans) for example in examples]
    dropped = examples[2].dropped_turns
    assert 2 <= dropped <= 14
    lost = {SHORTENED: 1, TOO_LONG: dropped, UNLABELLED: 1 + (18 - dropped) // 2 - 1}
    assert json.loads(report["changed_turns"]) == lost


def test_a_long_text_is_several_sequences_of_one_record(tmp_path: Path, tiny_base: Path, tokenizer: Tokenizer) -> None:
    text = {"text": "the cat sat on the red hill " * 50}
    report = write(tmp_path, tiny_base, [text, {"text": "the dog"}], ChatTemplate(source=THINKING))
    parts = encode_text(text, tokenizer, max_length=90)
    assert report["train"] == len(parts) + 1 > 3
    assert [row["tokens"] for row in rows(tmp_path)][:-1] == [part.ids for part in parts]
    assert [row["id"] for row in rows(tmp_path)] == [0] * len(parts) + [1]


def test_what_a_template_refuses_is_one_record_and_its_reason(tmp_path: Path, tiny_base: Path) -> None:
    records = [
        talk("cat", "sat"),
        talk("cat", "sat", system="big"),
        talk("dog", "ran"),
        {"instruction": "a", "output": "b"},
    ]
    report = write(tmp_path, tiny_base, records, ChatTemplate(source=GEMMA_RAISES))
    (rejected,) = json.loads(report["rejected"])
    assert (rejected["record"], rejected["reason"]) == (
        "record 2",
        "the chat template refuses the conversation: System role not supported",
    )
    assert rejected["messages"] == records[1]["messages"]
    assert report["train"] == 3
    broken = write(tmp_path, tiny_base, records[:1], ChatTemplate(source="{{ 1 / 0 }}"))
    assert "the chat template fails on the conversation: ZeroDivisionError" in broken["rejected"]


def test_micro_batches_label_every_answer(tmp_path: Path, tiny_base: Path, tokenizer: Tokenizer) -> None:
    records = [talk("cat", "sat", "dog", "ran"), talk("the hill", "red")]
    write(tmp_path, tiny_base, records, ChatTemplate(source=GEMMA_RAISES))
    (part,) = tmp_path.glob("train-*.parquet")
    store = TokenStore(folder=str(tmp_path), parts={"train": [(part.name, 2)], "val": []}, rejected=0)
    order = ElasticBatchSampler(
        store=store, split="train", global_batch=2, token_budget=999, shuffle_records=2, seed=None
    )
    (table,) = window_micro_batches({"epoch": [0], "window": [0]}, order, range(1), 0, 1)
    (micro,) = map(collate_micro_batch, table.to_pylist())
    examples = {tuple(row["tokens"]): row["label_spans"] for row in rows(tmp_path)}
    for tokens, labels in zip(micro.tokens.tolist(), micro.labels.tolist(), strict=True):
        spans = next(spans for ids, spans in examples.items() if tuple(tokens[: len(ids)]) == ids)
        inside = {i for start, end in spans for i in range(start, end)}
        assert labels == [token if i in inside else -100 for i, token in enumerate(tokens)]
    assert micro.step_labels == sum(end - start for spans in examples.values() for start, end in spans)
