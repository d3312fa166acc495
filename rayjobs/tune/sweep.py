"""Run a sweep: Ray Tune runs its trials by grid, at random, by successive halving (ASHA) or by Optuna's suggestions.

A sweep that was killed and is started again ends as if it had not been. A trial that is over has written its
`result.json` and is not run again. A grid and random settings are enumerated beforehand. An Optuna study starts again
and makes the same suggestions, because it gets the same results in the same order. ASHA gets the accuracies of the
earlier trials. Two drivers that run one sweep at the same time do no harm.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray import tune
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.console import Progress
from rayjobs.tune.optuna_study import Study
from rayjobs.tune.rival_trial import run_rival
from rayjobs.tune.schedulers import GroupedASHAScheduler
from rayjobs.tune.search_space import (
    SearchConfig,
    Setting,
    SpaceConfig,
    Trial,
    enumerate_trials,
    group_settings,
    method_space,
)
from rayjobs.tune.trial import TRIAL_FILE, SharedInputs, TrialResult, read_trial_result, run_trial, stop_trial
from rayjobs.tune.tuner import run_tuner

Results = list[tuple[Trial, TrialResult]]

_LOST_WORKER = (NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError)
_FRUITLESS_ATTEMPTS = 3
"""Runs of Tune one after the other in which workers die and no trial ends, after which the sweep fails."""


@dataclass(frozen=True)
class TrialPool:
    """Trials that run at the same time, and the resources of each."""

    concurrent_trials: int
    resources: Mapping[str, float]
    """CPU and GPU of each trial"""


def run_sweep(
    space: SpaceConfig,
    settings: Sequence[Setting],
    shared: SharedInputs,
    search: SearchConfig,
    folder: Path,
    pool: TrialPool,
) -> Results:
    """Run the trials that have no result yet; return all trials that are over, with their results.

    Args:
        settings: those to try; for optuna, those to suggest from.
        folder: holds a folder for each trial.
    """
    trials = enumerate_trials(space, settings)
    rivals = [trial for trial in trials if trial.setting.rival]  # neither stopped early nor suggested: all are run
    own = [setting for setting in settings if not setting.rival]
    earlier = sum(read_trial_result(trial, folder) is not None for trial in trials)
    total = _planned_trials(space, search, trials)
    with Progress("tune", unit="trials", total=total, done=earlier) as bar, reraise_user_errors():
        sweep = _Sweep(shared, search, folder, pool, bar)
        if search.method == "optuna":
            results = sweep.progress.results(_run_studies(sweep, space, own))
        elif search.method == "asha":
            results = _run_asha(sweep, space, enumerate_trials(space, own))
        else:
            sweep.run(trials)
            return sweep.progress.results(trials)
        sweep.run(rivals)
        return results + sweep.progress.results(rivals)


def _planned_trials(space: SpaceConfig, search: SearchConfig, trials: Sequence[Trial]) -> int:
    if search.method != "optuna":
        return len(trials)
    studies = {trial.group_key(search.compare) for trial in trials if not trial.setting.rival}
    rivals = sum(bool(trial.setting.rival) for trial in trials)
    return search.samples * len(studies) * len(space.seeds) + rivals


def _run_asha(sweep: "_Sweep", space: SpaceConfig, trials: Sequence[Trial]) -> Results:
    """Successive halving on the first seed; the settings that finish are run with the other seeds."""
    first_seed = [trial for trial in trials if trial.seed == space.seeds[0]]
    sweep.run(first_seed, halving=True)
    results = sweep.progress.results(first_seed)
    finished = {(trial.shots, trial.setting) for trial, result in results if result.status == "finished"}
    others = [t for t in trials if t.seed != space.seeds[0] and (t.shots, t.setting) in finished]
    sweep.run(others)
    return results + sweep.progress.results(others)


def _run_studies(sweep: "_Sweep", space: SpaceConfig, settings: Sequence[Setting]) -> list[Trial]:
    """An Optuna study for each K and each combination of compared values; returns the trials that were suggested."""
    suggested: dict[str, Trial] = {}
    for shots in space.shots:
        possible = [setting for setting in settings if shots or setting.generated]  # without images there is no cache
        for candidates in group_settings(possible, sweep.search.compare):
            method = candidates[0].method
            lr = method_space(space, method).lr if space.methods else space.lr
            trials = sweep.run_study(partial(Study, space, shots, candidates, lr, sweep.search))
            suggested |= {trial.name: trial for trial in trials}
    return list(suggested.values())


class _Attempt(NamedTuple):
    """One run of Ray Tune."""

    trials: list[Trial]
    errors: Sequence[BaseException]


class _Sweep:
    """Runs trials with Ray Tune on one copy of the shared inputs."""

    def __init__(
        self, shared: SharedInputs, search: SearchConfig, folder: Path, pool: TrialPool, bar: Progress
    ) -> None:
        self.search, self.folder, self.pool = search, folder, pool
        self.shared = ray.put(shared)  # once, however often Tune runs
        self.progress = SweepProgress(bar, folder)

    def run(self, trials: Sequence[Trial], *, halving: bool = False) -> None:
        """Run those of the trials that have no result, each by itself; with `halving`, under ASHA."""
        self._until_complete(partial(self._run_missing, trials, halving))

    def _run_missing(self, trials: Sequence[Trial], halving: bool) -> _Attempt:
        over = {path.parent.name for path in self.folder.rglob(TRIAL_FILE)}  # one listing, not a request per trial
        missing = [trial for trial in trials if trial.name not in over or not self.progress.update([trial])]
        if not missing:
            return _Attempt([], [])
        scheduler = GroupedASHAScheduler(self.search, trials, self.progress.by_name) if halving else None
        points = {"trials": tune.grid_search([[trial] for trial in missing])}
        return _Attempt(missing, self._tune(points, tune.TuneConfig(scheduler=scheduler), halving))

    def run_study(self, make_study: Callable[[], Study]) -> list[Trial]:
        """Run all suggestions of a study; returns their trials. Each attempt asks a new study from the beginning."""
        return self._until_complete(partial(self._run_suggestions, make_study))

    def _run_suggestions(self, make_study: Callable[[], Study]) -> _Attempt:
        study = make_study()
        errors = self._tune(None, tune.TuneConfig(search_alg=study, num_samples=self.search.samples), halving=False)
        return _Attempt(study.trials, errors)

    def _until_complete(self, run: Callable[[], _Attempt]) -> list[Trial]:
        """Repeat an attempt whose only errors are dead workers; return the trials of the last one.

        Tune itself runs no trial again: it cannot tell a worker that died from an error in the code of a trial, which
        each run would meet again. Raises such an error, and that of a dead worker where attempts get nowhere.
        """
        fruitless = 0
        while fruitless < _FRUITLESS_ATTEMPTS:
            before = len(self.progress.by_name)
            attempt = run()
            if not attempt.errors:
                return attempt.trials
            if faults := [error for error in attempt.errors if not isinstance(error, _LOST_WORKER)]:
                raise faults[0]
            fruitless = fruitless + 1 if len(self.progress.by_name) == before else 0
        raise attempt.errors[0]

    def _tune(
        self, param_space: dict[str, Any] | None, tune_config: tune.TuneConfig, halving: bool
    ) -> Sequence[BaseException]:
        """Run points {"trials": trials of one setting, one after the other}; returns the errors."""
        cpus, gpus = self.pool.resources["CPU"], self.pool.resources.get("GPU", 0)
        task = TrialTask(
            search=self.search,
            folder=self.folder,
            threads=max(1, int(cpus)),
            device=worker_device(self.pool.resources),
            halving=halving,
        )
        trainable = tune.with_parameters(train_point, shared=self.shared, task=task)
        return run_tuner(
            tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
            param_space,
            self.folder.parent / "tune",
            replace(tune_config, max_concurrent_trials=self.pool.concurrent_trials, reuse_actors=True),
            self.progress,
        )


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """Everything that a Tune worker needs besides the trials and the shared inputs."""

    search: SearchConfig
    folder: Path
    threads: int
    """fixed, so that sums are added in one order wherever a trial runs"""
    device: str
    halving: bool
    """report every epoch, so that a scheduler can stop the trial"""


def train_point(point: dict[str, Any], *, shared: SharedInputs, task: TrialTask) -> None:
    """Tune's trainable: run the trials of one setting, and report their mean accuracy as the objective."""
    torch.set_num_threads(task.threads)

    def report(curve: list[float]) -> None:
        if task.halving:
            tune.report({"epoch": len(curve) - 1, "epoch_accuracy": curve[-1], "curve": list(curve)})

    def run(trial: Trial) -> TrialResult:
        if trial.setting.rival:
            return run_rival(trial, shared, task.search, task.folder)
        return run_trial(trial, shared, task.search, task.folder, task.device, report)

    results = [read_trial_result(trial, task.folder) or run(trial) for trial in point["trials"]]
    tune.report({"objective": sum(result.accuracy or 0.0 for result in results) / len(results)})


