"""example-data: the same records in every format, photos of each class, and models that the jobs can read."""

from pathlib import Path

import pytest

from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.data.records import RecordsConfig
from rayjobs.demo import example_data
from rayjobs.demo.config import TinyClipConfig, TinyLlamaConfig
from rayjobs.demo.notes import NAMES, SPELL, is_test
from rayjobs.models.base_model import BaseModelConfig


def test_records_are_the_same_in_every_format_and_what_exists_stays(tmp_path: Path) -> None:
    tiny = TinyLlamaConfig(steps=2), TinyClipConfig(steps=1)
    example_data.write_example_data(tmp_path / "a b", *tiny)
    folder = tmp_path / "a b" / "records"
    read = {
        name: list(load(RecordsConfig, {"path": str(folder / name)}).sources()[0].read())
        for name in ("train.json", "train.jsonl", "train.csv", "train.parquet", "chats.jsonl", "test.json")
    }
    assert len(read["train.json"]) == example_data.RECORDS
    for name in ("train.jsonl", "train.csv", "train.parquet"):
        assert read[name] == read["train.json"]
    for chat, record in zip(read["chats.jsonl"], read["train.json"], strict=True):
        asked, answered = (message["content"] for message in chat["messages"])
        assert (asked, answered) == (f"{record['instruction']} {record['input']}", record["output"])
    assert all(record["output"] == SPELL.answer(record["input"]) for record in read["test.json"])
    assert all(is_test(record["input"]) for record in read["test.json"])
    assert not any(is_test(record["input"]) for record in read["train.json"])
    photos = {path.parent.name: path.read_bytes() for path in sorted((tmp_path / "a b" / "photos").rglob("*.png"))}
    assert set(photos) == set(NAMES)
    checkpoint, _ = load(BaseModelConfig, {"path": str(tmp_path / "a b" / "base")}).open()
    assert checkpoint.config.n_layers == TinyLlamaConfig().n_layers
    changed = folder / "train.json"
    changed.write_text("mine")
    example_data.write_example_data(tmp_path / "a b", *tiny)
    assert changed.read_text() == "mine"


def test_the_command_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example_data, "write_example_data", lambda folder: [(str(folder), "all of it")])
    assert main(["example-data"]) == 0
    assert "examples" in (shown := capsys.readouterr().out)
    assert "all of it" in shown
