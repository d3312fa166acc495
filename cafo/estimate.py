"""An estimate of a classifier's accuracy, from images that it was not trained on, where there is no test split.

α and β were chosen on the held-out images, so their accuracy there is too high. For the estimate, the images are
divided again: α, β and the ensemble are chosen without a fold, and are then counted on that fold. What is left of bias
is on the safe side: keys were trained on fewer images than the classifier has.

Legend: B images, F folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cafo.choice_names import Rule
from cafo.cross_fit import stratified_folds
from cafo.ensemble import Ensemble
from cafo.reduced import ReducedImages
from cafo.search import search_reduced
from cafo.search_grid import BetaGrid
from cafo.wilson import wilson_interval

_BETAS = 40
"""values of β that each fold's choice is made among"""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The images of an estimate, and those that were correct; means, if it is a mean of several."""

    correct: float
    total: float

    @property
    def accuracy(self) -> float:
        """The share of the images that are correct."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return wilson_interval(self.accuracy, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%}, 95% interval {low:.1%} to {high:.1%}, from {self.total:.0f} held-out images"


@torch.no_grad()
def estimate_accuracy(
    images: ReducedImages, grid: BetaGrid, ensembles: Sequence[Ensemble], rule: Rule, folds: int, seed: int
) -> Estimate:
    """Return the accuracy on held-out images of values that were chosen without them.

    Args:
        images: at least two held-out images, reduced for the range of the grid.
        grid, ensembles, rule: as for `search`, with fewer values of β.
        folds: F.
        seed: seed of the division.
    """
    coarse = replace(grid, steps=min(grid.steps, _BETAS), refinements=0)
    rows = torch.arange(len(images.rows), device=images.rows.device)
    fold_of = stratified_folds(images.labels, rows, folds, seed)
    fold_of[fold_of < 0] = torch.arange(int((fold_of < 0).sum()), device=rows.device) % folds
    correct = 0
    for fold in fold_of.unique():
        others, held = images.subset(rows[fold_of != fold]), images.subset(rows[fold_of == fold])
        if not len(others.rows):
            others = images
        best = search_reduced(others, grid=coarse, ensembles=ensembles, rule=rule)
        correct += held.count_correct(best.alpha, best.beta, best.ensemble)
    return Estimate(correct=correct, total=len(rows))
