"""Optuna's search over adapter-train's settings, with weak trials stopped early.

Like every `BatchedStudy`, it does not depend on which of the parallel trials ends first, nor on whether the sweep was
interrupted. That holds for stopping too: the limits of a trial are known when it is suggested, because they are
percentiles of what finished trials of earlier batches had reached, as in Optuna's PercentilePruner; ASHA and pruners of
running trials compare with whatever happens to be there. What is finished is not run again: the study takes its result
and goes on.
"""

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from rayjobs.tune.adapter_trial import AdapterTrial, Point
from rayjobs.tune.optuna_study import BatchedStudy
from rayjobs.tune.search_space import Range
from rayjobs.tune.sweep_config import SweepConfig

TOP_SHARE = 0.25
"""Share of the settings, the best ones, that the importance of a hyperparameter is told from."""
Axis = list[Any] | Range


class AdapterStudy(BatchedStudy):
    """The study of a sweep, or of one value of `sweep.compare`. Its objective is minimized."""

    def __init__(
        self,
        sweep: SweepConfig,
        fixed: Mapping[str, Any],
        known: Callable[[Point], dict[str, Any] | None],
        points: list[Point],
    ) -> None:
        """Begin a study.

        Args:
            sweep: the space and the rules.
            fixed: values of axes that are not searched.
            known: returns the outcome of a point that is over, as `rayjobs.tune.adapter_trial.outcome` does, or None.
            points: the list to which each point is appended.
        """
        super().__init__("min", sweep.suggested_at_once, sweep.seed)
        self.sweep, self.fixed, self.known = sweep, fixed, known
        self.axes = {name: distinct(axis) for name, axis in sweep.axes.items() if name not in fixed}
        self.rng = random.Random(sweep.seed)
        self.points, self.suggested = points, 0
        self.steps, self.seconds = 0, 0.0
        """Optimizer steps and time of the trials of whole batches."""
        self.tried: set[str] = set()
        self.exhausted = False
        self.waiting: tuple[str, dict[str, Any]] | None = None
        """Name and point of a suggestion that has to be run."""
        self.names: dict[str, str] = {}
        """{Tune's id of a trial: name of its suggestion}"""

    def is_over(self) -> bool:
        """Return whether nothing more is suggested: all samples are, a budget is used up, or every setting is tried."""
        budget_steps, budget_minutes = self.sweep.budget_steps, self.sweep.budget_minutes
        return (
            self.exhausted
            or self.suggested >= self.sweep.samples
            or (budget_steps is not None and self.steps >= budget_steps)
            or (budget_minutes is not None and self.seconds / self.sweep.at_once >= 60 * budget_minutes)
        )

    def advance(self) -> bool:
        """Take the results that are known until a suggestion has to be run; return whether there is one."""
        while self.waiting is None and len(self.batch) < self.batch_size and not self.is_over():
            suggestion = self._ask()
            if suggestion is None:
                self.exhausted = True
                break
            name, point = f"suggestion {self.suggested}", self.make_point(suggestion)
            self.batch[name] = suggestion
            result = self.known(point["point"])
            if result is None:
                self.waiting = name, point
            else:
                super().on_trial_complete(name, result)
        return self.waiting is not None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """See `BatchedStudy.suggest`."""
        if self.failed:
            return self.FINISHED
        if not self.advance() or self.waiting is None:
            return self.FINISHED if self.is_over() else None
        self.names[trial_id], point = self.waiting
        self.waiting = None
        return point

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See `BatchedStudy.on_trial_complete`."""
        super().on_trial_complete(self.names[trial_id], result, error)

    def tell(self, suggestion: optuna.Trial, result: dict[str, Any] | None) -> None:
        """See `BatchedStudy.tell`; the held-out losses along the way are told too."""
        if result:
            for step, loss in result["curve"]:
                suggestion.report(loss, int(step))
            self.steps, self.seconds = self.steps + result["steps"], self.seconds + result["seconds"]
        super().tell(suggestion, result)

    def make_point(self, suggestion: optuna.Trial) -> dict[str, Any]:
        """Return the suggestion's trials, one for each seed, with the limits that hold for the first."""
        overrides = self._overrides(suggestion)
        self.tried.add(_key(overrides))
        trials = [AdapterTrial(overrides, seed) for seed in self.sweep.seeds]
        self.points.append(Point(trials=trials, limits=self.limits()))
        self.suggested += 1
        return {"point": self.points[-1]}

    def limits(self) -> dict[int, float]:
        """Return {step: held-out loss above which a trial that begins now is stopped}."""
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if self.sweep.keep_percent is None or len(finished) < self.sweep.keep_first:
            return {}
        losses: dict[int, list[float]] = {}
        for trial in finished:
            for step, loss in trial.intermediate_values.items():
                if step >= max(1, self.sweep.keep_steps):  # before the first step all have the base's loss
                    losses.setdefault(step, []).append(loss)
        return {step: float(np.percentile(of_step, self.sweep.keep_percent)) for step, of_step in losses.items()}

    def _ask(self) -> optuna.Trial | None:
        """Ask for a setting that was not suggested before; None if there is none left.

        In place of one that was, a random one of the others is taken.
        """
        suggestion = self.study.ask()
        if _key(self._overrides(suggestion)) not in self.tried:
            return suggestion
        self.study.tell(suggestion, state=TrialState.FAIL)
        size = math.prod(math.inf if isinstance(axis, Range) else len(axis) for axis in self.axes.values())
        if len(self.tried) >= size:
            return None
        while True:
            drawn = {name: self._draw(axis) for name, axis in self.axes.items()}
            if _key(self._values(drawn)) not in self.tried:
                self.study.enqueue_trial(drawn)
                return self.study.ask()

    def _draw(self, axis: Axis) -> int | float:
        return axis.draw(self.rng) if isinstance(axis, Range) else self.rng.randrange(len(axis))

    def _overrides(self, suggestion: optuna.Trial) -> dict[str, Any]:
        suggested: dict[str, int | float] = {}
        for name, axis in self.axes.items():
            if isinstance(axis, Range):
                suggested[name] = suggestion.suggest_float(name, axis.low, axis.high, log=True)
            else:
                suggested[name] = suggestion.suggest_categorical(name, list(range(len(axis))))
        return self._values(suggested)

    def _values(self, suggested: Mapping[str, int | float]) -> dict[str, Any]:
        """Return the overrides of a suggestion, in the order of the sweep's axes."""
        values = {name: axis_value(axis, suggested[name]) for name, axis in self.axes.items()}
        return {name: self.fixed[name] if name in self.fixed else values[name] for name in self.sweep.axes}


