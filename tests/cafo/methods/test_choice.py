"""The choice of hyperparameters against a loop over all settings, and fits that really lack the held-out images."""

from dataclasses import dataclass, replace

import pytest
import torch

from cafo.calibration import free_temperature_loss
from cafo.cross_fit import stratified_folds
from cafo.errors import CafoError
from cafo.methods import METHODS, find_method
from cafo.methods.ape_t import ApeT
from cafo.methods.base import Method, Stage, Terms, combinations
from cafo.methods.choice import Judged, choose, fit_and_choose, held_out_fits
from cafo.methods.gda import Gda
from cafo.methods.tip_adapter import TipAdapter, TipAdapterF
from cafo.methods.voting import VotingGrid
from tests.cafo.methods import problem

GRID = VotingGrid(beta_high=12.0, beta_steps=7, alpha_high=60.0, alpha_steps=5)
SMALL = TipAdapter(grid=GRID)


def logits_of_all(method, images, val):
    """(β, α) → logits, one by one."""
    fitted = method.fit(images, 0)
    (stage,) = method.stages
    return {
        (setting["beta"], alpha): fitted.terms(val)({"epoch": 0, **setting}).logits(alpha)
        for setting in stage.settings
        for alpha in stage.alphas
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", ["highest", "near_best"])
def test_the_choice_is_the_loops(seed, rule):
    train, others, labels = problem.images(seed=seed, noise=1.5)
    every = logits_of_all(SMALL, train, others)
    correct = {key: int((logits.argmax(1) == labels).sum()) for key, logits in every.items()}
    highest = max(correct.values())
    if rule == "highest":
        expected = next(key for key, count in correct.items() if count == highest)
    else:
        error = (highest * (len(labels) - highest) / len(labels)) ** 0.5
        near = [key for key, count in correct.items() if count >= highest - error]
        expected = min(near, key=lambda key: float(free_temperature_loss(every[key], labels)))
    chosen = fit_and_choose(SMALL, train, "val", val=(others, labels), rule=rule)
    assert (chosen.setting["beta"], chosen.setting["alpha"]) == expected
    assert chosen.how == "val"
    torch.testing.assert_close(chosen.logits(others), every[expected], rtol=0, atol=0)


def test_held_out_images_are_really_removed():
    train, _, _ = problem.images(seed=1)
    judged = held_out_fits(SMALL, train, 3, seed=0)
    assert len(judged) == problem.SHOTS
    seen = []
    for one in judged:
        held = [int((train.plain.embeddings == row).all(dim=1).nonzero()) for row in one.features.embeddings]
        seen += held
        kept = [row for row in range(len(train.labels)) if row not in held]
        removed = SMALL.fit(train.rows(torch.tensor(kept)), 0)
        setting = {"beta": 2.0, "epoch": 0}
        got = one.fitted.terms(one.features)(setting)
        torch.testing.assert_close(got, removed.terms(one.features)(setting), rtol=0, atol=0)
        assert one.labels.tolist() == train.labels[held].tolist()
    assert sorted(seen) == list(range(len(train.labels)))


def test_a_cross_fit_chooses_on_all_folds_together():
    train, others, labels = problem.images(seed=2, noise=1.2)
    halves = [Judged(SMALL.fit(train, 0), others.rows(rows), labels[rows]) for rows in torch.arange(11).split(4)]
    whole = [Judged(SMALL.fit(train, 0), others, labels)]
    assert choose(SMALL, halves) == choose(SMALL, whole)


@dataclass(frozen=True, kw_only=True)
class Staged(Method):
    """Logits that are best at first = 3 with second at its default, and then at second = 2."""

    @property
    def defaults(self):
        return {"alpha": 1.0, "first": 0.0, "second": 9.0}

    @property
    def stages(self):
        return [Stage(combinations(first=range(5))), Stage(combinations(second=range(4)))]

    def fit(self, images, seed):
        return self

    def terms(self, features):
        def at(setting):
            correct = 10 - abs(setting["first"] - 3) - (setting["second"] - 2) ** 2 / 50
            logits = torch.zeros(10, 2)
            logits[: int(correct), 0] = 1
            logits[int(correct) :, 1] = 1
            return Terms(logits, torch.zeros(10, 2))

        return at


def test_stages_are_chosen_in_turn():
    _, others, _ = problem.images()
    labels = torch.zeros(10, dtype=torch.int64)
    assert choose(Staged(), [Judged(Staged(), others, labels)], "highest") == {"alpha": 1.0, "first": 3, "second": 2}
    assert choose(Staged(), [], "highest") == Staged().defaults


def test_one_image_per_class_leaves_the_defaults():
    train, _, _ = problem.images(shots=1)
    chosen = fit_and_choose(SMALL, train, "crossfit")
    assert chosen.how == "none"
    assert chosen.setting == SMALL.defaults
    two_shots_of_one_view, _, _ = problem.images(shots=2, views=1)
    assert held_out_fits(Gda(), two_shots_of_one_view, 2, 0) == []  # a fold has one sample of each class


def test_a_choice_on_no_validation_image_is_refused():
    train, _, _ = problem.images()
    with pytest.raises(CafoError, match="choose by crossfit"):
        fit_and_choose(SMALL, train, "val")


SHORTER = {
    "Tip-Adapter": SMALL,
    "Tip-Adapter-F": TipAdapterF(grid=GRID),
    "APE": replace(METHODS["APE"], grid=VotingGrid(beta_high=7.0, beta_steps=5, alpha_high=7.0), gamma_steps=3),
    "APE-T": ApeT(grid=VotingGrid(beta_high=7.0, beta_steps=5, alpha_high=7.0)),
    "LP++": replace(METHODS["LP++"], epochs=40),
    "ProLIP": replace(METHODS["ProLIP"], learning_rates=(1e-3,), penalties=(1.0,), steps=30),
    "RLA": replace(METHODS["RLA"], learning_rates=(1e-3,), penalties=(1.0,), steps=30),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["crossfit", "none"])
def test_every_method_learns_and_repeats_itself(name, how):
    train, others, labels = problem.images(seed=3)
    method = SHORTER.get(name, METHODS[name])
    first, second = (fit_and_choose(method, train, how, seed=4) for _ in range(2))
    assert first.how == how
    assert first.setting == second.setting
    logits = first.logits(others)
    assert logits.shape == (problem.B, problem.N)
    torch.testing.assert_close(logits, second.logits(others), rtol=0, atol=0)
    assert int((logits.argmax(1) == labels).sum()) >= 9
    assert first.setting.keys() >= {"alpha"}


def test_a_method_is_found_by_name():
    assert find_method("tip-adapter-f") is METHODS["Tip-Adapter-F"]
    with pytest.raises(CafoError, match="there are nearest class mean"):
        find_method("Tip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(15, dtype=torch.int64)}, r"classes \[1, 2, 3, 4\] have no training image"),
        ({"labels": torch.arange(15) % 6}, "a label is 5"),
        ({"labels": torch.arange(14)}, "14"),
        ({"classifier": torch.ones(13, 5)}, "width 17"),
    ],
)
def test_images_that_do_not_fit_are_refused(change, message):
    train, _, _ = problem.images()
    with pytest.raises(CafoError, match=message):
        replace(train, **change)


