"""A trial without Ray: it chooses as the library does, on the images that K and the settings say, and on no others."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cafo.cache import Cache, load_cache, mean_key
from cafo.choice_names import Select
from cafo.cross_fit import TrainingImages
from cafo.ensemble import Ensemble
from cafo.estimate import Estimate
from cafo.key_training import KeyTraining
from cafo.methods.saved import TrainingFile
from cafo.selection import select
from rayjobs.storage.files import read_json
from rayjobs.tune.choice_tables import choice_tables, hurtful_notices
from rayjobs.tune.search_space import SearchConfig, Setting, Trial
from rayjobs.tune.selection import choose_settings
from rayjobs.tune.trial import SharedInputs, read_trial_result, run_trial

N, K, WIDTHS = 5, 3, {"clip": 11, "noise": 7}
SEARCH = SearchConfig(beta_steps=15, folds=3)


def shared_inputs(select: dict[int, Select]) -> SharedInputs:
    """A good source and a useless one; the arrays hold more images than any trial uses, in another order."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(N), K + 2))
    centres = {name: rng.normal(size=(N, width)) for name, width in WIDTHS.items()}
    centres["noise"][:] = 0

    def unit(values: np.ndarray) -> np.ndarray:
        return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)

    few = np.array([row for label in range(N) for row in np.flatnonzero(labels == label)[:K]])
    one = few[::K]
    plain_rows = np.full(len(labels), -1, np.int64)
    plain_rows[few] = rng.permutation(len(few))
    plain = {name: np.zeros((len(few), width), np.float32) for name, width in WIDTHS.items()}
    for name, width in WIDTHS.items():
        plain[name][plain_rows[few]] = unit(centres[name][labels[few]] + rng.normal(size=(len(few), width)))
    val_labels = rng.integers(N, size=23)
    return SharedInputs(
        views={n: unit(centres[n][labels] + rng.normal(size=(4, len(labels), w))) for n, w in WIDTHS.items()},
        labels=labels,
        few_shot={(K, 0): few, (1, 0): one},
        generated={0: np.arange(0)},
        val={n: unit(centres[n][val_labels] + rng.normal(size=(23, w))) for n, w in WIDTHS.items()},
        val_labels=val_labels,
        plain=plain,
        plain_rows=plain_rows,
        groups=np.arange(len(labels)),
        select=select,
        classifiers={("clip", "templates"): unit(centres["clip"] + rng.normal(size=(N, 11))).T.copy()},
        class_names=tuple("abcde"),
        identities=dict.fromkeys(WIDTHS, "random"),
        files=tuple(TrainingFile(f"{label}/{row}.jpg", "abcde"[label], "") for row, label in enumerate(labels)),
    )


def trial(shots: int, epochs: int) -> Trial:
    setting = Setting(0, 4, ("clip", "noise"), "baseline zero-shot", "templates", 1e-2, epochs, 2.0, 5.5)
    return Trial(shots=shots, seed=0, setting=setting)