LEADER_COLUMNS = {
    "K": "shots",
    "best accuracy": "accuracy",
    "method": "method",
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
"""Columns of the live table of the best trials: heading → field of `TrialResult`."""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class SweepProgress(tune.Callback):
    """Collect the results of trials that are over; show them in the progress bar, with the best trial of every K.

    Writes the results of trials that the scheduler has stopped.
    """

    def __init__(self, bar: Progress, folder: Path) -> None:
        self.bar, self.folder = bar, folder
        self.by_name: dict[str, TrialResult] = {}
        """results by trial name"""
        self.best: dict[int, TrialResult] = {}
        """the best trial of each K"""

    def update(self, trials: Sequence[Trial]) -> bool:
        """Read the trials' results and update the display. Returns whether all of the trials are over."""
        results = [self.by_name.get(trial.name) or read_trial_result(trial, self.folder) for trial in trials]
        for result in results:
            if result and result.trial not in self.by_name:
                self.by_name[result.trial] = result
                best = self.best.get(result.shots)
                if result.correct is not None and (best is None or result.correct > (best.correct or 0)):
                    self.best[result.shots] = result
        leaders = [self.best[shots] for shots in sorted(self.best)]
        note = ", ".join(f"K={leader.shots} {leader.accuracy:.2%}" for leader in leaders)
        rows = [[_cell(getattr(leader, name)) for name in LEADER_COLUMNS.values()] for leader in leaders]
        self.bar.update(len(self.by_name), f"best: {note}" if note else "", [[*LEADER_COLUMNS], *rows])
        return all(results)

    def results(self, trials: Iterable[Trial]) -> Results:
        """Those of the trials that are over, with their results."""
        return [(trial, self.by_name[trial.name]) for trial in trials if trial.name in self.by_name]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if "objective" not in trial.last_result:
            (stopped,) = trial.config["trials"]
            stop_trial(stopped, trial.last_result["curve"], self.folder)
        self.update(trial.config["trials"])