@pytest.mark.parametrize("how", ["val", "crossfit"])
def test_an_estimate_is_of_settings_that_were_chosen_without_the_images_they_are_counted_on(how):
    train, others, labels = problem.images(seed=29, noise=2.5)
    chosen = fit_and_choose(SMALL, train, how, val=(others, labels), seed=6, folds=3, estimate=True)
    if how == "val":
        fold_of = stratified_folds(labels, torch.arange(len(labels)), 3, 6)
        parts = [Judged(chosen.fitted, others.rows(fold_of == f), labels[fold_of == f]) for f in fold_of.unique()]
    else:
        parts = held_out_fits(SMALL, train, 3, 6)
    assert chosen.total == sum(len(part.labels) for part in parts) == len(labels if how == "val" else train.labels)

    def right(part, setting):
        logits = part.fitted.terms(part.features)(setting).logits(setting["alpha"])
        return int((logits.argmax(1) == part.labels).sum())

    assert chosen.correct == sum(right(part, chosen.setting) for part in parts)
    correct = sum(right(part, choose(SMALL, [other for other in parts if other is not part])) for part in parts)
    assert (chosen.estimate.correct, chosen.estimate.total) == (correct, chosen.total)
    assert correct < chosen.correct  # so that a choice on the same images would be seen
    none = fit_and_choose(SMALL, train, "none", estimate=True)
    assert (none.correct, none.total, none.estimate) == (None, None, None)
