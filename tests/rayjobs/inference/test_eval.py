"""adapter-eval: what cannot be measured is refused before a worker starts, and training records are named."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from adapter.records.scienceqa import read_problems
from rayjobs.config import load
from rayjobs.data.records import RecordsConfig
from rayjobs.inference.scienceqa import rejected_problems
from rayjobs.inference.training_records import describe_overlap
from rayjobs.jobs import adapter_eval
from rayjobs.storage.files import read_json, read_jsonl, write_json, write_jsonl
from rayjobs.storage.yaml_file import write_yaml
from tests.rayjobs.colour_questions import write_base, write_questions


def settings(base: Path, data: Any, tmp_path: Path, **more: Any) -> adapter_eval.Config:
    run = {"name": "eval", "storage": str(tmp_path / "runs")}
    return load(adapter_eval.Config, {"base": {"path": str(base)}, "data": data, "run": run, **more})


def train(folder: Path, base: Path, data: dict[str, Any]) -> str:
    """An adapter with the settings of the run that left it."""
    model = AdaptedModel.from_pretrained(base)
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    model.save_adapter(folder / "adapter.safetensors")
    write_yaml(folder / "config.yaml", {"base": {"path": str(base)}, "data": data})
    return str(folder / "adapter.safetensors")


def test_records_that_the_adapter_was_trained_on_are_known_by_content(
    tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    adapter = train(tmp_path / "run", tiny_base, {"path": [str(records)], "val_fraction": 0.1})
    moved = shutil.copy(records, tmp_path / "moved.jsonl")
    write_jsonl(tmp_path / "other.jsonl", read_jsonl(records)[1:])

    def overlap(*paths: Any, adapter: str | None = adapter, **more: Any) -> str:
        return describe_overlap(adapter, load(RecordsConfig, {"path": list(paths), **more}).sources())

    assert f"trained on {moved}, by the settings beside it" in overlap(str(tmp_path / "other.jsonl"), str(moved))
    assert overlap(str(tmp_path / "other.jsonl")) == ""
    assert overlap(str(moved), adapter=None) == ""
    questions = write_questions(tmp_path / "questions", {"train": 3, "test": 3})
    adapter = train(tmp_path / "run", tiny_base, {"path": [str(questions)], "format": "scienceqa"})
    assert f"{questions} (train)" in overlap(str(questions), adapter=adapter, format="scienceqa")
    assert overlap({"path": str(questions), "split": "test"}, adapter=adapter, format="scienceqa") == ""
    for damaged in ("a: [", "data: 3", "data: {path: [gone.jsonl]}", "{}"):
        (tmp_path / "run" / "config.yaml").write_text(damaged)
        assert overlap(str(moved), adapter=adapter) == ""
    (tmp_path / "run" / "config.yaml").unlink()
    assert overlap(str(moved), adapter=adapter) == ""


@pytest.mark.ray
def test_figures_on_training_records_are_called_that(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "few.jsonl", [*read_jsonl(records)[:30], {"instruction": "cat " * 2000, "output": "sat"}])
    data = {"path": [str(tmp_path / "few.jsonl")]}
    config = settings(tiny_base, data, tmp_path, adapter=train(tmp_path / "run", tiny_base, data))
    result = adapter_eval.run(config)
    assert result["headline"].endswith(", on records that the adapter was trained on")
    assert result["warning"] in caplog.text
    assert (result["records"], result["rejected_records"]) == (30, 1), "one record that is too long costs one record"
    (rejected,) = read_jsonl(config.run.folder / "rejected.jsonl")
    assert "leaves no label" in rejected["reason"]
    report = (config.run.folder / "report.html").read_text()
    assert "not how well it does on others" in report
    assert read_json(config.run.folder / "result.json") == result


@pytest.mark.ray
def test_more_problems_than_the_share_that_cannot_be_put_stop_the_run_with_their_list(
    cluster: None, tiny_base: Path, tmp_path: Path
) -> None:
    questions = write_questions(tmp_path / "questions", {"test": 10})
    problems = read_json(questions / "problems.json")
    for pid in ("test3", "test7"):
        problems[pid]["question"] = "big " * 2000
    write_json(questions / "problems.json", problems)
    data = {"path": [str(questions)], "max_rejected_fraction": 0.1}
    with pytest.raises(ValueError, match=r"2 of 10 records .* over data\.max_rejected_fraction=0\.1: problem test3"):
        adapter_eval.run(settings(tiny_base, data, tmp_path, task="scienceqa"))
    rejected = read_jsonl(tmp_path / "runs" / "eval" / "rejected.jsonl")
    assert [(row["file"], row["pid"]) for row in rejected] == [
        (str(questions / "problems.json"), pid) for pid in ("test3", "test7")
    ]
    parts = list((tmp_path / "runs" / "eval" / "parts").glob("*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:99])
    more = settings(tiny_base, data | {"max_rejected_fraction": 0.2}, tmp_path, task="scienceqa")
    result = adapter_eval.run(more)
    assert (result["problems"], result["too_long"]) == (10, 2)
    assert pq.read_table(parts[0]).num_rows == 10, "a damaged part is made again"


def test_what_cannot_be_measured_is_refused_before_a_worker_starts(
    tiny_base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_eval, "connect", None)
    questions = write_questions(tmp_path / "questions", {"test": 3})
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad"
    empty.write_text("")
    shutil.copytree(questions, bad)
    problems = read_json(bad / "problems.json")
    write_json(bad / "problems.json", {**problems, "test1": {**problems["test1"], "answer": 9}})
    write_json(questions / "pid_splits.json", {**read_json(questions / "pid_splits.json"), "none": []})
    other = train(tmp_path / "run", write_base(tmp_path / "other"), {})
    asked = {"task": "scienceqa"}
    for data, more, message in [
        ({"path": []}, {}, r"data\.path is empty"),
        ({"path": [str(empty)]}, {}, r"empty\.jsonl: the file is empty"),
        ({"path": [str(records)], "max_length": 2000}, {}, r"data\.max_length is 2000, more than the window .* 1024"),
        ({"path": [str(records)]}, {"adapter": other}, r"adapter\.safetensors: the adapter was made for another"),
        ({"path": [str(bad)]}, asked, "problem test1"),
        ({"path": [{"path": str(questions), "split": "none"}]}, asked, "no problems in the split 'none'"),
        ({"path": [str(questions)], "max_length": 32}, asked, r"data\.max_length=32 .* leaves no prompt"),
        ({"path": [str(questions)]}, {**asked, "adapter": other}, "the adapter was made for another"),
    ]:
        for act in (adapter_eval.plan, adapter_eval.run):
            with pytest.raises(ValueError, match=message):
                act(settings(tiny_base, data, tmp_path, **more))
    assert not (tmp_path / "runs").exists()


def test_problems_that_are_set_aside_are_listed_with_their_file(scienceqa: Path) -> None:
    pids = [problem.pid for problem in read_problems(scienceqa, "test")[:3]]
    rows = [
        {"pid": pid, "error": error, "image_error": image}
        for pid, (error, image) in zip(pids, [("", ""), ("long", ""), ("", "no image")], strict=True)
    ]
    rejected = rejected_problems(pa.Table.from_pylist(rows), "p.json")
    assert [(row["file"], row["pid"], row["reason"]) for row in rejected] == [
        ("p.json", pids[1], "long"),
        ("p.json", pids[2], "no image"),
    ]
