"""Trial schedulers and searchers for Ray Tune: successive halving within groups, suggestions in batches."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from rayjobs.tune.search_space import (
    SearchConfig,
    Trial,
)


class GroupedASHAScheduler(FIFOScheduler):
    """ASHA within each K and compared group: a trial with one image of each class is no rival of one with sixteen."""

    def __init__(self, how: SearchConfig, trials: Sequence[Trial], over: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        epochs = max((trial.setting.epochs for trial in trials), default=0)
        self.how = how
        self.races = {
            self._race(trial): ASHAScheduler(
                time_attr="epoch",
                metric="now",
                mode="max",
                max_t=max(epochs, how.grace_epochs),
                grace_period=how.grace_epochs,
                reduction_factor=how.reduction,
                stop_last_trials=False,
            )
            for trial in trials
        }
        for trial in trials:  # what an earlier start of the sweep has seen
            if row := over.get(trial.name):
                past: Any = SimpleNamespace(trial_id=trial.name, config={"trials": [trial]})
                self.on_trial_add(None, past)
                for epoch, now in enumerate(row["val_curve"]):
                    self.on_trial_result(None, past, {"epoch": epoch, "now": now})

    def _race(self, trial: Trial) -> str:
        return repr((trial.shots, trial.setting.group(self.how.compare)))

    def _of(self, trial: Any) -> ASHAScheduler:
        return self.races[self._race(trial.config["trials"][0])]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)


class BatchedSearcher(Searcher):
    """A searcher asked for whole batches and told their results in the order it was asked, so that what it suggests
    does not depend on which trial happens to end first, and a sweep can be gone through again."""

    def __init__(self, asked_of: Searcher, size: int) -> None:
        super().__init__(metric=asked_of.metric, mode=asked_of.mode)
        self.asked_of, self.size = asked_of, size
        self.asked: list[str] = []
        self.told: dict[str, tuple[Any, bool]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if len(self.asked) == self.size:
            return None
        self.asked.append(trial_id)
        return self.asked_of.suggest(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self.told[trial_id] = (result, error)
        if len(self.told) == self.size:
            for asked in self.asked:
                self.asked_of.on_trial_complete(asked, *self.told[asked])
            self.asked, self.told = [], {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on by asking again, not from what Tune keeps."""
