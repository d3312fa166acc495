"""The trials of adapter-tune: adapter-train's settings for each, its training within limits, and its result."""

import functools
import json
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from ray import tune

from rayjobs.config import load, to_dict
from rayjobs.errors import ConfigError, NonFiniteLossError
from rayjobs.job_configs.adapter_tune import Config
from rayjobs.jobs import adapter_eval, adapter_train
from rayjobs.reporting.report import read_metrics
from rayjobs.runs.provenance import refuse_changes
from rayjobs.runs.record import finish_run
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.train.ray_workarounds import abort_training
from rayjobs.tune.adapter_trial import (
    ADAPTER_TRIAL_FILE,
    AdapterTrial,
    AdapterTrialResult,
    Point,
    describe_overrides,
    outcome,
    read_adapter_result,
    step_to_stop_at,
)

WATCH_EVERY_S = 1.0
"""Time between two looks at the held-out losses of a trial that has limits."""
ENDED_WITHIN_S = 60.0
"""Longest wait for the thread of a training that was stopped. Tune ends this process after the trial in any case."""


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
    measures = {
        "task": "scienceqa",
        "allow_training_records": True,  # a problem that stands in both splits stops no sweep
        "data": {"path": [source], "template": trained.data.template, "max_length": trained.data.max_length},
    }
    return evaluation_of(trained, adapter, measures, trained.run.folder)


