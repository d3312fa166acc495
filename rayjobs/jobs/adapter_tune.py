"""Train adapters over a search space of adapter-train's settings with Ray Tune, such as the paper's ablations.

Each trial is an ordinary adapter-train run in `trials/`. The best setting is chosen on validation loss, or on the
accuracy of the ScienceQA problems that `sweep.scienceqa` names. `sweep.compare` puts the values of one hyperparameter,
such as adapter.method, beside each other, each with the learning rate that is best for it (`comparison.md`). The same
command resumes an interrupted sweep: finished trials are not run again, and an interrupted one continues from its last
checkpoint.
"""

import functools
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import tune

from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerRange
from rayjobs.config import load, to_dict
from rayjobs.console import show_table
from rayjobs.errors import ConfigError
from rayjobs.job_configs.adapter_tune import Config
from rayjobs.jobs import adapter_eval, adapter_train
from rayjobs.lifecycle import job
from rayjobs.runs.record import write_result
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import read_jsonl, write_parquet
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.tune.adapter_sweep import (
    AdapterTrial,
    AdapterTrialResult,
    compare_values,
    describe_overrides,
    enumerate_overrides,
    plot_first_steps,
    read_adapter_result,
    run_trials,
    summarize,
    write_table,
)


def check(settings: Config, *, weights: bool = True) -> list[AdapterTrial]:
    """Check the settings of every trial; return the trials. Raises a UserError for the first problem.

    weights: False to leave the weights of a base on the hub there.
    """
    if settings.scale.workers.min < settings.scale.workers.max:  # Tune has to know how many trials there is room for
        raise ConfigError(f"scale.workers must be one number in a sweep, got {settings.scale.workers}")
    if fixed := [name for name in settings.sweep.axes if name == "train.seed" or name.split(".")[0] == "run"]:
        raise ConfigError(
            f"sweep.axes cannot hold {', '.join(fixed)}: seeds are given as sweep.seeds, and every trial has a folder "
            "of its own"
        )
    if (name := settings.sweep.compare) and (name not in settings.sweep.axes or settings.sweep.method != "grid"):
        raise ConfigError(
            f"sweep.compare is {name}: it must be one of sweep.axes ({', '.join(settings.sweep.axes)}), and "
            "sweep.method grid, so that every value meets the same others"
        )
    trials = [
        AdapterTrial(*pair) for pair in itertools.product(enumerate_overrides(settings.sweep), settings.sweep.seeds)
    ]
    opened: dict[str, adapter_train.Inputs] = {}
    for trial in trials:
        own = trial_settings(settings, trial)
        named = json.dumps([to_dict(own)[name] for name in ("base", "data", "vision")])
        if named not in opened:  # an encoder takes seconds to load
            opened[named] = adapter_train.open_inputs(own, weights=weights)
            _refuse_test_split(settings, own)
        adapter_train.check_fit(own, opened[named])
    return trials


