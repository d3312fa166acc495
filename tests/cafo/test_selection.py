"""The settings of a choice reach what is chosen: the measure of the epoch, and the range of β."""

import pytest

from cafo.cross_fit import cross_fit
from cafo.key_training import KeyTraining
from cafo.search_grid import BetaGrid
from cafo.selection import Choosing, select
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
