"""An Optuna study as a Ray Tune searcher: it asks for suggestions in batches and tells their results in order.

Which suggestions a study makes depends on the seed and on the results so far, and on nothing else: not on which of the
parallel trials ends first, nor on whether the sweep was interrupted. A restarted sweep asks a new study again; trials
that are finished return their results at once, so the study makes the same suggestions.

Optuna's own storage (`OptunaSearch(study_name=…, storage=JournalStorage(…))`) does not give this: it keeps trials, but
not the state of the sampler's random generator, so a study that is loaded again makes other suggestions; trials that
were running when the sweep was killed stay in it as running for ever; and its journal cannot lie on an object store.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher

from rayjobs.tune.search_space import Range, SearchConfig, Setting, SpaceConfig, Trial, trials_over_seeds

H = TypeVar("H", bound=Hashable)


class BatchedStudy(Searcher):
    """A study whose suggestions come in batches. Each batch is made from the results of the batches before it alone.

    A subclass says with `make_point` what is run of a suggestion. Its result has the key `objective`, unless it was
    stopped before it had one.
    """

    def __init__(self, mode: Literal["min", "max"], batch_size: int, seed: int) -> None:
        super().__init__(metric="objective", mode=mode)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.batch_size = batch_size
        sampler = optuna.samplers.TPESampler(seed=seed)
        direction = optuna.study.StudyDirection.MINIMIZE if mode == "min" else optuna.study.StudyDirection.MAXIMIZE
        self.study = optuna.create_study(direction=direction, sampler=sampler, study_name="optuna")
        self.batch: dict[str, optuna.Trial] = {}
        self.outcomes: dict[str, dict[str, Any] | None] = {}
        """{name of a suggestion of the batch: its result; None if it failed}"""
        self.failed = False

    def make_point(self, suggestion: optuna.Trial) -> dict[str, Any]:
        """Return the config of Tune's trial that runs a suggestion."""
        raise NotImplementedError

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next suggestion's point; None until the results of a full batch are known.

        After a trial that failed there are no more: what follows would depend on a result that is not known.
        """
        if self.failed:
            return self.FINISHED
        if len(self.batch) == self.batch_size:
            return None
        self.batch[trial_id] = self.study.ask()
        return self.make_point(self.batch[trial_id])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Keep a result until its whole batch is there; then tell Optuna in the order of the suggestions."""
        self.failed = self.failed or error
        self.outcomes[trial_id] = None if error else result or {}
        if len(self.outcomes) == self.batch_size:
            for name, suggestion in self.batch.items():
                self.tell(suggestion, self.outcomes[name])
            self.batch, self.outcomes = {}, {}

    def tell(self, suggestion: optuna.Trial, result: dict[str, Any] | None) -> None:
        """Tell Optuna the result of a suggestion, or that it failed."""
        objective = (result or {}).get(self.metric)
        done = TrialState.PRUNED if objective is None else TrialState.COMPLETE
        self.study.tell(suggestion, objective, state=TrialState.FAIL if result is None else done)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a restarted sweep asks a new study again instead of reading Tune's experiment state."""


class Study(BatchedStudy):
    """The study of one K and one combination of compared values.

    A suggestion is a setting, to be run at every seed; its objective is the mean validation accuracy over the seeds.
    """

    def __init__(
        self,
        space: SpaceConfig,
        shots: int,
        candidates: Sequence[Setting],
        lr: list[float] | Range,
        search: SearchConfig,
    ) -> None:
        """candidates: the settings to suggest from. lr: the learning rates, or the range of those that are NaN."""
        super().__init__("max", search.suggested_at_once, search.seed)
        self.space, self.shots, self.candidates, self.lr = space, shots, candidates, lr
        self.trials: list[Trial] = []
        """The trials of all suggestions so far."""

    def make_point(self, suggestion: optuna.Trial) -> dict[str, Any]:
        """Return the suggestion's trials, one for each seed."""
        setting = suggest_setting(suggestion, self.candidates, self.lr)
        trials = list(trials_over_seeds(self.space, self.shots, setting))
        self.trials += trials
        return {"trials": trials}


def suggest_setting(trial: optuna.Trial, candidates: Sequence[Setting], lr: list[float] | Range) -> Setting:
    """One of the candidates: Optuna suggests each hyperparameter among the candidates that remain."""
    remaining = list(candidates)
    for field in Setting._fields:
        values = _distinct(getattr(setting, field) for setting in remaining)
        if len(values) > 1:
            # Optuna needs the same choices whenever a name occurs, and which rules there are depends on the encoders
            name = f"ensemble of {remaining[0].encoders}" if field == "ensemble" else field
            value = values[trial.suggest_categorical(name, list(range(len(values))))]
            remaining = [setting for setting in remaining if getattr(setting, field) == value]
    if isinstance(lr, Range) and math.isnan(remaining[0].lr):
        return remaining[0]._replace(lr=trial.suggest_float("lr", lr.low, lr.high, log=True))
    return remaining[0]


def _distinct(values: Iterable[H]) -> list[H]:
    return list(dict.fromkeys(values))