def plan(settings: Config) -> None:
    """Show what `run` would do."""
    trials = check(settings, weights=False)
    seeds = ", ".join(map(str, settings.sweep.seeds))
    rows = [[describe_overrides(overrides), seeds] for overrides in enumerate_overrides(settings.sweep)]
    different = len({_folder(settings, trial) for trial in trials})
    title = f"{len(trials)} trials, {different} of them different, {settings.sweep.at_once} at once"
    show_table(title, ["setting", "seeds"], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Run the sweep; return and write `result.json`, with `results.parquet`, `table.md` and a plot beside it."""
    trials = check(settings)
    folder = open_run(settings.run, settings)
    different: dict[Path, AdapterTrial] = {}
    for trial in trials:  # equal settings have one folder
        different.setdefault(_folder(settings, trial), trial)
    left = [trial for trial in different.values() if not finished_results(settings, [trial])]
    if left:
        connect(folder, settings.run.cache_folder)
        worker = _worker_resources(settings)
        adapter_train.prepare(trial_settings(settings, left[0]))  # once, before trials do it at the same time
        run_trials(
            tune.with_parameters(train_trial, settings=settings, trials=left, worker=worker),
            len(left),
            folder / "tune",
            settings.sweep.at_once,
            len(different),
            functools.partial(finished_results, settings, list(different.values())),
        )
    results = finished_results(settings, trials)
    write_parquet(folder / "results.parquet", pa.Table.from_pylist([result.row() for result in results]))
    summary = summarize(results)
    write_table(folder / "table.md", summary["settings"])
    if name := settings.sweep.compare:
        overrides = enumerate_overrides(settings.sweep)
        summary["compared"] = compare_values(results, {describe_overrides(one): str(one[name]) for one in overrides})
        write_table(folder / "comparison.md", summary["compared"])
    write_result(folder, summary)
    plot_first_steps(folder / "first_steps.png", _runs_by_setting(settings))
    rows = summary.get("compared") or summary["settings"]
    show_table(settings.run.name, list(rows[0]), [list(row.values()) for row in rows])
    return summary


def trial_settings(settings: Config, trial: AdapterTrial) -> adapter_train.Config:
    """A trial's settings for adapter-train; equal settings have the same run folder.

    Raises ConfigError for a hyperparameter that does not exist, or a value that it cannot take.
    """
    common = {name: value for name, value in to_dict(settings).items() if name != "sweep"}
    own = load(adapter_train.Config, common, {**trial.overrides, "train.seed": trial.seed})
    values = to_dict(own)
    changed = {
        name: _nested(values, name) for name in trial.overrides if _nested(values, name) != _nested(common, name)
    }
    name = f"seed{trial.seed}-{fingerprint([changed, trial.seed])[:10]}"
    storage, cache = str(settings.run.folder / "trials"), str(settings.run.cache_folder)
    return replace(own, run=replace(own.run, name=name, storage=storage, cache=cache))


def evaluation_settings(
    settings: Config, trained: adapter_train.Config, adapter: str | None = None
) -> adapter_eval.Config:
    """The settings that measure a trial's adapter; without the adapter, as far as they are known before training."""
    source = {"split": "val", **{k: v for k, v in to_dict(settings.sweep.scienceqa).items() if v is not None}}
    values = to_dict(trained)
    return load(
        adapter_eval.Config,
        {
            "base": values["base"],
            "vision": values["vision"] if adapter else None,
            "adapter": adapter,
            "task": "scienceqa",
            "allow_training_records": True,  # a problem that stands in both splits stops no sweep
            "data": {"path": [source], "template": trained.data.template, "max_length": trained.data.max_length},
            "scale": {name: values["scale"][name] for name in ("workers", "cpus_per_worker", "gpus_per_worker")},
            "run": {**values["run"], "name": "eval", "storage": str(trained.run.folder)},
        },
    )


def evaluation_identity(settings: Config, trained: adapter_train.Config) -> str | None:
    """Fingerprint of what a trial's accuracy depends on besides its adapter; None if accuracy is not measured."""
    if settings.sweep.scienceqa is None:
        return None
    evaluation = evaluation_settings(settings, trained)
    checked = adapter_eval.check(evaluation)
    identity = adapter_eval.task_identity(evaluation, checked, reads_images=trained.vision is not None)
    return fingerprint(identity)[:10]


def finished_results(settings: Config, trials: Sequence[AdapterTrial]) -> list[AdapterTrialResult]:
    """The results of those trials that are trained, and measured on what the sweep measures on now."""
    results = []
    for trial in trials:
        own = trial_settings(settings, trial)
        result = read_adapter_result(own.run.folder)
        if result and result.evaluated_on == evaluation_identity(settings, own):
            results.append(replace(result, setting=describe_overrides(trial.overrides)))
    return results


def train_trial(
    point: dict[str, int], *, settings: Config, trials: Sequence[AdapterTrial], worker: Mapping[str, float]
) -> None:
    """Tune's trainable: train and measure the trial of this number, and write its `trial.json`.

    worker: the resources that each of its training workers reserves.
    """
    trial = trials[point["trial"]]
    own = trial_settings(settings, trial)
    scale = {**to_dict(own.scale), "cpus_per_worker": worker["CPU"], "gpus_per_worker": worker.get("GPU", 0)}
    own = load(adapter_train.Config, {**to_dict(own), "scale": scale})
    trained = adapter_train.run(own)
    rows = [row for row in read_jsonl(own.run.folder / "metrics.jsonl") if "loss" in row]
    losses = [row["loss"] for row in rows]
    result = AdapterTrialResult(
        setting=describe_overrides(trial.overrides),
        seed=trial.seed,
        run=own.run.name,
        trainable_parameters=trained["trainable_parameters"],
        first_loss=losses[0],
        peak_loss=max(losses),
        final_loss=statistics.mean(losses[-10:]),
        val_loss=trained["val_loss"],
        evaluated_on=evaluation_identity(settings, own),
        adapter_bytes=(own.run.folder / adapter_train.ADAPTER_FILE).stat().st_size,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in rows),
    )
    if settings.sweep.scienceqa is not None:
        evaluation = evaluation_settings(settings, own, str(own.run.folder / adapter_train.ADAPTER_FILE))
        evaluation = replace(evaluation, run=replace(evaluation.run, name=f"eval-{result.evaluated_on}"))
        result = replace(result, accuracy=adapter_eval.run(evaluation)["accuracy"])
    result.write(own.run.folder)
    tune.report(result.row())


def _refuse_test_split(settings: Config, trained: adapter_train.Config) -> None:
    sources = trained.data.val_sources()
    if settings.sweep.scienceqa is not None:
        sources += adapter_eval.check(evaluation_settings(settings, trained)).sources
    if any(source.split == "test" for source in sources):
        raise ConfigError(
            "a sweep chooses, and test is not for choosing: name val in data.val_path and sweep.scienceqa, and measure "
            "what is chosen with adapter-eval"
        )


def _worker_resources(settings: Config) -> dict[str, float]:
    """Resources of each training worker with which the workers of all simultaneous trials fit into the cluster."""
    workers = settings.scale.workers.max * settings.sweep.at_once
    return replace(settings.scale, workers=WorkerRange(min=workers, max=workers)).resources()


def _runs_by_setting(settings: Config) -> list[tuple[str, list[Path]]]:
    """Each setting's name, and the run folders of its seeds."""
    return [
        (
            describe_overrides(overrides),
            [_folder(settings, AdapterTrial(overrides, seed)) for seed in settings.sweep.seeds],
        )
        for overrides in enumerate_overrides(settings.sweep)
    ]


def _folder(settings: Config, trial: AdapterTrial) -> Path:
    return trial_settings(settings, trial).run.folder


def _nested(values: Any, name: str) -> Any:
    """The value of a dotted name in nested mappings, some of which may be null."""
    return functools.reduce(lambda section, key: (section or {}).get(key), name.split("."), values)
