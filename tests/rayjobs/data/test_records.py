"""Sources of records in their formats: what is read, with which template, from where images come."""

import json
from pathlib import Path

import pytest

from adapter.instruct import ALPACA
from adapter.scienceqa import TEMPLATE
from rayjobs.config import load
from rayjobs.data.records import DataConfig
from rayjobs.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    problem = {"question": "q", "choices": ["a", "b"], "answer": 1, "hint": "", "image": "image.png"}
    problem |= {"subject": "natural science", "grade": "grade1", "split": "train"}
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa" / "problems.json").write_text(json.dumps({"1": problem, "2": {**problem, "image": None}}))
    (tmp_path / "qa" / "pid_splits.json").write_text(json.dumps({"train": ["2", "1"], "val": ["1"]}))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}] * 2
    (tmp_path / "talk.json").write_text(json.dumps([{"image": "x.jpg", "conversations": turns}]))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "i", "output": "o"}]))
    return tmp_path


def test_formats_mix_with_their_own_templates_images_and_weights(folder: Path) -> None:
    data = load(
        DataConfig,
        {
            "path": [
                str(folder / "alpaca.json"),
                {"path": str(folder / "qa"), "format": "scienceqa", "weight": 2},
                {"path": str(folder / "talk.json"), "format": "llava", "images": "/images"},
            ],
            "val_path": [{"path": str(folder / "qa"), "format": "scienceqa"}],
        },
    )
    alpaca, qa, talk = data.sources()
    (val,) = data.val_sources()
    assert [source.weight for source in (alpaca, qa, talk)] == [1, 2, 1]
    assert [source.split for source in (alpaca, qa, talk, val)] == ["", "train", "", "val"]
    assert [source.template for source in (alpaca, qa, talk)] == [ALPACA, TEMPLATE, ALPACA]
    assert [record["output"] for record in alpaca.read()] == ["o"]
    assert [record["image"] for record in qa.read()] == ["", "images/train/1/image.png"]
    assert len(list(val.read())) == 1
    assert (qa.image_paths(), talk.image_paths()) == (["images/train/1/image.png"], ["x.jpg"])
    assert (qa.images, talk.images, alpaca.images) == (str(folder / "qa"), "/images", str(folder))
    assert [file.name for file in qa.files] == ["problems.json", "pid_splits.json"]


def test_one_format_and_template_for_all(folder: Path) -> None:
    data = load(DataConfig, {"path": [str(folder / "qa")], "format": "scienceqa", "template": "alpaca"})
    assert data.sources()[0].template == ALPACA
    (folder / "t.json").write_text(json.dumps({"with_input": "{instruction}{input}", "without_input": "{instruction}"}))
    data = load(DataConfig, {"path": [str(folder / "alpaca.json")], "template": str(folder / "t.json")})
    assert data.sources()[0].template.render("x", "y") == "xy"


def test_errors_of_a_source_name_its_key() -> None:
    with pytest.raises(ConfigError, match=r"path\.0.*fromat"):
        load(DataConfig, {"path": [{"path": "a", "fromat": "llava"}]})
    with pytest.raises(ConfigError, match=r"path\.0.*weight"):
        load(DataConfig, {"path": [{"path": "a", "weight": 0}]})