def evaluation_of(
    trained: adapter_train.Config, adapter: str | None, measures: Mapping[str, Any], storage: Path
) -> adapter_eval.Config:
    """Settings of adapter-eval for the model of a training run, with or without its adapter.

    measures: what is measured, on which records. storage: the folder in which the evaluation's own is.
    """
    values = to_dict(trained)
    return load(
        adapter_eval.Config,
        {
            **measures,
            "base": values["base"],
            "vision": values["vision"] if adapter else None,
            "adapter": adapter,
            "scale": {name: values["scale"][name] for name in ("workers", "cpus_per_worker", "gpus_per_worker")},
            "run": {**values["run"], "name": "eval", "storage": str(storage)},
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


def trial_folder(settings: Config, trial: AdapterTrial) -> Path:
    """The run folder of a trial."""
    return trial_settings(settings, trial).run.folder


def results_of(settings: Config, point: Point) -> list[AdapterTrialResult]:
    """The results of a point's trials that are over, and measured on what the sweep measures on now."""
    results: list[AdapterTrialResult] = []
    for number, trial in enumerate(point.trials):
        own = trial_settings(settings, trial)
        result = read_adapter_result(own.run.folder)
        if result is None or not result.holds_under(point.limits_of(number)):
            break
        if result.status == "finished" and result.evaluated_on != evaluation_identity(settings, own):
            break
        results.append(replace(result, setting=point.setting))
    return results


class TrialChecks:
    """Checks trials before they are trained, and before the results of earlier ones are taken for theirs."""

    def __init__(self, settings: Config, *, weights: bool) -> None:
        """weights: False to leave the weights of a base on the hub there."""
        self.settings, self.weights = settings, weights
        self.opened: dict[str, adapter_train.Inputs] = {}
        """Inputs by the settings that name them: an encoder takes seconds to load."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": {}}  # Tune pickles a study with what it asks

    @property
    def have_weights(self) -> bool:
        """Return whether every base's weights are there, without which trials of other settings are not noticed."""
        return all(inputs.checkpoint.has_weights for inputs in self.opened.values())

    def check(self, trial: AdapterTrial) -> None:
        """Check the settings of a trial, and that its folder has no trial of other settings or data.

        Raises a UserError for the first problem; ProvenanceError, which names each difference, for another trial.
        """
        own = trial_settings(self.settings, trial)
        named = json.dumps([to_dict(own)[name] for name in ("base", "data", "vision")])
        if named not in self.opened:
            self.opened[named] = adapter_train.open_inputs(own, weights=self.weights)
            self._refuse_test_split(own)
        changes = adapter_train.check_fit(own, self.opened[named])
        if (own.run.folder / ADAPTER_TRIAL_FILE).exists():  # a trial that diverged may be over without a checkpoint
            refuse_changes(own.run.folder, changes, "choose another run.name, or remove that folder")

    def known_outcome(self, point: Point) -> dict[str, Any] | None:
        """The outcome of a point whose trials are over, for the search; None if there is something to run.

        Raises ProvenanceError if one of its folders has a trial of other settings or data.
        """
        for trial in point.trials:
            if trial_folder(self.settings, trial).exists():
                self.check(trial)
        results = results_of(self.settings, point)
        return outcome(results) if point.is_over(results) else None

    def _refuse_test_split(self, own: adapter_train.Config) -> None:
        sources = own.data.val_sources()
        if self.settings.sweep.scienceqa is not None:
            sources += adapter_eval.check(evaluation_settings(self.settings, own), weights=self.weights).sources
        if any(source.split == "test" for source in sources):
            raise ConfigError(
                "a sweep chooses, and test is not for choosing: name val in data.val_path and sweep.scienceqa, and "
                "measure what is chosen with adapter-eval"
            )


def train_point(config: dict[str, Point], *, settings: Config, worker: Mapping[str, float]) -> None:
    """Tune's trainable: train and measure a point's trials, write the `trial.json` of each, and report the outcome.

    worker: the resources that each of the training workers reserves.
    """
    point = config["point"]
    results = results_of(settings, point)
    while not point.is_over(results):
        number = len(results)
        results.append(train_trial(settings, point.trials[number], point.limits_of(number), worker))
    tune.report(outcome(results))


def train_trial(
    settings: Config, trial: AdapterTrial, limits: Mapping[int, float], worker: Mapping[str, float]
) -> AdapterTrialResult:
    """Train and measure a trial, and write its `trial.json`."""
    own = reserving(trial_settings(settings, trial), worker)
    began = time.monotonic()
    trained = train_within(own, limits)
    metrics, curve = read_metrics(own.run.folder), held_out_curve(own.run.folder)
    if (last := step_to_stop_at(curve, limits)) is not None:  # steps after it were made before it was noticed
        metrics, curve = [row for row in metrics if row["step"] <= last], [pair for pair in curve if pair[0] <= last]
    rows = [row for row in metrics if "loss" in row]
    losses = [row["loss"] for row in rows]
    result = AdapterTrialResult(
        setting=describe_overrides(trial.overrides),
        seed=trial.seed,
        run=own.run.name,
        status="stopped" if last is not None else "finished" if trained else "diverged",
        first_loss=losses[0] if losses else None,
        peak_loss=max(losses, default=None),
        final_loss=statistics.mean(losses[-10:]) if losses else None,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in rows) if rows else None,
        steps=rows[-1]["step"] if rows else 0,
        seconds=time.monotonic() - began,
        val_steps=[step for step, _ in curve],
        val_losses=[loss for _, loss in curve],
    )
    if result.status == "finished":
        result = measure(settings, own, result, trained)
    result.write(own.run.folder)
    return result


def reserving(own: adapter_train.Config, worker: Mapping[str, float]) -> adapter_train.Config:
    """Return the settings with workers that reserve these resources each."""
    scale = {**to_dict(own.scale), "cpus_per_worker": worker["CPU"], "gpus_per_worker": worker.get("GPU", 0)}
    return load(adapter_train.Config, {**to_dict(own), "scale": scale})


def measure(
    settings: Config, own: adapter_train.Config, result: AdapterTrialResult, trained: Mapping[str, Any]
) -> AdapterTrialResult:
    """The result of a finished trial with what its adapter shows. trained: the result of its training run."""
    adapter = own.run.folder / adapter_train.ADAPTER_FILE
    result = replace(
        result,
        trainable_parameters=trained["trainable_parameters"],
        val_loss=trained["val_loss"],
        adapter_bytes=adapter.stat().st_size,
        peak_memory_bytes=trained.get("peak_memory_bytes"),
        evaluated_on=evaluation_identity(settings, own),
    )
    if settings.sweep.scienceqa is None:
        return result
    evaluation = evaluation_settings(settings, own, str(adapter))
    evaluation = replace(evaluation, run=replace(evaluation.run, name=f"eval-{result.evaluated_on}"))
    return replace(result, accuracy=adapter_eval.run(evaluation)["accuracy"])


def train_within(own: adapter_train.Config, limits: Mapping[int, float]) -> dict[str, Any]:
    """Train until a limit is passed; return adapter-train's result, empty if it was stopped or diverged."""
    training = Future[dict[str, Any]]()
    Thread(target=_train, args=(own, training), daemon=True).start()
    while not training.done():
        wait([training], timeout=WATCH_EVERY_S)
        if limits and step_to_stop_at(held_out_curve(own.run.folder), limits) is not None and not training.done():
            abort_training()
            wait([training], timeout=ENDED_WITHIN_S)
            finish_run(own.run.folder, own.JOB, "interrupted")
            return {}
    try:
        return training.result()
    except NonFiniteLossError:
        return {}


def _train(own: adapter_train.Config, training: "Future[dict[str, Any]]") -> None:
    try:
        training.set_result(adapter_train.run(own))
    except BaseException as error:
        training.set_exception(error)


def held_out_curve(run: Path) -> list[tuple[int, float]]:
    """(step, held-out loss) of a training run so far, from the first step on."""
    return [(row["step"], row["val_loss"]) for row in read_metrics(run) if "val_loss" in row and row["step"]]


def _nested(values: Any, name: str) -> Any:
    """The value of a dotted name in nested mappings, some of which may be null."""
    return functools.reduce(lambda section, key: (section or {}).get(key), name.split("."), values)
