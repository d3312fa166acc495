"""adapter-tune: ordinary training runs side by side, taken up again, and tabled by setting."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rayjobs.__main__ import main
from rayjobs.config import load, to_dict
from rayjobs.errors import ConfigError, DataError, ProvenanceError
from rayjobs.jobs import adapter_train, adapter_tune
from rayjobs.jobs.adapter_train import FREE_TO_CHANGE, identify, open_inputs
from rayjobs.jobs.adapter_tune_trials import results_of
from rayjobs.storage.files import write_json
from rayjobs.storage.lease import release
from rayjobs.storage.yaml_file import write_yaml
from rayjobs.train.resume_check import lock_run
from rayjobs.tune.adapter_study import AdapterStudy
from rayjobs.tune.adapter_sweep import enumerate_overrides
from rayjobs.tune.adapter_trial import (
    AdapterTrial,
    AdapterTrialResult,
    Point,
    outcome,
    read_adapter_result,
    step_to_stop_at,
)
from tests.conftest import ROOT
from tests.rayjobs.cafo_dataset import make_encoders
from tests.rayjobs.colour_questions import write_base, write_questions
from tests.rayjobs.pages import page_text
from tests.waiting import wait_until

SEARCH = {"method": "optuna", "axes": {"optimizer.base_lr": {"low": 0.1, "high": 10}, "adapter.n_layers": [1, 2, 3]}}


def settings(tiny_base: Path, records: Path, storage: Path, **sweep: object) -> adapter_tune.Config:
    return load(
        adapter_tune.Config,
        {
            "base": {"path": str(tiny_base)},
            "data": {"path": [str(records)], "max_length": 200, "val_fraction": 0.2},
            "adapter": {"n_layers": 2, "prompt_length": 3},
            "train": {"epochs": 1, "warmup_epochs": 0, "global_batch": 16},
            "optimizer": {"base_lr": 1.0},
            "sweep": {"axes": {"adapter.method": ["zero_init", "prefix"]}, **sweep},
            "run": {"name": "sweep", "storage": str(storage)},
        },
    )


def test_grids_and_single_axes(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    axes = {"adapter.n_layers": [1, 2], "optimizer.base_lr": [0.1, 1.0, 2.0]}
    assert len(adapter_tune.check(settings(tiny_base, records, tmp_path, axes=axes, seeds=[0, 1]))) == 12
    each = settings(tiny_base, records, tmp_path, axes=axes, method="each")
    assert enumerate_overrides(each.sweep)[2:] == [{"optimizer.base_lr": rate} for rate in (0.1, 1.0, 2.0)]
    assert adapter_tune.trial_settings(each, AdapterTrial({"adapter.n_layers": 1}, 7)).train.seed == 7
    with pytest.raises(ConfigError, match=r"adapter.layers: unknown key; did you mean adapter.n_layers"):
        adapter_tune.check(settings(tiny_base, records, tmp_path, axes={"adapter.layers": [1]}))


def test_trials_that_come_to_the_same_are_one(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    axes = {"adapter.n_layers": [1, 2], "adapter.method": ["zero_init", "prefix"], "train.epochs": [1, 2, 3]}
    each = settings(tiny_base, records, tmp_path, axes=axes, method="each")
    trials = adapter_tune.check(each)
    names = [adapter_tune.trial_settings(each, trial).run.name for trial in trials]
    assert names[1] == names[2] == names[4], "the config's own values"
    assert (len(trials), len(set(names))) == (7, 5)


def test_what_cannot_be_swept_is_told_before_anything_starts(
    tiny_base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = str(write_questions(tmp_path / "questions", {"val": 3, "test": 3}))
    test = {"path": questions, "split": "test"}
    for sweep, message in [
        ({"axes": {"adapter.n_layers": [2, 3, 4]}}, r"adapter\.n_layers is 4, but .* has 3 layers"),
        ({"axes": {"train.seed": [0, 1]}}, r"sweep\.axes cannot hold train\.seed: seeds are given as sweep\.seeds"),
        ({"axes": {"run.name": ["a"]}}, r"sweep\.axes cannot hold run\.name"),
        ({"scienceqa": {"path": str(tmp_path / "nowhere")}}, r"nowhere/problems\.json: no such file"),
        ({"scienceqa": test}, "test is not for choosing"),
        ({"axes": {"data.val_path": [[{**test, "format": "scienceqa"}]]}}, "test is not for choosing"),
        ({"axes": {"optimizer.base_lr": {"low": 0.1, "high": 1}}}, "is a range, which needs sweep.method optuna"),
        ({**SEARCH, "axes": {"optimizer.base_lr": {"low": 1, "high": 0.1}}}, r"1\.0 to 0\.1: low is above high"),
        ({**SEARCH, "compare": "optimizer.base_lr"}, r"sweep\.compare is optimizer\.base_lr: it must be one of"),
        ({**SEARCH, "axes": {"adapter.n_layers": [1]}, "compare": "adapter.n_layers"}, "something to search too"),
        ({**SEARCH, "axes": {"adapter.n_layers": [1, 4]}}, r"adapter\.n_layers is 4, but .* has 3 layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter_tune.run(settings(tiny_base, records, tmp_path, **sweep))
    assert not (tmp_path / "sweep").exists()
    adapter_tune.plan(settings(tiny_base, records, tmp_path, scienceqa={"path": questions}, seeds=[0, 1]))
    assert "4 trials, 4 of them different" in " ".join(capsys.readouterr().out.split())


def test_a_search_without_held_out_records_is_refused_and_one_with_them_is_planned(
    tiny_base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = settings(tiny_base, records, tmp_path, **SEARCH, samples=6, seeds=[0, 1])
    with pytest.raises(ConfigError, match=r"no record is held out: give data\.val_path"):
        adapter_tune.check(replace(search, data=replace(search.data, val_fraction=0)))
    adapter_tune.plan(replace(search, sweep=replace(search.sweep, compare="adapter.n_layers")))
    shown = " ".join(capsys.readouterr().out.split())
    assert "up to 18 settings, each with seeds 0, 1, 1 at once" in shown
    assert "optimizer.base_lr 0.1 to 10 adapter.n_layers 1, 2, 3" in shown


def formula(trial: AdapterTrial, point: Point) -> AdapterTrialResult:
    """The result of a trial of `SEARCH` without training: best at rate 1 and three layers, and divergent above 5."""
    rate, layers = trial.overrides["optimizer.base_lr"], trial.overrides["adapter.n_layers"]
    end = abs(math.log10(rate)) + 1 / layers + 0.01 * trial.seed
    curve = [(step, end + 1 / step) for step in range(1, 6)]
    last = step_to_stop_at(curve, point.limits_of(point.trials.index(trial)))
    curve = curve[:last]
    return AdapterTrialResult(
        setting=point.setting,
        seed=trial.seed,
        run="",
        status="diverged" if rate > 5 else "finished" if last is None else "stopped",
        val_loss=curve[-1][1] if last is None and rate <= 5 else None,
        first_loss=1.0,
        peak_loss=1.0,
        final_loss=1.0,
        steps=len(curve),
        seconds=1.0,
        val_steps=[step for step, _ in curve],
        val_losses=[loss for _, loss in curve],
    )


def run_by_formula(most: int) -> Callable[..., None]:
    """A stand-in for `run_left`, which is killed at its trial number `most`."""

    def run_left(config: adapter_tune.Config, folder: Path, study: AdapterStudy, *_: Any) -> None:
        nonlocal most
        number = 0
        while isinstance(suggested := study.suggest(str(number)), dict):
            point = suggested["point"]
            while not point.is_over(results := results_of(config, point)):
                if not most:
                    raise KeyboardInterrupt
                most -= 1
                trial = point.trials[len(results)]
                own = adapter_tune.trial_settings(config, trial)
                replace(formula(trial, point), run=own.run.name).write(own.run.folder)
            study.on_trial_complete(str(number), outcome(results))
            number += 1

    return run_left


def test_a_search_that_was_killed_ends_as_if_it_had_not_been_and_its_best_config_can_be_run(
    tiny_base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(name: str) -> adapter_tune.Config:
        return settings(tiny_base, records, tmp_path / name, **SEARCH, samples=12, seeds=[0, 1], keep_first=3)

    monkeypatch.setattr(adapter_tune, "run_left", run_by_formula(most=-1))
    whole = adapter_tune.run(search("whole"))
    ends = Counter(row["status"].partition(" ")[0].rstrip(",") for row in whole["settings"])
    assert ends["stopped"] >= 2
    assert ends["diverged"] >= 1

    monkeypatch.setattr(adapter_tune, "run_left", run_by_formula(most=7))
    with pytest.raises(KeyboardInterrupt):
        adapter_tune.run(search("killed"))
    monkeypatch.setattr(adapter_tune, "run_left", run_by_formula(most=-1))
    resumed = adapter_tune.run(search("killed"))
    assert {**resumed, "best_adapter": ""} == {**whole, "best_adapter": ""}

    folder = search("killed").run.folder
    figures = {"settings.png", "importance.png", "first_steps.png", "table.md", "results.parquet"}
    assert figures <= {path.name for path in folder.iterdir()}
    best = load(adapter_train.Config, folder / "best.yaml")
    rate, layers = best.optimizer.base_lr, best.adapter.n_layers
    assert resumed["best"] == f"base_lr {rate}, n_layers {layers}"
    assert best.run.folder == folder.parent / "sweep_best"
    monkeypatch.setattr(adapter_train, "describe_cost", lambda *_, **__: [])  # seconds of measuring
    assert main(["adapter-train", "--config", str(folder / "best.yaml"), "--dry-run"]) == 0


def test_trials_of_other_records_at_the_same_path_are_refused(tiny_base: Path, records: Path, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    shutil.copy(records, path)
    config = settings(tiny_base, path, tmp_path)
    trial = AdapterTrial({"adapter.method": "prefix"}, 0)
    own = adapter_tune.trial_settings(config, trial)
    lock_run(own.run.folder, own, identify(own, open_inputs(own)), FREE_TO_CHANGE)
    write_json(own.run.folder / "result.json", {})
    adapter_tune.check(config)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    with pytest.raises(ProvenanceError, match=rf"{own.run.name} .*data\.path\[0\]\.records was \w+, now \w+"):
        adapter_tune.run(config)


def test_a_search_takes_no_result_of_other_settings_or_records(
    tiny_base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials are over without a checkpoint, as one that diverged at once."""
    path = tmp_path / "records.jsonl"
    shutil.copy(records, path)
    config = settings(tiny_base, path, tmp_path, **SEARCH, samples=4)
    folder = config.run.folder

    def kill_after_two(config: adapter_tune.Config, _: Path, study: AdapterStudy, *__: Any) -> None:
        for number in range(2):
            suggested = study.suggest(str(number))
            assert isinstance(suggested, dict)
            point = suggested["point"]
            own = adapter_tune.trial_settings(config, point.trials[0])
            lock_run(own.run.folder, own, identify(own, open_inputs(own)), FREE_TO_CHANGE)
            release(own.run.folder)
            replace(formula(point.trials[0], point), run=own.run.name).write(own.run.folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_tune, "run_left", kill_after_two)
    with pytest.raises(KeyboardInterrupt):
        adapter_tune.run(config)
    begun = {file: file.stat().st_mtime_ns for file in folder.glob("trials/*/trial.json")}
    assert len(begun) == 2
    written = (folder / "config.yaml").read_bytes()
    changed = {
        r"train\.epochs was 1\.0, now 2\.0": replace(config, train=replace(config.train, epochs=2)),
        r"base\.dtype was fp32, now bf16": replace(config, base=replace(config.base, dtype="bf16")),
        r"optimizer\.clip_norm was ": replace(config, optimizer=replace(config.optimizer, clip_norm=0.5)),
    }
    for message, other in changed.items():
        for start in (adapter_tune.plan, adapter_tune.run):
            with pytest.raises(ProvenanceError, match=rf"seed0-\w+ holds results of other settings \({message}"):
                start(other)
    assert (folder / "config.yaml").read_bytes() == written

    monkeypatch.setattr(adapter_tune, "run_left", run_by_formula(most=2))
    assert adapter_tune.run(config)["trials"] == 4
    assert all(file.stat().st_mtime_ns == then for file, then in begun.items())
    shutil.rmtree(min(begun, key=lambda file: begun[file]).parent)  # of what follows the first, the results are known
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    with pytest.raises(ProvenanceError, match=r"data\.path\[0\]\.records was \w+, now \w+"):
        adapter_tune.check(config)


