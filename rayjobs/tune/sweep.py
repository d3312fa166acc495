"""A sweep: Ray Tune runs trials by grid, by drawing, by successive halving (ASHA) or by Optuna's suggestions.

Whatever is killed, the same sweep started again ends as it would have: a trial that is over left its `result.json`
and is not run again. Grid and random know beforehand what they run; Optuna is asked the same questions in the same
order, and finds the answers there; ASHA is told what the trials before had reached. Two drivers on one sweep do no
harm.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayActorError

from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.console import Progress
from rayjobs.storage.paths import remove_folder
from rayjobs.tune.schedulers import BatchedSearcher, GroupedASHAScheduler
from rayjobs.tune.search_space import (
    SearchConfig,
    Setting,
    SpaceConfig,
    Trial,
    enumerate_trials,
    group_settings,
    method_space,
    over_seeds,
    suggest,
)
from rayjobs.tune.trial import RESULT, SharedInputs, read_result, run_trial, stop_trial

_ATTEMPTS = 3


def run_sweep(
    space: SpaceConfig,
    settings: Sequence[Setting],
    shared: SharedInputs,
    how: SearchConfig,
    folder: Path,
    *,
    at_once: int,
    resources: Mapping[str, float],
) -> list[tuple[Trial, dict[str, Any]]]:
    """Every trial that is over, with its row; only those that are not are run.

    Args:
        settings: those to try, or for optuna to suggest from.
        folder: of the trials' own folders.
        at_once: trials that run side by side.
        resources: CPU and GPU of each.
    """
    trials = enumerate_trials(space, settings)
    if how.method == "optuna":
        total = how.samples * len({(t.shots, repr(t.setting.group(how.compare))) for t in trials}) * len(space.seeds)
    else:
        total = len(trials)
    earlier = sum(read_result(trial, folder) is not None for trial in trials)
    with Progress("tune", unit="trials", total=total, done=earlier) as bar, reraise_user_errors():
        tuning = _Tuning(shared, how, folder, at_once, resources, bar)
        if how.method == "optuna":
            return [pair for shots in space.shots for pair in _by_suggestions(tuning, space, shots, settings)]
        if how.method == "asha":
            racing = [trial for trial in trials if trial.seed == space.seeds[0]]
            over = tuning.run(racing, lambda: GroupedASHAScheduler(how, racing, tuning.watch.over))
            through = {(trial.shots, trial.setting) for trial, row in over if row["status"] == "finished"}
            later = [t for t in trials if t.seed != space.seeds[0] and (t.shots, t.setting) in through]
            return over + tuning.run(later)
        return tuning.run(trials)


def _by_suggestions(
    tuning: "_Tuning", space: SpaceConfig, shots: int, settings: Sequence[Setting]
) -> list[tuple[Trial, dict[str, Any]]]:
    """A study for each compared group at one K, its objective the mean over seeds of the val accuracy."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    how = tuning.how
    found: dict[str, Trial] = {}
    for within in group_settings((s for s in settings if shots or s.generated), how.compare):
        own = method_space(space, within[0].method) if space.methods else space
        asked: list[Trial] = []

        def suggested(
            study: Any, within: list[Setting] = within, own: SpaceConfig = own, asked: list[Trial] = asked
        ) -> dict[str, Any]:
            trials = list(over_seeds(space, shots, suggest(study, within, own.lr)))
            asked += trials
            return {"trials": trials}

        def study(asked: list[Trial] = asked, suggested: Callable = suggested) -> dict[str, Any]:
            asked.clear()
            searcher = OptunaSearch(space=suggested, metric="objective", mode="max", seed=how.seed)
            return {"search_alg": BatchedSearcher(searcher, how.suggested_at_once), "num_samples": how.samples}

        tuning.fit(study)
        found |= {trial.name: trial for trial in asked}
    return tuning.watch.rows(found.values())


