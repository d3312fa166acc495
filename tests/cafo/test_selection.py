"""The settings of a choice reach what is chosen: the measure of the epoch, and the range of β."""

from dataclasses import replace

import pytest
import torch

import cafo.selection
from cafo.cache import zero_shot_logits
from cafo.calibration import calibrate
from cafo.cross_fit import TrainingImages, cross_fit, leave_one_out
from cafo.errors import CafoError
from cafo.key_training import KeyTrainer, KeyTraining
from cafo.prior import expect
from cafo.search import search
from cafo.search_grid import BetaGrid
from cafo.selection import Choosing, default_select, select
from cafo.spill import Spill
from tests.cafo.test_cross_fit import problem


def test_the_rule_says_how_the_epoch_is_chosen():
    differ = 0
    for seed in range(4):
        cache, views, images = problem(seed)
        training = KeyTraining(epochs=4, lr=0.05, batch=5)
        epochs = {}
        for rule, measure in (("highest", "accuracy"), ("near_best", "loss")):
            choosing = Choosing(grid=BetaGrid(steps=5, refinements=0), rule=rule, folds=3, estimate=False)
            epochs[rule] = select(cache, views, "crossfit", training, choosing, train=images).epoch
            assert epochs[rule] == cross_fit(cache, views, images, training, 3, measure)[1]
        differ += epochs["highest"] != epochs["near_best"]
    assert differ > 0


@pytest.mark.parametrize(("low", "high", "beta"), [(7.0, 9.0, 7.0), (0.5, 2.0, 2.0), (0.5, 9.0, 6.0)])
def test_an_expected_beta_lies_in_the_grid(low, high, beta):
    cache, views, images = problem()
    choosing = Choosing(grid=BetaGrid(low=low, high=high))
    assert select(cache, views, "prior", KeyTraining(epochs=0), choosing, train=images).cache.beta == beta


def untrained(how, choosing=None, **given):
    cache, views, images = problem()
    choosing = choosing or Choosing(grid=BetaGrid(steps=5, refinements=0), folds=3)
    return select(cache, views, how, KeyTraining(epochs=0), choosing, **{"train": images, **given})


def validation():
    cache, _, images = problem(3)
    return images.features, cache.labels[images.rows]


def trained_on_all(cache, views, training, epochs):
    with Spill() as spill:
        trainer = KeyTrainer(cache, views, cache.labels, training, spill.keep_one)
        for _ in range(epochs):
            trainer.run_epoch()
        return {name: keys.clone() for name, keys in trainer.copy_keys().items()}


def test_what_a_choice_is_made_on_where_the_user_does_not_say():
    assert {default_select(has_val=True, shots=shots, trained=t) for shots in (0, 1, 4) for t in (True, False)} == {
        "val"
    }
    chosen = [default_select(has_val=False, shots=shots, trained=t) for shots in (0, 1, 2, 3) for t in (True, False)]
    assert chosen == ["prior"] * 4 + ["crossfit", "leave_one_out"] * 2


def test_images_that_a_choice_needs_are_asked_for():
    features, labels = validation()
    for val in (None, ({name: f[:0] for name, f in features.items()}, labels[:0])):
        with pytest.raises(CafoError, match="no validation image"):
            untrained("val", val=val)
    assert untrained("val", val=(features, labels), train=None).how == "val"
    for how in ("crossfit", "leave_one_out", "prior"):
        with pytest.raises(CafoError, match=f"a choice by {how} needs the training images"):
            untrained(how, train=None)
    cache, views, images = problem()
    with pytest.raises(CafoError, match="leave_one_out needs untrained keys"):
        select(cache, views, "leave_one_out", KeyTraining(epochs=1), Choosing(), train=images)


