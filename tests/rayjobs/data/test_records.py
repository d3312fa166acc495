"""Sources of records in their formats: what is read, with which template, from where images come."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapter.errors import RecordError
from adapter.records.scienceqa import read_problem_records, read_problems
from rayjobs.config import load
from rayjobs.data.records import DataConfig, set_names
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
    assert [record["output"] for record in alpaca.read()] == ["o"]
    assert [record["image"] for record in qa.read()] == ["", "images/train/1/image.png"]
    assert len(list(val.read())) == 1
    assert (qa.image_paths(), talk.image_paths()) == (["images/train/1/image.png"], ["x.jpg"])
    assert (qa.images, talk.images, alpaca.images) == (str(folder / "qa"), "/images", str(folder))
    assert [Path(file).name for file in qa.files] == ["problems.json", "pid_splits.json"]


def test_errors_of_a_source_name_its_key() -> None:
    with pytest.raises(ConfigError, match=r"path\.0.*fromat"):
        load(DataConfig, {"path": [{"path": "a", "fromat": "llava"}]})
    with pytest.raises(ConfigError, match=r"path\.0.*weight"):
        load(DataConfig, {"path": [{"path": "a", "weight": 0}]})


@pytest.fixture
def faulty(folder: Path) -> Path:
    """In each format, records of which the second is bad."""
    half = "half \ud83d of a pair"
    rows = [
        {"instruction": "i", "output": "o"},
        {"instruction": half, "output": "o"},
        {"instruction": "j", "output": "p"},
    ]
    (folder / "bad.json").write_text(json.dumps(rows))
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows[1]["instruction"] = None
    pq.write_table(pa.Table.from_pylist(rows), folder / "bad.parquet")
    talks = [
        {"conversations": [{"from": "human", "value": v}, {"from": "gpt", "value": "a"}]} for v in ("q", half, "r")
    ]
    (folder / "talks.json").write_text(json.dumps(talks))
    problems = json.loads((folder / "qa" / "problems.json").read_text())
    problems |= {"3": {**problems["1"], "question": half}, "4": {**problems["1"], "subject": ["science"]}}
    (folder / "qa" / "problems.json").write_text(json.dumps(problems))
    (folder / "qa" / "pid_splits.json").write_text(json.dumps({"train": ["1", "3", "2"], "val": ["1", "4", "5"]}))
    return folder


@pytest.mark.parametrize(
    ("source", "format", "split", "place", "reason"),
    [
        ("bad.json", "alpaca", None, "item 2", "'instruction' holds '\\ud83d' at character 6"),
        ("bad.jsonl", "alpaca", None, "line 2", "'instruction' holds '\\ud83d' at character 6"),
        ("bad.parquet", "alpaca", None, "row 1", "'instruction' must be text, got None"),
        ("talks.json", "llava", None, "item 2", "turn 0 holds '\\ud83d' at character 6"),
        ("qa", "scienceqa", "train", "problem 3", "'question' holds '\\ud83d' at character 6"),
        ("qa", "scienceqa", "val", "problem 4", "'subject' must be one of natural science"),
    ],
)
def test_one_bad_record_costs_one_record_in_every_format(
    faulty: Path, source: str, format: str, split: str | None, place: str, reason: str
) -> None:
    config = {"path": [{"path": str(faulty / source), "format": format, "split": split}]}
    records = list(load(DataConfig, config).sources()[0].read())
    assert len(records) == 3
    assert ["rejected" in record for record in records] == [False, True, split == "val"]
    assert records[1]["place"] == place
    assert records[1]["rejected"].startswith(reason)
    assert all("image" in record for record in records)
    json.dumps(records, ensure_ascii=False).encode()  # rejected.jsonl can be written


def test_a_measurement_on_scienceqa_is_not_of_a_part_of_the_split(faulty: Path) -> None:
    with pytest.raises(RecordError, match=r"problems\.json, problem 3: 'question' holds"):
        read_problems(faulty / "qa", "train")
    with pytest.raises(RecordError, match=r"pid_splits\.json: no split 'test'"):
        list(read_problem_records(faulty / "qa", "test"))


def test_sets_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path: Path) -> None:
    def names(*paths: str) -> list[str]:
        sources = DataConfig(path=[str(tmp_path / path) for path in paths]).sources()
        return set_names(sources)

    assert names("a.json") == ["a.json"]
    assert names("x/a.json", "x/b.json") == ["a.json", "b.json"]
    assert names("x/a.json", "y/a.json", "y/b.json") == ["x/a.json", "y/a.json", "y/b.json"]
    assert [name[-10:] for name in names("x/a.json", "x/a.json")] == ["a.json (1)", "a.json (2)"]
    splits = DataConfig(path=[{"path": str(tmp_path), "split": split} for split in ("train", "other")]).sources()
    assert set_names(splits) == [f"{tmp_path.name} train", f"{tmp_path.name} other"]
