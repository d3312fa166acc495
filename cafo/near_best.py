"""The choice among values of α, β and ensembles whose accuracies differ by less than chance.

With few images many values share the highest accuracy, and one image more or less is luck. All values within one
standard error of the highest accuracy are taken for equally accurate, and the one is chosen whose logits fit best: by
the lowest loss at a free temperature (`cafo.calibration`), plus what the values differ from those to expect
(`cafo.prior`), which weighs as much as one or a few images.

No choice is less accurate than a floor: that of the best single part of the cascade.

Legend: B images, N classes, A values of α.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.calibration import free_temperature_loss
from cafo.ensemble import NOTHING, Ensemble
from cafo.held_out import HeldOut
from cafo.prior import Prior
from cafo.search_grid import Candidate

_RATIOS = tuple(1.5**i for i in range(-8, 10))
"""values of α that are compared at each β, as multiples of the expected α; and the most accurate one"""
_PAIRS = 48
"""pairs of β and ensemble that are compared, evenly spread over those near the highest accuracy"""
_LOGITS_AT_ONCE = 1 << 22
_LOGITS_OF_LOSS = 1 << 19
"""logits of the images that the loss is computed on: with more images or classes, of evenly spread images"""


class NearBest(NamedTuple):
    """A candidate whose accuracy was counted directly."""

    cost: float
    """loss of all images together, in nats, and the penalty of α and β"""
    alpha: float
    beta: float
    ensemble: int
    correct: int


def choose_near_best(
    candidates: Sequence[Candidate], images: HeldOut, ensembles: Sequence[Ensemble], prior: Prior, floor: int
) -> NearBest | None:
    """Return the candidate with the lowest cost among those near the highest accuracy.

    Args:
        candidates: the best α of every β and ensemble.
        images: the images that the choice is made on.
        ensembles: what the candidates' numbers of ensembles refer to.
        prior: the expected α and β.
        floor: images that must be correct.

    Returns:
        None if no candidate has its accuracy when it is counted in float32.
    """
    total = len(images.labels)
    highest = total - min(candidates).wrong
    error = math.sqrt(highest * (total - highest) / total)
    enough = max(math.ceil(highest - error), floor)
    near = sorted((c for c in candidates if total - c.wrong >= enough), key=lambda c: (c.ensemble, c.beta))
    step = max(1, len(near) // _PAIRS)
    best = min(near)
    compared = dict.fromkeys([best, *near[step // 2 :: step]])
    found = [one for c in compared for one in _evaluate(c, images, ensembles[c.ensemble], prior, enough)]
    return min(found, default=None)


def _evaluate(candidate: Candidate, images: HeldOut, ensemble: Ensemble, prior: Prior, enough: int) -> list[NearBest]:
    """Return those values of α, at the candidate's β and ensemble, that are accurate enough, with their costs."""
    total, classes = images.zero_shot.shape
    combination = images.combine(candidate.beta, ensemble)
    has_alpha = ensemble.baseline != NOTHING
    alphas = [candidate.alpha]
    if has_alpha:
        alphas += [0.0, *(ratio * prior.alpha for ratio in _RATIOS)]
    spread = torch.arange(0, total, max(1, total * classes // _LOGITS_OF_LOSS), device=images.labels.device)
    base, term = combination.base[spread], combination.term[spread]
    found = []
    for some in torch.tensor(alphas, dtype=base.dtype, device=base.device).split(
        max(1, _LOGITS_AT_ONCE // combination.base.numel())
    ):
        correct = torch.stack([_correct(combination.logits(float(alpha)), images.labels) for alpha in some])
        if (kept := correct >= enough).any():
            logits = base + some[kept][:, None, None] * term
            losses = free_temperature_loss(logits, images.labels[spread])
            for alpha, count, loss in zip(some[kept].tolist(), correct[kept].tolist(), losses.tolist(), strict=True):
                penalty = prior.penalty(alpha, candidate.beta, zero_shot=has_alpha)
                cost = total * loss + penalty
                found.append(NearBest(cost, alpha, candidate.beta, candidate.ensemble, count))
    return found


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels).sum()