@pytest.mark.parametrize(
    ("how", "shots", "epochs"), [("val", K, 3), ("crossfit", K, 3), ("leave_one_out", K, 0), ("prior", 1, 3)]
)
def test_a_trial_is_a_plain_use_of_the_library(how: Select, shots: int, epochs: int, tmp_path: Path) -> None:
    shared = shared_inputs({shots: how})
    curves: list[list[float]] = []
    result = run_trial(trial(shots, epochs), shared, SEARCH, tmp_path, report=lambda c: curves.append(list(c)))

    rows = torch.from_numpy(shared.few_shot[shots, 0])
    views = {name: torch.from_numpy(v)[:, rows] for name, v in shared.views.items()}
    cache = Cache(
        keys={name: mean_key(v) for name, v in views.items()},
        labels=torch.from_numpy(shared.labels)[rows],
        classifier=torch.from_numpy(shared.classifiers["clip", "templates"]),
        class_names=shared.class_names,
        alpha=2.0,
        beta=5.5,
    )
    at = torch.from_numpy(shared.plain_rows)[rows]
    images = TrainingImages(
        features={name: torch.from_numpy(f)[at] for name, f in shared.plain.items()}, rows=torch.arange(len(rows))
    )
    val = {name: torch.from_numpy(f) for name, f in shared.val.items()}, torch.from_numpy(shared.val_labels)
    expected = select(
        cache,
        views,
        how,
        KeyTraining(epochs=epochs, lr=1e-2, seed=0),
        SEARCH.choosing(Ensemble(), ("clip", "noise")),
        train=images,
        val=val,
    )
    kept = load_cache(tmp_path / result.trial / "cache.safetensors")
    assert kept.key_names == tuple(f"{shared.labels[row]}/{row}.jpg" for row in rows.tolist())
    assert result.select == expected.how == how
    assert (kept.alpha, kept.beta, kept.ensemble) == (
        expected.cache.alpha,
        expected.cache.beta,
        expected.cache.ensemble,
    )
    for name, key in expected.cache.keys.items():
        torch.testing.assert_close(kept.keys[name], key, rtol=1e-5, atol=1e-6)
    assert len(kept.labels) == N * shots  # the final keys are of all training images
    assert result.curve == (curves[-1] if curves else [])
    assert len(result.curve) == (epochs + 1 if how in ("val", "crossfit") else int(how == "leave_one_out"))
    if how == "prior":
        assert (result.accuracy, result.estimate_images, result.best_epoch) == (None, None, epochs)
        return
    assert expected.search is not None
    assert (result.correct, result.images) == (expected.search.correct, 23 if how == "val" else N * K)
    assert result.estimate_images == (None if how == "val" else N * K)
    assert read_json(tmp_path / result.trial / "landscape.json")["total"] == result.images
    assert (tmp_path / result.trial / "surface.json").exists() == (how != "val")
    assert read_trial_result(trial(shots, epochs), tmp_path) == replace(result, seconds=result.seconds)


@pytest.mark.parametrize("how", ["crossfit", "leave_one_out", "prior"])
def test_without_validation_images_nothing_depends_on_them(how: Select, tmp_path: Path) -> None:
    shots = 1 if how == "prior" else K
    inputs = shared_inputs({shots: how})
    without = replace(inputs, val={}, val_labels=np.array([], np.int64))
    other = replace(inputs, val_labels=inputs.val_labels[::-1].copy())
    results = [
        run_trial(trial(shots, 0), one, SEARCH, tmp_path / str(number))
        for number, one in enumerate((inputs, without, other))
    ]
    assert len({json.dumps(vars(result) | {"seconds": 0}) for result in results}) == 1


def test_the_parts_and_the_estimate_of_a_choice_are_told(tmp_path: Path) -> None:
    one = trial(K, 0)
    result = run_trial(one, shared_inputs({K: "leave_one_out"}), SEARCH, tmp_path)
    chosen = choose_settings([(one, result)], [])
    assert chosen[0].estimate() == Estimate(correct=result.estimate_correct or 0, total=N * K)
    tables = choice_tables([(one, result)], chosen)
    assert next(iter(tables)) == "chosen: accuracy on the images of the choice, %"
    (estimate,) = tables["estimated accuracy on new images, %"]
    assert estimate["held-out images"] == str(N * K)
    parts = {row["part"]: row for row in tables["parts: images correct on the images of the choice, mean over seeds"]}
    assert set(parts) == {"zero_shot", "clip", "noise"}
    verdicts = {part: float(row["best with"]) - float(row["best without"]) for part, row in parts.items()}
    for part, gain in verdicts.items():
        assert parts[part]["verdict"] == ("helps" if gain > 0 else "hurts" if gain < 0 else "adds nothing")
    hurtful = [part for part, gain in verdicts.items() if gain < 0]
    place = f"{chosen[0].method} at K={chosen[0].shots}"
    assert list(hurtful_notices([(one, result)], chosen)) == [
        f"on the images of the choice, more are correct without {part}: {place}" for part in hurtful
    ]


def test_a_choice_on_no_image_has_no_accuracy_and_goes_to_the_first_setting(tmp_path: Path) -> None:
    shared = shared_inputs({1: "prior"})
    trials = [trial(1, 0), trial(1, 1)]
    results = [(one, run_trial(one, shared, SEARCH, tmp_path)) for one in trials]
    (chosen,) = choose_settings(results, [])
    assert (chosen.setting.epochs, chosen.accuracy, chosen.estimate()) == (0, None, None)
    assert choice_tables(results, [chosen]) == {}
