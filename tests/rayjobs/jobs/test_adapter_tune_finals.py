"""The finals of adapter-tune: the best setting of each method, with more seeds, measured on records of their own."""

import json
import shutil
from pathlib import Path

import pytest

from adapter.errors import RecordError
from rayjobs.config import load
from rayjobs.errors import ConfigError, DataError
from rayjobs.jobs import adapter_eval, adapter_tune
from rayjobs.storage.files import read_json, write_jsonl
from rayjobs.tune.adapter_sweep import enumerate_overrides, sample_overrides

AXES = {"adapter.method": ["zero_init", "bias"], "optimizer.base_lr": [1.0]}


def settings(tiny_base: Path, records: Path, storage: Path, **sweep: object) -> adapter_tune.Config:
    return load(
        adapter_tune.Config,
        {
            "base": {"path": str(tiny_base)},
            "data": {"path": [str(records)], "max_length": 200, "val_fraction": 0.2},
            "adapter": {"prompt_length": 3},
            "train": {"epochs": 1, "warmup_epochs": 0, "global_batch": 16},
            "sweep": {"axes": AXES, "compare": "adapter.method", **sweep},
            "run": {"name": "sweep", "storage": str(storage)},
        },
    )


def write_test(path: Path, count: int, word: str = "repeat") -> dict[str, str]:
    write_jsonl(path, [{"instruction": f"{word} {i}", "input": "", "output": f"{word} {i}"} for i in range(count)])
    return {"path": str(path)}


def test_a_value_may_have_axes_of_its_own(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    own = {"bias": {"optimizer.base_lr": [0.1, 0.2]}}
    grid = settings(tiny_base, records, tmp_path, axes_of=own).sweep
    assert [tuple(overrides.values()) for overrides in enumerate_overrides(grid)] == [
        ("zero_init", 1.0),
        ("bias", 0.1),
        ("bias", 0.2),
    ]
    assert {"adapter.method": "bias", "optimizer.base_lr": 0.2} in sample_overrides(grid)
    assert len(adapter_tune.check(settings(tiny_base, records, tmp_path, axes_of=own))) == 3


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"compare": None, "finals": True}, r"sweep\.finals measures the values that sweep\.compare names"),
        ({"axes_of": {"lora": {}}}, r"axes_of has lora, which is no value of sweep\.compare, adapter\.method"),
        ({"axes_of": {"bias": {"train.epochs": [1]}}}, r"axes_of\.bias has train\.epochs, which must be one of"),
        ({"axes_of": {"bias": {"adapter.method": ["full"]}}}, r"axes_of\.bias has adapter\.method, which must be one"),
        ({"axes_of": {"bias": {"optimizer.base_lr": {"low": 1, "high": 2}}}}, r"sweep\.axes_of\.bias: .* is a range"),
        ({"axes_of": {"bias": {"optimizer.base_lr": [-1]}}}, r"optimizer\.base_lr"),
    ],
)
def test_finals_and_axes_that_cannot_be_are_refused(
    tiny_base: Path, records: Path, tmp_path: Path, sweep: dict[str, object], message: str
) -> None:
    if "finals" in sweep:
        sweep = {**sweep, "finals": {"test": write_test(tmp_path / "test.jsonl", 3)}}
    with pytest.raises(ConfigError, match=message):
        adapter_tune.check(settings(tiny_base, records, tmp_path, **sweep))


def test_finals_on_records_of_the_sweep_are_refused(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    rows = records.read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join([*rows[:2], '{"instruction": "new", "input": "", "output": "one"}']))
    finals = {"test": {"path": str(tmp_path / "test.jsonl")}}
    with pytest.raises(DataError, match=r"2 records of sweep\.finals\.test are among those of data\.path"):
        adapter_tune.check(settings(tiny_base, records, tmp_path, finals=finals))
    missing = {"test": {"path": str(tmp_path / "nowhere.jsonl")}}
    with pytest.raises(RecordError, match=r"nowhere\.jsonl: no such file"):
        adapter_tune.check(settings(tiny_base, records, tmp_path, finals=missing))


def test_the_plan_says_what_is_measured(
    tiny_base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finals = {"test": write_test(tmp_path / "test.jsonl", 3), "seeds": [4, 7]}
    adapter_tune.plan(settings(tiny_base, records, tmp_path, finals=finals))
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 trials, 2 of them different" in shown
    assert "the best setting of each adapter.method, with seeds 4, 7" in shown


@pytest.mark.ray
@pytest.mark.slow
def test_the_best_setting_of_each_method_is_measured_on_records_of_their_own(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    test, other = write_test(tmp_path / "test.jsonl", 5), write_test(tmp_path / "other.jsonl", 4, "other")
    finals = {"test": test, "other": other, "seeds": [0, 1], "max_new_tokens": 4}
    config = settings(tiny_base, records, tmp_path, finals=finals, at_once=2)
    result = adapter_tune.run(config)
    folder = config.run.folder
    assert [row["method"] for row in result["compared"]] == ["none", "zero_init", "bias"]
    assert [row["method, less zero_init"] for row in result["differences"]] == ["bias"]
    trials = sorted((folder / "trials").glob("*/final.json"))
    assert len(trials) == 4, "two methods, two seeds"
    assert "| zero_init |" in (folder / "comparison.md").read_text()
    runs = read_json(folder / "comparison.json")
    names = [run["run_info"]["experiment_name"].partition("/")[0] for run in runs]
    assert names == ["zero_init", "zero_init", "bias", "bias"]
    assert all(run["train_info"]["peak_memory"] > 1 << 26 for run in runs)

    evaluated = adapter_eval.run(
        load(
            adapter_eval.Config,
            {
                "base": {"path": str(tiny_base)},
                "adapter": str(trials[0].parent / "adapter.safetensors"),
                "data": {"path": [other["path"]], "max_length": 200},
                "run": {"name": "own", "storage": str(tmp_path)},
            },
        )
    )
    assert read_json(trials[0])["other_loss"] == evaluated["loss"]

    written = {path: path.stat().st_mtime_ns for path in [*trials, *folder.glob("trials/*/adapter.safetensors")]}
    assert adapter_tune.run(config) == result
    shutil.rmtree(folder / "base")
    write_test(tmp_path / "other.jsonl", 3, "another")
    again = adapter_tune.run(config)
    assert again["compared"][1]["test loss"] == result["compared"][1]["test loss"]
    assert again["compared"][1]["loss on other text"] != result["compared"][1]["loss on other text"]
    now = {path: path.stat().st_mtime_ns for path in written}
    changed = {path.name for path in written if now[path] != written[path]}
    assert changed == {"final.json"}, "measured anew, and not trained again"
    assert json.loads(trials[0].read_text())["test_loss"] > 0
