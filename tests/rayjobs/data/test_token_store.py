"""Chunks of records on their way into a store: what is counted, how records are named, and on which side they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapter.records.chat import FIRST_DROPPED, LAST_DROPPED, MERGED
from adapter.templates import ALPACA
from rayjobs.config import load
from rayjobs.data import token_store
from rayjobs.data.records import DataConfig
from rayjobs.storage.files import read_parquet


def talk(said: str, text: str = "the cat") -> dict[str, Any]:
    roles = {"u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[letter], "content": f"{text} {i}"} for i, letter in enumerate(said)]}


def write_chunks(folder: Path, base: Path, path: Path, val_fraction: float = 0) -> list[dict[str, Any]]:
    """The reports of all chunks of a source, whose parts are then in the folder."""
    data = load(DataConfig, {"path": str(path), "val_fraction": val_fraction})
    encoding = token_store._Encoding(tokenizer=str(base), max_length=512, val_fraction=val_fraction, images=False)
    batches = token_store._read_chunks({"source": data.sources(), "number": [0]})
    written = (token_store._write_chunk(batch, folder, [ALPACA], encoding, None) for batch in batches)
    return [{name: value for name, (value,) in report.items()} for report in written]


def test_what_happened_to_conversations_is_counted_and_bad_ones_are_named(tmp_path: Path, tiny_base: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    good = [talk("auua"), talk("uaaauu"), {"text": "the dog"}, {"prompt": "the", "completion": "hill"}]
    (records / "a.jsonl").write_text("\n".join(map(json.dumps, [*good, talk("uu")])))
    (records / "b.json").write_text(json.dumps([{"instruction": "cat", "output": "dog"}, {"id": 3, **talk("aa")}]))
    (report,) = write_chunks(tmp_path, tiny_base, records)
    assert (report["records"], report["train"], report["val"]) == (7, 5, 0)
    assert json.loads(report["changed_turns"]) == {FIRST_DROPPED: 1, LAST_DROPPED: 1, MERGED: 4}
    rejected = json.loads(report["rejected"])
    assert [(row["file"], row["record"], row["reason"]) for row in rejected] == [
        (str(records), "a.jsonl, line 5", "the conversation has no answer: no assistant turn follows a user turn"),
        (str(records), "b.json, item 2, id 3", "the conversation has no user turn"),
    ]
    (part,) = tmp_path.glob("train-*.parquet")
    assert read_parquet(part)["id"].to_pylist() == [0, 1, 2, 3, 5]


def test_equal_records_of_every_format_are_on_one_side(tmp_path: Path, tiny_base: Path) -> None:
    rows: list[dict[str, Any]] = []
    for i in range(20):
        messages = talk("ua", f"cat {i}")["messages"]
        said = [{"from": turn["role"], "value": turn["content"]} for turn in messages]
        rows += [{"messages": messages}, {"conversations": said}]  # one conversation in two spellings
        rows += [{"text": f"dog {i}"}] * 2 + [{"prompt": f"hill {i}", "completion": "mat"}] * 2
        rows += [{"instruction": f"cat {i}", "output": "dog"}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_chunks(tmp_path, tiny_base, tmp_path / "a.jsonl", val_fraction=0.4)
    sides = {
        side: read_parquet(next(tmp_path.glob(f"{side}-*.parquet")))["id"].to_pylist() for side in ("train", "val")
    }
    assert sorted(sides["train"] + sides["val"]) == list(range(len(rows)))
    for ids in sides.values():
        assert {id ^ 1 for id in ids} == set(ids)  # a record and its duplicate differ in the last bit of their ids
        assert {id % 8 // 2 for id in ids} == {0, 1, 2, 3}  # each format is on both sides


def test_records_of_val_path_are_for_validation(tmp_path: Path, tiny_base: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(talk("ua")))
    data = load(DataConfig, {"path": [], "val_path": str(tmp_path / "a.jsonl")})
    encoding = token_store._Encoding(tokenizer=str(tiny_base), max_length=512, val_fraction=0, images=False)
    (batch,) = token_store._read_chunks({"source": data.val_sources(), "number": [0]})
    written = token_store._write_chunk(batch, tmp_path, [ALPACA], encoding, None)
    assert (written["train"], written["val"]) == ([0], [1])


@pytest.mark.ray
def test_this_process_makes_a_small_store_as_ray_data_does(
    tmp_path: Path, tiny_base: Path, records: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, contents = load(DataConfig, {"path": str(records), "val_fraction": 0.2}), []
    for limit in (token_store.SMALL_BYTES, 0):
        monkeypatch.setattr(token_store, "SMALL_BYTES", limit)
        store = token_store.prepare_tokens(data, tiny_base, tmp_path / str(limit))
        contents.append({file.name: file.read_bytes() for file in Path(store.folder).iterdir()})
    assert len(contents[0]) >= 4
    assert contents[0] == contents[1]
