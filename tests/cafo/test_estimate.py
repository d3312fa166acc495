"""The interval against scipy, and an estimate that sees no image twice."""

import pytest
import torch
from scipy.stats import binomtest

from cafo.cross_fit import leave_one_out, stratified_folds
from cafo.ensemble import Ensemble
from cafo.estimate import Estimate, estimate_accuracy
from cafo.search import reduce_for_search, search
from cafo.search_grid import BetaGrid
from cafo.wilson import wilson_interval
from tests.cafo.test_cross_fit import problem


@pytest.mark.parametrize(("correct", "total"), [(0, 3), (7, 11), (97, 97), (180, 211)])
def test_the_interval_is_wilsons(correct, total):
    expected = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert Estimate(correct=correct, total=total).interval == pytest.approx((expected.low, expected.high))
    assert wilson_interval(correct / total, total) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("rule", ["near_best", "highest"])
def test_every_image_is_counted_by_a_choice_that_was_made_without_it(rule):
    cache, _, images = problem(3)
    held_out = leave_one_out(cache, images)
    grid = BetaGrid(low=0.5, high=9.0, steps=20, refinements=0)
    ensembles = [Ensemble(), Ensemble(sources=("dino",))]
    found = estimate_accuracy(reduce_for_search(held_out, grid), grid, ensembles, rule, folds=3, seed=4)
    total = len(held_out.labels)
    folds = stratified_folds(held_out.labels, torch.arange(total), 3, 4)
    folds[folds < 0] = 0  # one image is alone in its class
    right = 0
    for row in range(total):
        best = search(held_out.images((folds != folds[row]).nonzero()[:, 0]), grid=grid, ensembles=ensembles, rule=rule)
        logits = held_out.combine(best.beta, best.ensemble).logits(best.alpha)[row]
        right += int(logits.argmax() == held_out.labels[row])
    assert (found.correct, found.total) == (right, total)
