"""Successive halving (ASHA) among trials that can be compared with each other."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from rayjobs.tune.search_space import SearchConfig, Trial
from rayjobs.tune.trial import TrialResult


class GroupedASHAScheduler(FIFOScheduler):
    """One ASHA scheduler for each K and each combination of compared values.

    A trial with one image per class is not compared with one that has sixteen. Results of an earlier start of the sweep
    count as if their trials ran now.
    """

    def __init__(self, search: SearchConfig, trials: Sequence[Trial], earlier: Mapping[str, TrialResult]) -> None:
        """earlier: results by trial name."""
        super().__init__()
        self.search = search
        self.max_epochs = max((trial.setting.epochs for trial in trials), default=0)
        self.schedulers = {trial.group_key(search.compare): self._asha() for trial in trials}
        for trial in trials:
            if trial.name in earlier:
                self._replay(trial, earlier[trial.name].curve)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._scheduler(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._scheduler(trial).on_trial_result(tune_controller, trial, result)

    def _asha(self) -> ASHAScheduler:
        return ASHAScheduler(
            time_attr="epoch",
            metric="epoch_accuracy",
            mode="max",
            max_t=max(self.max_epochs, self.search.grace_epochs),
            grace_period=self.search.grace_epochs,
            reduction_factor=self.search.reduction,
            stop_last_trials=False,
        )

    def _scheduler(self, trial: Any) -> ASHAScheduler:
        return self.schedulers[trial.config["trials"][0].group_key(self.search.compare)]

    def _replay(self, trial: Trial, curve: Sequence[float]) -> None:
        """Feed an earlier trial's accuracies to the scheduler."""
        earlier: Any = SimpleNamespace(trial_id=trial.name, config={"trials": [trial]})
        self.on_trial_add(None, earlier)
        for epoch, accuracy in enumerate(curve):
            self.on_trial_result(None, earlier, {"epoch": epoch, "epoch_accuracy": accuracy})