@pytest.mark.parametrize("estimate", [None, True, False])
def test_the_accuracy_is_estimated_if_asked_or_if_no_validation_image_tells_it(estimate):
    choosing = Choosing(grid=BetaGrid(steps=5, refinements=0), folds=3, estimate=estimate)
    for how in ("val", "leave_one_out", "crossfit"):
        selected = untrained(how, choosing, val=validation())
        assert (selected.estimate is not None) == (estimate or (estimate is None and how != "val"))


@pytest.mark.parametrize("most", [10_000, 4])
def test_a_choice_is_the_searchs_and_calibrated_on_its_images_evenly_spread(monkeypatch, most):
    monkeypatch.setattr(cafo.selection, "_IMAGES_OF_CALIBRATION", most)
    cache, _, train = problem()
    epochs = []
    selected = untrained("leave_one_out", report=epochs.append)
    images = leave_one_out(cache, train)
    expected = search(images, grid=BetaGrid(steps=5, refinements=0), rule="near_best")
    assert selected.search == expected
    chosen = selected.cache
    assert (chosen.alpha, chosen.beta, chosen.ensemble) == (expected.alpha, expected.beta, expected.ensemble)
    logits = images.combine(chosen.beta, chosen.ensemble).logits(chosen.alpha)
    step = -(-images.total // most)
    calibration = calibrate(logits[::step], images.labels[::step])
    assert chosen.calibration.temperature == pytest.approx(calibration.temperature, rel=1e-4)
    torch.testing.assert_close(chosen.calibration.scores, calibration.scores, rtol=1e-3, atol=1e-5)
    before = images.combine(cache.beta, cache.ensemble).logits(cache.alpha)
    assert epochs == [selected.epoch]
    assert selected.epoch.epoch == 0
    assert selected.epoch.accuracy == float((before.argmax(1) == images.labels).float().mean())


def test_the_final_keys_are_trained_on_all_images_for_the_chosen_epochs():
    cache, views, images = problem()
    training = KeyTraining(epochs=4, lr=0.05, batch=5)
    choosing = Choosing(grid=BetaGrid(steps=5, refinements=0), folds=3, estimate=False)
    for how in ("crossfit", "prior"):
        selected = select(cache, views, how, training, choosing, train=images)
        assert 0 < selected.epoch.epoch == (4 if how == "prior" else selected.epoch.epoch)
        expected = trained_on_all(cache, views, training, selected.epoch.epoch)
        for name, keys in selected.cache.keys.items():
            assert torch.equal(keys, expected[name])


def test_without_an_image_to_hold_out_the_values_are_those_expected_of_the_images_or_the_keys():
    cache, views, images = problem()
    selected = untrained("prior")
    zero_shot = zero_shot_logits(images.features["clip"], cache.classifier)
    assert selected.cache.alpha == expect(zero_shot, cache.labels[images.rows], len(cache.labels) / 7).alpha
    none = TrainingImages(features={name: f[:0] for name, f in images.features.items()}, rows=images.rows[:0])
    of_keys = expect(zero_shot_logits(cache.keys["clip"], cache.classifier), cache.labels, len(cache.labels) / 7)
    assert untrained("prior", train=none).cache.alpha == of_keys.alpha
    assert selected.cache.alpha != of_keys.alpha
    pair = replace(cache, keys={name: k[:2] for name, k in cache.keys.items()}, labels=torch.tensor([3, 3]))
    for label, how in ((3, "leave_one_out"), (4, "prior")):
        of_pair = replace(pair, labels=torch.tensor([3, label]))
        few = TrainingImages(features={name: f[:2] for name, f in images.features.items()}, rows=torch.arange(2))
        two = {name: v[:, :2] for name, v in views.items()}
        assert select(of_pair, two, "leave_one_out", KeyTraining(epochs=0), Choosing(), train=few).how == how
    one = TrainingImages(features={name: f[:1] for name, f in images.features.items()}, rows=torch.arange(1))
    assert select(pair, two, "leave_one_out", KeyTraining(epochs=0), Choosing(), train=one).how == "prior"
