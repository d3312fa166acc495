"""The choice among a sweep's trials, on results that are written by hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cafo.estimate import Estimate
from rayjobs.errors import ConfigError, DataError
from rayjobs.tune.search_space import Hyperparameter, Setting, Trial
from rayjobs.tune.selection import (
    ChosenSetting,
    ChosenTrial,
    best_choice,
    check_reference,
    choose_settings,
    method_name,
    read_chosen,
    reference_method,
    remove_other_caches,
    row_name,
    settings_to_plot,
)
from rayjobs.tune.trial import TrialResult

SETTING = Setting(0, 4, ("clip", "dino"), "average", "templates", 1e-2, 3, 1.0, 5.5)


def result(seed: int, correct: int | None, **changes: Any) -> tuple[Trial, TrialResult]:
    """A trial of 100 images; changes are of its setting, of its K, or of its result."""
    setting = SETTING._replace(**{name: value for name, value in changes.items() if name in Setting._fields})
    rest = {name: value for name, value in changes.items() if name not in Setting._fields}
    trial = Trial(shots=rest.pop("shots", 4), seed=seed, setting=setting)
    values = {
        **setting._asdict(),
        "trial": trial.name,
        "status": "finished",
        "shots": trial.shots,
        "seed": seed,
        "encoders": " + ".join(setting.encoders),
        "curve": [],
        "select": "val",
        "correct": correct,
        "accuracy": None if correct is None else correct / 100,
        "chosen_alpha": 1.25,
        "chosen_beta": 3.5,
        "chosen_ensemble": "{}",
        "seconds": 1.0,
        **rest,
    }
    return trial, TrialResult(**{name: v for name, v in values.items() if name in TrialResult.__dataclass_fields__})


def chosen(method: str, accuracy: float | None, shots: int = 4, rival: str = "") -> ChosenSetting:
    trial = ChosenTrial(seed=1, trial="t", accuracy=accuracy, alpha=1.0, beta=2.0, ensemble="{}")
    return ChosenSetting(
        shots=shots,
        method=method,
        group={},
        setting=SETTING._replace(rival=rival),
        select="val",
        accuracy=accuracy,
        finished=1,
        stopped=0,
        seeds=(trial,),
    )


def test_the_best_mean_over_seeds_is_chosen_for_every_k_and_compared_value() -> None:
    results = [
        result(1, 70, lr=0.1),
        result(2, 71, lr=0.1),
        result(1, 90, lr=0.2),  # best at one seed alone
        result(2, 52, lr=0.2),
        result(1, 60, lr=0.3, shots=8),
        result(2, 62, lr=0.3, shots=8),
        result(1, 99, lr=0.4, shots=8),  # stopped at the other seed
        result(2, None, lr=0.4, shots=8, status="stopped"),
        result(1, 99, lr=0.5, shots=8),  # lacks the other seed
        result(1, 40, views=2),
        result(2, 42, views=2),
    ]
    compare: list[Hyperparameter] = ["views"]
    first, second, third = choose_settings(results, compare)
    assert (first.shots, first.setting.lr, first.accuracy) == (4, 0.2, pytest.approx(0.71))
    assert (second.shots, second.setting.lr, second.accuracy) == (8, 0.3, pytest.approx(0.61))
    assert (third.shots, third.setting.views, third.accuracy) == (4, 2, pytest.approx(0.41))
    assert [(one.finished, one.stopped) for one in (first, second, third)] == [(2, 0), (1, 1), (1, 0)]
    assert [one.group for one in (first, third)] == [{"method": "", "views": 4}, {"method": "", "views": 2}]
    assert [(trial.seed, trial.accuracy) for trial in first.seeds] == [(1, 0.9), (2, 0.52)]
    assert all((trial.alpha, trial.beta, trial.ensemble) == (1.25, 3.5, "{}") for trial in first.seeds)
    assert first.select == "val"


def test_ties_and_choices_on_no_image_go_to_the_first_setting() -> None:
    tied = [result(1, 70, lr=0.1), result(1, 70, lr=0.2)]
    assert choose_settings(tied, [])[0].setting.lr == 0.1
    none = [result(1, None, lr=0.1, select="prior"), result(1, None, lr=0.2, select="prior")]
    (choice,) = choose_settings(none, [])
    assert (choice.setting.lr, choice.accuracy, choice.select) == (0.1, None, "prior")


def test_a_count_of_no_image_is_worse_than_any_other() -> None:
    results = [result(1, None, lr=0.1), result(1, 0, lr=0.2), result(1, 1, lr=0.3)]
    assert choose_settings(results, [])[0].setting.lr == 0.3


def test_an_estimate_is_the_mean_over_the_seeds_that_have_one() -> None:
    results = [
        result(1, 70, estimate_correct=10, estimate_images=40),
        result(2, 70, estimate_correct=20, estimate_images=40),
        result(3, 70),
    ]
    assert choose_settings(results, [])[0].estimate() == Estimate(correct=15, total=40)
    assert choose_settings(results[2:], [])[0].estimate() is None


@pytest.mark.parametrize("numbers", [(3, None), (None, 3), (4, 3), (-1, 3), (0, -1)])
def test_an_estimate_that_cannot_be_is_refused(numbers: tuple[int | None, int | None]) -> None:
    correct, images = numbers
    values: dict[str, Any] = {"seed": 1, "trial": "t", "accuracy": 1.0, "alpha": 1.0, "beta": 1.0, "ensemble": "{}"}
    for possible in ((0, 3), (3, 3), (0, 0), (None, None)):
        ChosenTrial(**values, estimate_correct=possible[0], estimate_images=possible[1])
    with pytest.raises(DataError, match="cannot be correct"):
        ChosenTrial(**values, estimate_correct=correct, estimate_images=images)


def test_a_choice_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = choose_settings([result(1, 70), result(2, 71, hyperparameters="{}")], [])
    content = {"chosen": [one.to_json() for one in written]}
    (tmp_path / "chosen.json").write_text(json.dumps(content))
    assert read_chosen(tmp_path) == written
    assert ["hyperparameters" in trial for trial in content["chosen"][0]["seeds"]] == [False, True]
    assert asdict(written[0])["seeds"][0]["hyperparameters"] is None
    content["chosen"][0]["seeds"][0]["trial"] = "../elsewhere"
    (tmp_path / "chosen.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="elsewhere"):
        read_chosen(tmp_path)
    (tmp_path / "chosen.json").write_text("{}")
    with pytest.raises(DataError, match=r"chosen\.json is no choice .*; run cafo-tune again to write it"):
        read_chosen(tmp_path)


def test_rows_are_called_by_the_compared_values() -> None:
    assert method_name({}) == method_name({"method": ""}) == "CaFo"
    values = {"method": "mine", "ensemble": "average", "encoders": ("clip", "dino"), "lr": 0.1, "views": 4}
    assert method_name(values) == "mine, average, clip + dino, lr 0.1, views 4"
    assert row_name(SETTING, ["encoders", "lr"]) == "clip + dino, lr 0.01"
    check_reference(None, ["a"])
    check_reference("a", ["b", "a"])
    with pytest.raises(ConfigError, match=r"no row called 'c'; there are b, a$"):
        check_reference("c", ["b", "a", "b"])


def test_others_are_compared_with_cafo_or_the_best_of_its_rows_at_the_most_shots() -> None:
    rival = chosen("TIMO", 0.9, shots=16, rival="TIMO")
    assert reference_method([rival]) is None
    assert reference_method([rival, chosen("CaFo", 0.1), chosen("lr 1", 0.8)]) == "CaFo"
    rows = [chosen("lr 1", 0.8, shots=4), chosen("lr 2", 0.5, shots=8), chosen("lr 3", 0.6, shots=8), rival]
    assert reference_method(rows) == "lr 3"


def test_the_best_choice_is_plotted_first_and_others_at_their_largest_k() -> None:
    few, many = chosen("lr 1", 0.7, shots=4), chosen("lr 1", 0.6, shots=8)
    low, best, none = chosen("lr 2", 0.5, shots=2), chosen("lr 3", 0.9, shots=1), chosen("lr 4", None, shots=1)
    more = replace(best, shots=16, accuracy=0.8)
    assert best_choice([none, few, best]) == best
    assert best_choice([none, chosen("lr 5", 0.0)]).method == "lr 5"
    assert settings_to_plot([few, many, low, best, more, none]) == [best, many, low, none]


def test_the_files_of_chosen_trials_are_kept(tmp_path: Path) -> None:
    for trial in ("t", "other"):
        for name in ("cache.safetensors", "method.safetensors", "result.json"):
            (tmp_path / "trials" / trial).mkdir(parents=True, exist_ok=True)
            (tmp_path / "trials" / trial / name).touch()
    remove_other_caches(tmp_path, [chosen("CaFo", 1.0)])
    left = {path.relative_to(tmp_path / "trials").as_posix() for path in (tmp_path / "trials").rglob("*.*")}
    assert left == {"t/cache.safetensors", "t/method.safetensors", "t/result.json", "other/result.json"}
