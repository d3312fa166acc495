"""An Optuna study suggests the same settings whichever trial ends first, and after a restart."""

import math
from collections.abc import Callable

from rayjobs.tune.optuna_study import Study
from rayjobs.tune.search_space import Range, SearchConfig, Setting, SpaceConfig, enumerate_settings

SPACE = SpaceConfig(shots=[3], seeds=[0, 1], lr=Range(low=1e-4, high=1.0), epochs=[1, 2], ensemble=["average"])
SEARCH = SearchConfig(method="optuna", suggested_at_once=3, seed=5)


def study() -> Study:
    candidates = enumerate_settings(SPACE, SEARCH, ["clip", "dino"], 4, file=False)
    return Study(SPACE, 3, candidates, SPACE.lr, SEARCH)


def objective(setting: Setting) -> float:
    return -((math.log10(setting.lr) + 2) ** 2) - setting.epochs


def run(batches: int, order: Callable[[list[str]], list[str]]) -> list[Setting]:
    """The settings that are suggested when the trials of every batch end in this order."""
    searcher, suggested = study(), []
    for batch in range(batches):
        settings = {}
        for i in range(SEARCH.suggested_at_once):
            point = searcher.suggest(f"{batch}-{i}")
            assert point is not None
            assert [trial.seed for trial in point["trials"]] == SPACE.seeds
            settings[f"{batch}-{i}"] = point["trials"][0].setting
        assert searcher.suggest("too early") is None, "the results of a full batch come first"
        for name in order(list(settings)):
            searcher.on_trial_complete(name, {"objective": objective(settings[name])})
        suggested += settings.values()
    assert [trial.setting for trial in searcher.trials[::2]] == suggested
    return suggested


def test_suggestions_do_not_depend_on_which_trial_ends_first() -> None:
    first_in_first_out = run(8, lambda names: names)
    assert len(set(first_in_first_out)) == 8 * 3
    assert run(8, lambda names: names[::-1]) == first_in_first_out


def test_a_new_study_repeats_the_suggestions_of_an_interrupted_one() -> None:
    whole = run(6, lambda names: names)
    assert run(3, lambda names: names) == whole[: 3 * 3]


def test_a_study_ends_with_a_trial_that_failed() -> None:
    searcher = study()
    assert searcher.suggest("a") is not None
    searcher.on_trial_complete("a", error=True)
    assert searcher.suggest("b") == Study.FINISHED