def distinct(axis: Axis) -> Axis:
    """Return an axis with each of its values once."""
    return axis if isinstance(axis, Range) else list({_key(value): value for value in axis}.values())


def axis_value(axis: Axis, suggested: int | float) -> Any:
    """Return the value that a suggestion stands for: one of a list by its place, one of a range in four digits."""
    if isinstance(axis, Range):
        return min(max(float(f"{suggested:.4g}"), axis.low), axis.high)
    return axis[int(suggested)]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def importances(axes: Mapping[str, Axis], outcomes: Sequence[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    """Return how much each hyperparameter tells the best settings from the others, by PED-ANOVA, as shares of 1.

    outcomes: (overrides, objective to minimize) of each setting. Hyperparameters with a single value are left out.
    """
    searched = {name: distinct(axis) for name, axis in axes.items()}
    searched = {name: axis for name, axis in searched.items() if isinstance(axis, Range) or len(axis) > 1}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize")
    for overrides, objective in outcomes:
        params, distributions = dict[str, Any](), dict[str, BaseDistribution]()
        for name, axis in searched.items():
            if isinstance(axis, Range):
                params[name], distributions[name] = overrides[name], FloatDistribution(axis.low, axis.high, log=True)
            else:
                params[name] = [_key(value) for value in axis].index(_key(overrides[name]))
                distributions[name] = CategoricalDistribution(range(len(axis)))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=objective))
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE))
