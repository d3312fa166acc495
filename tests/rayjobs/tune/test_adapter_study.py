"""A search over adapter-train's settings: the same whichever trial ends first, after a restart, and with stops.

The trials are a formula: their held-out loss falls over ten steps to a value that depends on the setting.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from rayjobs.config import load
from rayjobs.tune.adapter_study import AdapterStudy, importances
from rayjobs.tune.adapter_trial import Point, step_to_stop_at
from rayjobs.tune.search_space import Range
from rayjobs.tune.sweep_config import SweepConfig

AXES = {"optimizer.base_lr": {"low": 1e-4, "high": 1.0}, "adapter.rank": [2, 4, 8]}
STEPS = range(1, 11)
COMPLETE, PRUNED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED


def sweep(**changes: Any) -> SweepConfig:
    return load(SweepConfig, {"axes": AXES, "method": "optuna", "suggested_at_once": 3, "samples": 18, **changes})


def train(point: Point) -> dict[str, Any]:
    """The outcome of a point, stopped where its limits say so."""
    overrides = point.overrides
    end = 1 + (math.log10(overrides["optimizer.base_lr"]) + 2) ** 2 + 1 / overrides["adapter.rank"]
    curve = [[step, end + 5 / step] for step in STEPS]
    stop = step_to_stop_at([(step, loss) for step, loss in curve], point.limits)
    if stop is not None:
        return {"objective": None, "curve": curve[:stop], "steps": stop, "seconds": 60.0 * stop}
    return {"objective": curve[-1][1], "curve": curve, "steps": len(curve), "seconds": 60.0 * len(curve)}


Outcomes = dict[str, dict[str, Any]]
Order = Callable[[list[str]], list[str]]


def run(
    settings: SweepConfig, order: Callable[[list[str]], list[str]], known: Outcomes, most: int = 100
) -> list[Point]:
    """The points of a search of which `most` at most are run; `known` has what was run before and gets what is run."""
    points: list[Point] = []
    study = AdapterStudy(settings, {}, lambda point: known.get(point.setting), points)
    for batch in range(100):
        running: dict[str, Point] = {}
        while isinstance(suggested := study.suggest(f"{batch}-{len(running)}"), dict):
            running[f"{batch}-{len(running)}"] = suggested["point"]
        for name in order(list(running)):
            if not most:
                return points
            most -= 1
            known[running[name].setting] = train(running[name])
            study.on_trial_complete(name, known[running[name].setting])
        if suggested == study.FINISHED:
            return points
    raise AssertionError("the search has no end")


def in_order(names: list[str]) -> list[str]:
    return names


def test_a_search_does_not_depend_on_which_trial_ends_first_and_some_are_stopped() -> None:
    outcomes: Outcomes = {}
    points = run(sweep(), in_order, outcomes)
    assert len({point.setting for point in points}) == 18
    stopped = [outcome for outcome in outcomes.values() if outcome["objective"] is None]
    assert 4 <= len(stopped) <= 14
    assert {outcome["steps"] for outcome in stopped} != {10}, "they are stopped on the way"
    assert run(sweep(), lambda names: names[::-1], {}) == points
    assert all(not point.limits for point in points[:6]), "none is stopped before four have finished"
    best = min(outcomes, key=lambda name: outcomes[name]["objective"] or math.inf)
    alone: Outcomes = {}
    run(sweep(keep_percent=None), in_order, alone)
    assert all(outcome["objective"] for outcome in alone.values())
    assert outcomes[best]["objective"] < 1.9, "near the best, 1 + 0 + 1/8 and 5/10 of the last step"


@pytest.mark.parametrize("killed_after", [1, 7, 17])
def test_a_search_that_was_killed_comes_to_the_same_end_and_runs_nothing_again(killed_after: int) -> None:
    whole = run(sweep(), in_order, {})
    known: Outcomes = {}
    run(sweep(), lambda names: random.Random(0).sample(names, len(names)), known, most=killed_after)
    assert len(known) == killed_after
    before = dict(known)
    assert run(sweep(), in_order, known) == whole
    assert len(known) == 18
    assert all(known[name] is before[name] for name in before)


def test_limits_stop_the_trials_that_optunas_percentile_pruner_prunes() -> None:
    rng = random.Random(3)
    for percent, first, steps in [(50, 4, 0), (25, 1, 3), (80, 6, 5)]:
        settings = sweep(keep_percent=percent, keep_first=first, keep_steps=steps)
        study = AdapterStudy(settings, {}, lambda _: None, [])
        pruner = optuna.pruners.PercentilePruner(percent, n_startup_trials=first, n_warmup_steps=max(steps, 1))
        theirs = optuna.create_study(pruner=pruner)
        for _ in range(12):
            curve = [(step, rng.random()) for step in range(1, rng.choice((8, 11)))]
            limits, trial, pruned = study.limits(), theirs.ask(), None
            for step, loss in curve:
                trial.report(loss, step)
                if pruned is None and trial.should_prune():
                    pruned = step
            assert step_to_stop_at(curve, limits) == pruned
            stopped = pruned is not None
            theirs.tell(trial, None if stopped else curve[-1][1], state=PRUNED if stopped else COMPLETE)
            objective = None if stopped else curve[-1][1]
            study.tell(study.study.ask(), {"objective": objective, "curve": curve, "steps": 1, "seconds": 1.0})


def test_budgets_end_a_search_after_a_batch() -> None:
    free = {"keep_percent": None}
    assert len(run(sweep(**free, budget_steps=31), in_order, {})) == 6
    assert len(run(sweep(**free, budget_minutes=30), in_order, {})) == 3
    assert len(run(sweep(**free, budget_minutes=31, at_once=2), in_order, {})) == 9


def test_every_setting_of_a_small_space_is_tried_once_and_a_compared_value_is_fixed() -> None:
    axes = {"adapter.rank": [2, 4, 8, 4], "adapter.method": ["lora", "v2"], "optimizer.base_lr": [0.1, 0.01]}
    points: list[Point] = []
    study = AdapterStudy(sweep(axes=axes, seeds=[3, 5]), {"adapter.method": "v2"}, train, points)
    assert not study.advance(), "everything is known, and nothing is left"
    assert study.is_over()
    assert len({point.setting for point in points}) == len(points) == 6
    assert {point.overrides["adapter.method"] for point in points} == {"v2"}
    assert list(points[0].overrides) == list(axes)
    assert [trial.seed for trial in points[0].trials] == [3, 5]
    assert study.suggest("a") == study.FINISHED


def test_nothing_is_suggested_after_a_trial_that_failed() -> None:
    study = AdapterStudy(sweep(), {}, lambda _: None, [])
    assert study.suggest("a")
    study.on_trial_complete("a", error=True)
    assert study.suggest("b") == study.FINISHED


def test_the_importance_is_that_of_the_hyperparameter_that_decides() -> None:
    rng = random.Random(0)
    axes: dict[str, Any] = {"a.rate": Range(low=1e-3, high=1.0), "b.kind": [["x"], ["y"]], "c.fixed": [1]}
    outcomes = []
    for _ in range(40):
        rate, kind = 10 ** rng.uniform(-3, 0), rng.choice(axes["b.kind"])
        outcomes.append(({"a.rate": rate, "b.kind": kind, "c.fixed": 1}, abs(math.log10(rate) + 1)))
    shares = importances(axes, outcomes)
    assert set(shares) == {"a.rate", "b.kind"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["a.rate"] > 0.9
