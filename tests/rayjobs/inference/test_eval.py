"""adapter-eval: what cannot be measured is refused before a worker starts, and so are training records."""

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
from rayjobs.data.records import DataConfig, RecordsConfig
from rayjobs.data.trained_records import held_out_records, trained_digests, write_digests
from rayjobs.errors import ConfigError, DataError
from rayjobs.inference.scienceqa import rejected_problems
from rayjobs.inference.training_records import find_overlap
from rayjobs.jobs import adapter_eval
from rayjobs.storage.files import read_json, read_jsonl, write_json, write_jsonl
from rayjobs.storage.hub_model import TRAINED_RECORDS_FILE
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


def overlap(adapter: str | None, *paths: Any, **more: Any) -> tuple[int, int | None]:
    """The records to be scored, and those among them that the adapter was trained on."""
    sources = load(RecordsConfig, {"path": list(paths), **more}).sources()
    found = find_overlap(adapter, (record for source in sources for record in source.read()))
    return found.records, found.trained_on


def leave_digests(folder: Path, data: dict[str, Any]) -> None:
    """Write the digests that a run of adapter-train leaves of its records."""
    write_digests(folder / TRAINED_RECORDS_FILE, trained_digests(load(DataConfig, data)))


def test_records_that_the_adapter_was_trained_on_are_known_one_by_one(
    tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    rows = read_jsonl(records)
    data = {"path": [str(records)], "val_fraction": 0.2}
    adapter = train(tmp_path / "run", tiny_base, data)
    held_out = list(held_out_records(load(DataConfig, data)))
    trained = len(rows) - len(held_out)
    assert 5 < len(held_out) < 40
    write_jsonl(tmp_path / "moved.jsonl", [{**row, "id": i} for i, row in enumerate(reversed(rows))])
    write_jsonl(tmp_path / "held_out.jsonl", [{k: record[k] for k in rows[0]} for record in held_out])
    write_jsonl(tmp_path / "other.jsonl", [{**row, "output": f"{row['output']}!"} for row in rows])
    moved, kept, other = (str(tmp_path / f"{name}.jsonl") for name in ("moved", "held_out", "other"))
    for digests in (False, True):  # by the settings beside the adapter, then by what the run left, without its files
        if digests:
            leave_digests(tmp_path / "run", data)
            (tmp_path / "run" / "config.yaml").unlink()
        assert overlap(adapter, moved) == (len(rows), trained), "in another file, in another order"
        assert overlap(adapter, kept) == (len(held_out), 0), "the held-out share is not trained on"
        assert overlap(adapter, other) == (len(rows), 0)
        assert overlap(adapter, other, moved) == (2 * len(rows), trained)
        assert overlap(None, moved) == (len(rows), 0)
    (tmp_path / "run" / TRAINED_RECORDS_FILE).write_text("[1, ")
    with pytest.raises(DataError, match="a damaged list"):
        overlap(adapter, moved)


def test_what_an_adapter_was_trained_on_is_unknown_without_its_run(
    tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    adapter = train(tmp_path / "run", tiny_base, {})
    for damaged in ("a: [", "data: 3", "data: {path: [gone.jsonl]}", "{}"):
        (tmp_path / "run" / "config.yaml").write_text(damaged)
        assert overlap(adapter, str(records)) == (101, None)
    (tmp_path / "run" / "config.yaml").unlink()
    assert overlap(adapter, str(records)) == (101, None)
    with pytest.raises(ConfigError, match=r"split=val needs the run .* no .*config\.yaml: name the records"):
        settings(tiny_base, None, tmp_path, adapter=adapter, split="val").records  # noqa: B018


def test_training_records_are_refused_unless_they_are_allowed(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    data = {"path": [str(records)], "val_fraction": 0.2, "max_length": 200}
    adapter = train(tmp_path / "run", tiny_base, data)
    given = {"adapter": adapter}
    with pytest.raises(
        DataError, match=r"trained on \d+ of the 101 records, such as .*: name other .*split=val"
    ) as error:
        adapter_eval.plan(settings(tiny_base, {"path": [str(records)]}, tmp_path, **given))
    assert "allow_training_records=true" in str(error.value)
    adapter_eval.plan(settings(tiny_base, {"path": [str(records)]}, tmp_path, **given, allow_training_records=True))
    adapter_eval.plan(settings(tiny_base, {"path": [str(records)]}, tmp_path))  # the base was trained on none
    checked = adapter_eval.check(settings(tiny_base, None, tmp_path, **given, split="val"))
    assert (checked.overlap.trained_on, checked.overlap.records) == (
        0,
        len(list(held_out_records(load(DataConfig, data)))),
    )
    assert checked.records.max_length == 200, "records become tokens as they did in training"
    train(tmp_path / "run", tiny_base, data | {"val_path": [str(records)]})
    with pytest.raises(DataError, match=r"trained on 101 of the 101 records, such as .*: allow_training_records=true"):
        adapter_eval.plan(settings(tiny_base, None, tmp_path, **given, split="val"))  # validation on training records
    train(tmp_path / "run", tiny_base, data | {"val_fraction": 0.0})
    with pytest.raises(DataError, match="its run held out no records"):
        adapter_eval.plan(settings(tiny_base, None, tmp_path, **given, split="val"))


def test_a_split_and_records_exclude_each_other(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    for data, more, message in [
        ({"path": [str(records)]}, {"split": "val", "adapter": "a.safetensors"}, "leave out data, or split"),
        (None, {"split": "val"}, "give adapter, or name data.path"),
        (None, {}, "data.path: required, but not given; .* split=val"),
    ]:
        with pytest.raises(ConfigError, match=message):
            settings(tiny_base, data, tmp_path, **more)


def test_scienceqa_of_a_run_is_measured_on_what_it_held_out(tiny_base: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "questions", {"train": 30, "val": 7, "test": 3})
    problems = read_json(questions / "problems.json").items()  # of which some would be equal
    write_json(questions / "problems.json", {pid: {**problem, "question": pid} for pid, problem in problems})
    asked = {"task": "scienceqa", "adapter": str(tmp_path / "run" / "adapter.safetensors")}
    data = {"path": [str(questions)], "format": "scienceqa", "val_fraction": 0.3}
    train(tmp_path / "run", tiny_base, data)
    with pytest.raises(DataError, match="was trained on"):
        adapter_eval.check(
            settings(tiny_base, {"path": [{"path": str(questions), "split": "train"}]}, tmp_path, **asked)
        )
    checked = adapter_eval.check(settings(tiny_base, None, tmp_path, **asked, split="val"))
    assert 0 < len(checked.problems) == checked.overlap.records < 30
    assert all(problem.pid.startswith("train") for problem in checked.problems)
    train(tmp_path / "run", tiny_base, data | {"val_path": [str(questions)]})
    checked = adapter_eval.check(settings(tiny_base, None, tmp_path, **asked, split="val"))
    assert [problem.pid for problem in checked.problems] == [f"val{i}" for i in range(7)]
    assert adapter_eval.check(settings(tiny_base, {"path": [str(questions)]}, tmp_path, **asked)).overlap.records == 3


@pytest.mark.ray
def test_figures_on_training_records_are_called_that(
    busy_cluster: None, tiny_base: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "few.jsonl", [*read_jsonl(records)[:30], {"instruction": "cat " * 2000, "output": "sat"}])
    data = {"path": [str(tmp_path / "few.jsonl")], "val_fraction": 0.0}
    adapter = train(tmp_path / "run", tiny_base, data)
    given = {"path": data["path"]}
    config = settings(tiny_base, given, tmp_path, adapter=adapter, allow_training_records=True)
    result = adapter_eval.run(config)
    assert result["headline"].endswith(", on records that the adapter was trained on")
    assert result["warning"] in caplog.text
    assert result["records_trained_on"] == 31
    assert (result["records"], result["rejected_records"]) == (30, 1), "one record that is too long costs one record"
    (rejected,) = read_jsonl(config.run.folder / "rejected.jsonl")
    assert "leaves no label" in rejected["reason"]
    report = (config.run.folder / "report.html").read_text()
    assert "not how well it does on others" in report
    assert read_json(config.run.folder / "result.json") == result


@pytest.mark.slow
@pytest.mark.ray
def test_answers_are_compared_with_the_records_own(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    pytest.importorskip("rouge_score")
    rows = read_jsonl(records)
    base = AdaptedModel.from_pretrained(tiny_base)
    said = base.answer_records(rows, max_new_tokens=5, temperature=0)
    held_out = [{**row, "output": text or "x"} for row, text in zip(rows, said, strict=True)]
    held_out[::2] = [{**row, "output": "seven"} for row in held_out[::2]]
    write_jsonl(tmp_path / "asked.jsonl", [*held_out[:30], {"instruction": "cat " * 2000, "output": "sat"}])
    given = {"path": [str(tmp_path / "asked.jsonl")]}
    decoding = {"max_new_tokens": 5, "temperature": 0}
    config = settings(tiny_base, given, tmp_path, task="answers", decoding=decoding)
    result = adapter_eval.run(config)
    right = sum(row["output"].strip() == text for row, text in zip(held_out[:30], said, strict=False))
    assert 0 < right < 30
    assert (result["answers"], result["rejected_records"]) == (30, 1)
    assert result["exact_match"] == pytest.approx(100 * right / 30, abs=1e-3)
    table = pq.read_table(config.run.folder / "answers.parquet").to_pylist()
    assert [row["answer"] for row in table] == [*said[:30], None]
    assert result["rouge_l"] == pytest.approx(sum(row["rouge_l"] for row in table[:30]) / 30, abs=1e-3)
    assert "leaves no room" in table[30]["error"]
    assert "ROUGE-L" in (config.run.folder / "report.html").read_text()
    with pytest.raises(ValueError, match=r"other settings \(decoding\.max_new_tokens was 5, now 6\)"):
        adapter_eval.run(
            settings(tiny_base, given, tmp_path, task="answers", decoding={**decoding, "max_new_tokens": 6})
        )


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
    adapter_eval.plan(settings(tiny_base, {"path": [str(records)], "max_length": 2000}, tmp_path, task="answers"))
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
