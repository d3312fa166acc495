"""Rivals of a sweep: a trial is a plain use of the library, and what a method lacks is told before anything is
encoded."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cafo.errors import CafoError
from cafo.methods import METHODS, find_method
from cafo.methods.base import Features, FewShotImages, Projection
from cafo.methods.choice import Select, fit_and_choose
from cafo.methods.saved import TrainingFile, load_classifier
from rayjobs.config import load
from rayjobs.errors import UserError
from rayjobs.jobs import cafo_tune
from rayjobs.storage.files import read_json
from rayjobs.tune.evaluation import score_target
from rayjobs.tune.rival_trial import CHOSEN_ON, run_rival
from rayjobs.tune.rivals import enumerate_rivals, open_rivals, reads_sentences
from rayjobs.tune.search_space import SearchConfig, Setting, SpaceConfig, Trial, enumerate_settings, enumerate_trials
from rayjobs.tune.selection import ChosenSetting, choose_settings, reference_method
from rayjobs.tune.trial import SharedInputs, open_classifier, read_trial_result, run_trial
from tests.rayjobs.cafo_dataset import CLASSES, make_dataset, make_images
from tests.rayjobs.tune.test_trial import SEARCH, K, N, shared_inputs
from tests.rayjobs.tune.test_trial import trial as cafo_trial

BEFORE = "clip before projection"
COARSE = {"grid": {"beta_steps": 5, "alpha_steps": 4}}


def space(*names: str, **more: Any) -> SpaceConfig:
    rivals: dict[str, Any] = {name: COARSE if "Tip" in name else {} for name in names}
    if "ProLIP" in names:
        rivals["ProLIP"] = {"learning_rates": [1e-3, 1e-2], "penalties": [0.0], "steps": 4}
    return SpaceConfig(rivals=rivals, shots=[K], seeds=[0], **more)


def with_rivals(shared: SharedInputs, given: SpaceConfig) -> SharedInputs:
    rng = np.random.default_rng(1)
    prompts = rng.normal(size=(N, 3, 11)).astype(np.float32)
    prompts /= np.linalg.norm(prompts, axis=-1, keepdims=True)
    files = tuple(TrainingFile(f"{i}.png", "abcde"[label], f"f{i}") for i, label in enumerate(shared.labels))
    prompts_of = {("clip", "templates"): prompts}
    with_all = replace(shared, rivals=open_rivals(given), prompts=prompts_of, files=files)  # type: ignore[arg-type]
    return with_unprojected(with_all, rng) if "ProLIP" in given.rivals else with_all


def with_unprojected(shared: SharedInputs, rng: np.random.Generator) -> SharedInputs:
    """With a projection from 13 to 11 numbers, and features before it that it makes the embeddings of."""
    weight, bias = (rng.normal(size=size).astype(np.float32) for size in ((11, 13), 11))
    inverse = np.linalg.pinv(weight)

    def before(embeddings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**embeddings, BEFORE: ((embeddings["clip"] - bias) @ inverse.T).astype(np.float32)}

    return replace(
        shared,
        views=before(shared.views),
        plain=before(shared.plain),
        val=before(shared.val),
        identities={**shared.identities, BEFORE: "random-unprojected"},
        projections={"clip": (weight, bias)},
    )


def trials_of(given: SpaceConfig) -> list[Trial]:
    return enumerate_trials(given, enumerate_rivals(given, ["clip", "noise"], 3, file=False))


@pytest.mark.parametrize("name", ["Tip-Adapter-F", "TIMO", "nearest class mean", "ProLIP"])
@pytest.mark.parametrize("how", ["val", "crossfit", "leave_one_out", "prior"])
def test_a_rivals_trial_is_a_plain_use_of_the_library(name: str, how: Any, tmp_path: Path) -> None:
    given, read = space(name), BEFORE if name == "ProLIP" else "clip"
    (one,) = trials_of(given)
    shared = with_rivals(shared_inputs({K: how}), given)
    without = {} if how == "val" else {"val": {}, "val_labels": np.array([], np.int64)}
    result = run_rival(one, replace(shared, **without), replace(SEARCH, folds=2), tmp_path)

    rows = shared.few_shot[K, 0]
    assert shared.plain_rows is not None

    def features(arrays: Mapping[str, np.ndarray], *at: Any) -> Features:
        both = [torch.tensor(arrays[name][at]) if name in arrays else None for name in ("clip", BEFORE)]
        assert both[0] is not None
        return Features(embeddings=both[0], unprojected=both[1])

    images = FewShotImages(
        views=features(shared.views, slice(3), rows),
        plain=features(shared.plain, shared.plain_rows[rows]),
        labels=torch.tensor(shared.labels[rows]),
        classifier=torch.tensor(shared.classifiers["clip", "templates"]),
        prompts=torch.tensor(shared.prompts["clip", "templates"]),
        projection=Projection(*map(torch.tensor, shared.projections["clip"])) if name == "ProLIP" else None,
    )
    val = features(shared.val), torch.tensor(shared.val_labels)
    expected_how: Select = {"val": "val", "prior": "none"}.get(how, "crossfit")  # type: ignore[assignment]
    method = find_method(name, given.rivals[name])
    expected = fit_and_choose(method, images, expected_how, val=val, seed=0, folds=2, estimate=how != "val")

    saved = load_classifier(tmp_path / one.name / "method.safetensors")
    logits = saved.logits({read: torch.tensor(shared.val[read])})
    torch.testing.assert_close(logits, expected.logits(val[0]), rtol=0, atol=0)
    assert (saved.name, saved.method, saved.setting, saved.class_names) == (
        name,
        method,
        expected.setting,
        shared.class_names,
    )
    identity = "random-unprojected" if name == "ProLIP" else "random"
    assert (saved.source, saved.encoders, saved.seed) == (read, {read: identity}, 0)
    assert [image.path for image in saved.images] == [f"{row}.png" for row in rows]
    assert [image.class_name for image in saved.images] == ["abcde"[label] for label in shared.labels[rows]]
    assert result.select == expected.how == CHOSEN_ON[how]  # type: ignore[index]
    assert (result.correct, result.images) == (expected.correct, expected.total)
    assert json.loads(result.hyperparameters or "") == expected.setting
    assert result.estimate_images == (N * K if expected.how == "crossfit" else None)
    assert read_trial_result(one, tmp_path) == result


def test_rivals_stand_beside_cafo_in_the_choices_and_on_test(tmp_path: Path) -> None:
    given = space("GDA", "linear probe")
    shared = with_rivals(shared_inputs({K: "val"}), given)
    results = [(one, run_rival(one, shared, SEARCH, tmp_path)) for one in trials_of(given)]
    own = cafo_trial(K, 1)
    results.insert(0, (own, run_trial(own, shared, SEARCH, tmp_path)))
    chosen = choose_settings(results, [])
    assert [choice.method for choice in chosen] == ["CaFo", "GDA", "linear probe"]
    assert [choice.setting.rival for choice in chosen] == ["", "GDA", "linear probe"]
    assert [ChosenSetting.from_json(json.loads(json.dumps(choice.to_json()))) for choice in chosen] == chosen
    assert "rival" not in json.dumps(chosen[0].to_json())  # what was chosen before there were rivals is the same
    assert "hyperparameters" not in json.dumps(chosen[0].to_json())
    assert reference_method(chosen) == "CaFo"
    assert reference_method(chosen[1:]) is None

    features: Any = type("F", (), {})()
    features.rows = tuple(range(23))
    features.values = {name: values[None] for name, values in shared.val.items()}
    images: Any = type("I", (), {})()
    images.role = "test"
    images.items = [type("Item", (), {"label": int(label)}) for label in shared.val_labels]
    scores = {score.method: score for score in score_target(chosen, tmp_path, images, features)}
    assert list(scores) == ["CLIP zero-shot", "CaFo", "GDA", "linear probe"]
    for one, result in results[1:]:
        logits = open_classifier(tmp_path, one.name).logits({"clip": torch.tensor(shared.val["clip"])})
        expected = (logits.argmax(1) == torch.tensor(shared.val_labels)).sum()
        assert scores[one.setting.rival].correct == int(expected) == result.correct  # the same images here
        assert scores[one.setting.rival].winning_sources == {}


def test_settings_of_rivals() -> None:
    given = space("GDA", "timo", views=[2, 4], sentences=["file", "templates"], encoders=[["a"], ["a", "b"], ["b"]])
    settings = enumerate_rivals(given, ["a", "b"], 4, file=True)
    assert len(settings) == len(set(settings)) == 2 * 2 * 2 * 2
    assert {(s.method, s.rival) for s in settings} == {("GDA", "GDA"), ("TIMO", "TIMO")}
    assert {s.encoders for s in settings} == {("a",), ("b",)}
    assert settings[0].compared_values(["generated", "encoders"]) == {"method": "GDA", "encoders": ("a",)}
    (only,) = enumerate_rivals(space("GDA"), ["a", "b"], 4, file=True)
    assert (only.views, only.encoders, only.sentences) == (4, ("a",), "file")
    assert enumerate_trials(replace(space("GDA"), shots=[0]), [only]) == []
    assert [name for name, method in METHODS.items() if reads_sentences(method)] == ["TIMO", "TIMO-S"]


def test_the_names_of_cafos_trials_do_not_depend_on_rivals() -> None:
    (setting,) = enumerate_settings(SpaceConfig(encoders=[["clip"]]), SearchConfig(), ["clip"], 4, file=False)
    assert Trial(shots=1, seed=2, setting=setting).name == "shots1-seed2-22fee46eb1"
    assert Trial(shots=1, seed=2, setting=setting._replace(rival="GDA")).name != "shots1-seed2-22fee46eb1"
    assert Setting(*setting[:11]) == setting


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    few = ["space.shots=[1, 2]", "space.seeds=[1]", "run.name=x", "features.views=1"]
    return [*(one for one in make_dataset(tmp_path_factory.mktemp("rivals")) if "views" not in one), *few]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.rivals={Tip: {}}", "space.rivals: there is no method 'Tip'; there are nearest class mean"),
        ("space.rivals={GDA: {alpha: 1}}", "space.rivals: GDA has no constant 'alpha'; it has alpha_powers"),
        ("space.rivals={APE: {grid: {beta_steps: none}}}", r"space.rivals: APE: grid\.beta_steps: .*integer"),
        ("space.rivals={GDA: {}, gda: {}}", "space.rivals: there are two rows called GDA"),
        ("space.rivals={GDA: {}}", "at K=1, seed 1: GDA needs two images or two views of each class; give more views"),
    ],
)
def test_what_a_rival_lacks_is_told_before_anything_is_encoded(
    overrides: list[str], override: str, message: str, tmp_path: Path
) -> None:
    config = load(cafo_tune.Config, None, [*overrides, override, f"run.storage={tmp_path}"])
    with pytest.raises((UserError, CafoError), match=message):
        cafo_tune.run(config)
    assert not list(tmp_path.iterdir())


def test_a_class_without_an_image_is_told(overrides: list[str], tmp_path: Path) -> None:
    split = make_images(tmp_path, {"train": 3, "val": 2, "test": 2})
    items = read_json(split)
    last = list(CLASSES)[-1]
    items["train"] = [item for item in items["train"] if item[2] != last]
    split.write_text(json.dumps(items))
    own = [one for one in overrides if not one.startswith("data.split")]
    more = ["space.rivals={linear probe: {}}", "data.short_classes=report", f"data.split={split}"]
    with pytest.raises(
        ValueError, match=rf"linear probe needs an image of each class, and at K=1, seed 1 1 have none \({last}\)"
    ):
        cafo_tune.check(load(cafo_tune.Config, None, [*own, *more]))