class _Tuning:
    """What every run of Tune in a sweep has in common."""

    def __init__(
        self,
        shared: SharedInputs,
        how: SearchConfig,
        folder: Path,
        at_once: int,
        resources: Mapping[str, float],
        bar: Progress,
    ) -> None:
        self.how, self.folder, self.at_once = how, folder, at_once
        self.shared = ray.put(shared)  # once, however often Tune runs
        self.wanted = {"cpu": resources["CPU"], "gpu": resources.get("GPU", 0)}
        self.watch = _Watch(bar, folder)
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # results are the trials' own files
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the job, not only Tune's part of it

    def run(
        self, trials: Sequence[Trial], scheduler: "Callable[[], GroupedASHAScheduler] | None" = None
    ) -> list[tuple[Trial, dict[str, Any]]]:
        """The given trials, those that are over already apart."""

        def left() -> dict[str, Any]:
            there = {path.parent.name for path in self.folder.rglob(RESULT)}  # one listing, not a question per trial
            points = [[trial] for trial in trials if trial.name not in there or not self.watch.count([trial])]
            return {"points": points, "scheduler": scheduler and scheduler()}

        self.fit(left)
        return self.watch.rows(trials)

    def fit(self, what: Callable[[], dict[str, Any]]) -> None:
        """Runs what `what` gives `_fit`, and again what is missing where a worker died and Tune took that for an error:
        it tries a trial again only where the worker had begun with it. Raises a trial's error."""
        for attempt in range(_ATTEMPTS):
            errors = self._fit(**what())
            if not errors:
                return
            if attempt == _ATTEMPTS - 1 or not all(isinstance(error, RayActorError) for error in errors):
                raise errors[0]

    def _fit(
        self, *, points: list[list[Trial]] | None = None, num_samples: int = 1, **how: Any
    ) -> Sequence[BaseException]:
        """Runs points of the form {"trials": a setting's trials, one after the other}; returns the errors."""
        if points == []:
            return []
        param_space = None if points is None else {"trials": tune.grid_search(points)}
        # fixed, so that sums are added in one order wherever a trial runs
        threads, device = max(1, int(self.wanted["cpu"])), "cuda" if self.wanted["gpu"] else "cpu"
        search, folder, halving = self.how, self.folder, how.get("scheduler") is not None

        def trainable(point: dict[str, Any], *, shared: SharedInputs) -> None:
            torch.set_num_threads(threads)
            rows = []

            def report(curve: list[float]) -> None:
                if halving:
                    tune.report({"epoch": len(curve) - 1, "now": curve[-1], "curve": list(curve)})

            for trial in point["trials"]:
                rows.append(read_result(trial, folder) or run_trial(trial, shared, search, folder, device, report))
            tune.report({"objective": sum(row["val_accuracy"] for row in rows) / len(rows)})

        experiment = self.folder.parent / "tune" / uuid.uuid4().hex[:8]
        try:
            results = tune.Tuner(
                tune.with_resources(tune.with_parameters(trainable, shared=self.shared), self.wanted),
                param_space=param_space,
                tune_config=tune.TuneConfig(
                    num_samples=num_samples, max_concurrent_trials=self.at_once, reuse_actors=True, **how
                ),
                run_config=tune.RunConfig(
                    name=experiment.name,
                    storage_path=str(experiment.parent),
                    verbose=0,
                    callbacks=[self.watch],
                    failure_config=tune.FailureConfig(max_failures=2),
                ),
            ).fit()
        finally:
            with suppress(OSError):
                remove_folder(experiment)
        return results.errors


LEADER_COLUMNS = {
    "K": "shots",
    "best on val": "val_accuracy",
    "encoders": "encoders",
    "sentences": "sentences",
    "K'": "generated",
    "ensemble": "ensemble",
    "lr": "lr",
    "epochs": "epochs",
    "α": "chosen_alpha",
    "β": "chosen_beta",
    "seed": "seed",
}
"""Of the table that a terminal shows live: what it calls a row's values."""


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Watch(tune.Callback):
    """Moves the progress bar with the best of every K beneath it; writes the rows of trials that were stopped."""

    def __init__(self, bar: Progress, folder: Path) -> None:
        self.bar, self.folder = bar, folder
        self.over: dict[str, dict[str, Any]] = {}
        self.best: dict[int, dict[str, Any]] = {}

    def count(self, trials: Sequence[Trial]) -> bool:
        """Takes notice of the trials that are over; whether all of them are."""
        rows = [self.over.get(trial.name) or read_result(trial, self.folder) for trial in trials]
        for row in rows:
            if row and row["trial"] not in self.over:
                self.over[row["trial"]] = row
                best = self.best.get(row["shots"])
                if row["status"] == "finished" and (best is None or row["val_correct"] > best["val_correct"]):
                    self.best[row["shots"]] = row
        leaders = [self.best[shots] for shots in sorted(self.best)]
        told = ", ".join(f"K={row['shots']} {row['val_accuracy']:.2%}" for row in leaders)
        table = [[_cell(row[name]) for name in LEADER_COLUMNS.values()] for row in leaders]
        self.bar.update(len(self.over), f"best on val: {told}" if told else "", [[*LEADER_COLUMNS], *table])
        return all(rows)

    def rows(self, trials: Iterable[Trial]) -> list[tuple[Trial, dict[str, Any]]]:
        """The trials that are over, with their rows."""
        return [(trial, self.over[trial.name]) for trial in trials if trial.name in self.over]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if "objective" not in trial.last_result:
            (stopped,) = trial.config["trials"]
            stop_trial(stopped, trial.last_result["curve"], self.folder)
        self.count(trial.config["trials"])
