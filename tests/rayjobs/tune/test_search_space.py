"""Values that no sweep can use are refused before Ray starts, each with its key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cafo.ensemble import Ensemble, table5
from rayjobs.config import load
from rayjobs.jobs import adapter_tune, cafo, cafo_features, cafo_tune
from rayjobs.tune.search_space import SearchConfig
from rayjobs.tune.selection import ChosenSetting, ChosenTrial, edge_notices
from rayjobs.tune.sweep_config import SweepConfig
from tests.rayjobs.cafo_dataset import CLASSES, make_dataset


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*make_dataset(tmp_path_factory.mktemp("space")), "space.shots=[1]", "run.name=x"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.shots=[1, 1]", r"space\.shots: 1 occurs twice"),
        ("space.seeds=[3, 1, 3]", r"space\.seeds: 3 occurs twice"),
        ("space.shots=[]", r"space\.shots: .*at least 1 item"),
        ("space.views=[]", r"space\.views: .*at least 1 item"),
        ("space.lr=[]", r"space\.lr.*at least 1 item"),
        ("space.encoders=[]", r"space\.encoders: .*at least 1 item"),
        ("space.encoders=[[]]", r"space\.encoders\[?\.?0\]?: .*at least 1 item"),
        ("space.encoders=[[clip, clip]]", r"space\.encoders: clip, clip names an encoder twice"),
        ("space.ensemble=[dino only]", r"space\.ensemble: "),
        ("space.sentences=[]", r"space\.sentences: .*at least 1 item"),
        ("search.temperatures=[0]", r"search\.temperatures\S*: .*greater than 0"),
        ("search.temperatures=[]", r"search\.temperatures: .*at least 1 item"),
        ("search.scales=[1, -1]", r"search\.scales\S*: .*greater than or equal to 0"),
        ("search.scales=[0]", r"search\.scales: at least one scale must be above 0"),
        ("search.select=leave_one_out", r"search\.select=leave_one_out needs untrained keys"),
        ("search.folds=1", r"search\.folds: .*greater than or equal to 2"),
        ("search.beta_low=13", r"search\.beta_low is 13\.0, above search\.beta_high, 12\.0"),
        ("space.shots=[-1]", r"space\.shots: -1 is negative"),
        ("space.generated=[-2]", r"space\.generated: -2 is negative"),
        ("space.epochs=[-2]", r"space\.epochs: -2 is negative"),
        ("space.shots=[0]", "the space holds no trial"),
        ("space.shots=[7]", r"4 of 4 classes have fewer than 7 training images: red_thing \(6\)"),
        ("space.methods={all: {lr: []}}", r"space\.methods\.all: lr"),
        ("space.lr={low: 1, high: 0.1}", r"space\.lr: low is 1\.0, above high, 0\.1"),
        ("data.templates=[]", r"data\.templates: .*at least 1 item"),
        ("data.templates=[a photo]", "a template needs one"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_with_its_key(given: list[str], override: str, message: str) -> None:
    more = ["space.encoders=[[clip]]"] if "dino only" in override else []
    more += ["search.method=random"] if "low: 1" in override else []
    with pytest.raises(ValueError, match=message):
        cafo_tune.check(load(cafo_tune.Config, None, [*given, *more, override]))


def test_siblings_of_other_jobs_are_refused_too(given: list[str]) -> None:
    own = [one for one in given if not one.startswith("space.")]
    with pytest.raises(ValueError, match="seeds: 2 occurs twice"):
        load(cafo_features.Config, None, [*own, "seeds=[2,2]"])
    with pytest.raises(ValueError, match=r"1 occurs twice"):
        load(SweepConfig, {"axes": {"optim.lr": [1]}, "seeds": [1, 1]})
    with pytest.raises(ValueError, match=r"at least 1 item"):
        load(SweepConfig, {"axes": {"optim.lr": []}})
    assert adapter_tune.Config.__pydantic_fields__["sweep"].annotation is SweepConfig  # type: ignore[attr-defined]


def test_one_class_and_targets_without_test_images_are_refused_before_the_sweep(
    given: list[str], tmp_path: Path
) -> None:
    own = [one for one in given if not one.startswith(("data.", "run."))]
    own += [f"run.storage={tmp_path / 'runs'}", "run.name=x", f"data.tree={tmp_path / 'tree'}"]
    for name in list(CLASSES)[:1]:
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(9):
            (tmp_path / "tree" / name / f"{i}.png").touch()
    with pytest.raises(ValueError, match="tree has one class, and a classifier needs two or more"):
        cafo_tune.check(load(cafo_tune.Config, None, own))
    (tmp_path / "tree" / "other").mkdir()
    for i in range(9):
        (tmp_path / "tree" / "other" / f"{i}.png").touch()
    with pytest.raises(ValueError, match="tree has no test image, and an evaluation needs some"):
        cafo.run(load(cafo.Config, None, [*own, "space.shots=[1]", f"targets.shift.tree={tmp_path / 'tree'}"]))
    assert not (tmp_path / "runs").exists()


def test_chosen_values_at_the_edge_of_their_range_are_told_with_the_setting() -> None:
    def trial(seed: int, alpha: float, beta: float) -> ChosenTrial:
        return ChosenTrial(seed=seed, trial="t", accuracy=1.0, alpha=alpha, beta=beta, ensemble="{}")

    def choice(*trials: ChosenTrial) -> ChosenSetting:
        cell = {
            "shots": 4,
            "method": "CaFo",
            "group": {},
            "accuracy": 1.0,
            "select": "val",
            "finished": 1,
            "stopped": 0,
        }
        return ChosenSetting(**cell, setting=None, seeds=trials)  # type: ignore[arg-type]

    search = SearchConfig(beta_low=1.0, beta_high=9.0)
    assert list(edge_notices([choice(trial(1, 1.0, 3.0))], search)) == []
    assert list(edge_notices([choice(trial(1, 1.0, 9.0), trial(2, 2.0, 4.0), trial(3, 2.0, 9.0))], search)) == [
        "CaFo at K=4, seed 1, 3: the chosen β is 9, the largest value that was tried; to try others, change "
        "search.beta_high"
    ]
    (lowest,) = edge_notices([choice(trial(1, 0.0, 9.0))], search)
    assert "α is 0" in lowest


def test_what_a_choice_is_made_on_follows_from_k_and_the_validation_images() -> None:
    def at(shots: int, has_val: bool, trained: bool, **given: Any) -> str:
        return SearchConfig(**given).select_at(shots, has_val=has_val, trained=trained)

    assert [at(shots, True, True) for shots in (0, 1, 16)] == ["val"] * 3
    assert [at(shots, False, True) for shots in (0, 1, 2, 16)] == ["prior", "prior", "crossfit", "crossfit"]
    assert [at(shots, False, False) for shots in (1, 2)] == ["prior", "leave_one_out"]
    assert at(4, True, True, select="crossfit") == "crossfit"
    assert at(1, True, True, select="crossfit") == "prior"  # nothing can be held out
    assert at(1, True, True, join_val=True) == "crossfit"
    with pytest.raises(ValueError, match="select"):
        SearchConfig(select="test")  # type: ignore[arg-type]


def test_a_choice_on_validation_images_that_are_not_there_is_refused(given: list[str], tmp_path: Path) -> None:
    own = [one for one in given if not one.startswith("data.")]
    for name in list(CLASSES)[:2]:
        for i in range(3):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").touch()
    own.append(f"data.tree={tmp_path}")
    for override, setting in (
        ("search.select=val", r"search\.select=val"),
        ("search.join_val=true", r"search\.join_val"),
    ):
        with pytest.raises(ValueError, match=f"{setting} needs validation images, and"):
            cafo_tune.check(load(cafo_tune.Config, None, [*own, override]))
    dataset, tried = cafo_tune.check(load(cafo_tune.Config, None, own))
    assert (len(dataset.train), len(dataset.val), bool(tried)) == (6, 0, True)


def test_old_choices_stay_within_reach() -> None:
    old = SearchConfig(rule="highest", scales=[1.0], drop_zero_shot=False)
    for rule, ensemble in table5(("clip", "dino")).items():
        (only,) = old.choosing(ensemble, ("clip", "dino")).ensembles
        sources = ensemble.sources or ("clip", "dino")
        assert only == replace(ensemble, scales=dict.fromkeys(sources, 1.0)), rule
    assert old.choosing(Ensemble(), ("clip", "dino")).epoch_by == "accuracy"
    assert len(SearchConfig().choosing(Ensemble(), ("clip", "dino")).ensembles) == 6