def test_a_trial_s_result_of_another_version_is_read_or_named(tmp_path: Path) -> None:
    result = AdapterTrialResult(
        setting="s",
        seed=0,
        run="r",
        trainable_parameters=1,
        first_loss=3.0,
        peak_loss=3.0,
        final_loss=1.0,
        val_loss=None,
        evaluated_on=None,
    )
    write_json(tmp_path / "trial.json", {**result.row(), "of_a_later_release": 1})
    assert read_adapter_result(tmp_path) == result
    write_json(tmp_path / "trial.json", {"setting": "s"})
    with pytest.raises(DataError, match=r"trial\.json is not the result of a trial: seed: "):
        read_adapter_result(tmp_path)


@pytest.mark.ray
@pytest.mark.slow
def test_the_papers_ablations_run_from_relative_paths_and_are_measured_anew_on_other_problems(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped config as it is, but for what makes it small; trials run in folders of their own."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "weights" / "llama-7b")
    write_questions(tmp_path / "data" / "scienceqa", {"train": 12, "val": 8})
    make_encoders(tmp_path / "encoders")
    small = [
        "base.dtype=fp32",
        "adapter.n_layers=2",
        "adapter.prompt_length=3",
        "vision.encoder.name=tiny",
        "vision.encoder.weights=encoders/clip",
        "train.epochs=1",
        "train.warmup_epochs=0",
        "scale.workers=1",
        "sweep.axes={adapter.n_layers: [1, 2], adapter.method: [zero_init]}",
    ]
    config = load(adapter_tune.Config, ROOT / "configs" / "adapter" / "scienceqa_ablations.yaml", small)
    result = adapter_tune.run(config)
    folder = tmp_path / "runs" / "scienceqa_ablations"
    assert [row["setting"] for row in result["settings"]] == ["n_layers 1", "n_layers 2", "method zero_init"]
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert rows[1] == {**rows[2], "setting": "n_layers 2"}
    assert all(0 <= row["accuracy"] <= 100 and row["val_loss"] > 0 for row in rows)
    trained = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/adapter.safetensors")}
    assert len(trained) == 2
    assert len(list(folder.glob("trials/*/eval-*/predictions.parquet"))) == 2
    assert adapter_tune.run(config) == result
    assert len(list(folder.glob("trials/*/eval-*/predictions.parquet"))) == 2

    write_questions(tmp_path / "other", {"val": 3})
    relative = [*small, "sweep.scienceqa.path=other"]
    again = load(adapter_tune.Config, ROOT / "configs" / "adapter" / "scienceqa_ablations.yaml", relative)
    adapter_tune.run(again)
    counted = [len(pq.read_table(path)) for path in folder.glob("trials/*/eval-*/predictions.parquet")]
    assert sorted(counted) == [3, 3, 8, 8]
    assert trained == {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/adapter.safetensors")}


@pytest.mark.ray
def test_trials_run_side_by_side_and_are_not_run_again(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path, terminal: pytest.CaptureFixture[str]
) -> None:
    config = settings(tiny_base, records, tmp_path, at_once=2)
    result = adapter_tune.run(config)
    assert [row["setting"] for row in result["settings"]] == ["method zero_init", "method prefix"]
    rows = pq.read_table(config.run.folder / "results.parquet").to_pylist()
    assert [row["trainable_parameters"] for row in rows] == [2 * (3 * 24 + 6), 2 * 3 * 24]
    for row in rows:
        trial = config.run.folder / "trials" / row["run"]
        losses = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in losses if "loss" in line]
        assert (row["first_loss"], row["peak_loss"]) == (losses[0], max(losses))
        assert (trial / "adapter.safetensors").exists()
    assert rows[0]["first_loss"] != rows[1]["first_loss"], "a prefix changes the base from the first step"
    assert {"first_steps.png", "table.md", "report.html"} <= {path.name for path in config.run.folder.iterdir()}
    report = (config.run.folder / "report.html").read_text()
    assert "<h2>training loss of the first 50 steps</h2>" in report
    for setting in ("zero_init", "prefix"):
        told = f"method {setting}, seed 0, validation"
        assert told in page_text(config.run.folder), "the trials' curves over one another"
    best = min(rows, key=lambda row: row["val_loss"])
    told = f"best: {best['setting']}, val loss {best['val_loss']:.4f}"
    assert result["headline"] == told
    assert told in terminal.readouterr().err, "the progress display tells the best so far"
    shutil.rmtree(config.run.folder / "trials" / rows[0]["run"] / "train")  # it would have to be trained again
    assert adapter_tune.run(config) == result


@pytest.mark.ray
@pytest.mark.slow
def test_a_real_search_that_was_killed_ends_as_one_that_was_not(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    """The first setting has a good learning rate, and the second one so low a rate that it is stopped."""

    def search(name: str) -> adapter_tune.Config:
        axes = {"optimizer.base_lr": {"low": 0.001, "high": 1}, "adapter.n_layers": [1, 2]}
        rules = {"samples": 2, "suggested_at_once": 1, "keep_first": 1, "seed": 6}
        config = settings(tiny_base, records, tmp_path / name, method="optuna", axes=axes, **rules)
        train = replace(config.train, epochs=8, validate_every_steps=4)
        cache = str(tmp_path / "cache")
        return replace(config, train=train, run=replace(config.run, cache=cache))

    def losses(folder: Path) -> list[tuple[str, str, list[float]]]:
        rows = pq.read_table(folder / "results.parquet").to_pylist()
        return [(row["setting"], row["status"], row["val_losses"]) for row in rows]

    whole = adapter_tune.run(search("whole"))
    ends = losses(search("whole").run.folder)
    assert [end for _, end, _ in ends] == ["finished", "stopped"]
    assert len(ends[1][2]) < len(ends[0][2]), "it was stopped on the way"

    write_yaml(tmp_path / "killed.yaml", to_dict(search("killed")))
    command = [sys.executable, "-m", "rayjobs", "adapter-tune", "--config", str(tmp_path / "killed.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    folder = search("killed").run.folder
    wait_until(lambda: list(folder.glob("trials/*/trial.json")), "a trial that is over")
    process.kill()
    process.wait()
    over = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/trial.json")}
    assert len(over) == 1
    resumed = adapter_tune.run(search("killed"))
    assert (resumed["best"], resumed["headline"]) == (whole["best"], whole["headline"])
    assert losses(folder) == ends
    assert all(path.stat().st_mtime_ns == then for path, then in over.items()), "what was over is not run again"
    assert Path(resumed["best_adapter"]).exists()
