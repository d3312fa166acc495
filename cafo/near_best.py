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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from cafo.calibration import free_temperature_loss
from cafo.ensemble import NOTHING, Ensemble
from cafo.held_out import HeldOut
from cafo.prior import Prior
from cafo.reduced import ReducedImages
from cafo.search_grid import Candidate

_RATIOS = tuple(1.7**i for i in range(-6, 7))
"""values of α that are compared at each β, as multiples of the expected α; and the most accurate one"""
_PAIRS = 24
"""pairs of β and ensemble that are compared, evenly spread over those near the highest accuracy"""
_LOGITS_AT_ONCE = 1 << 22
_LOGITS_OF_LOSS = 1 << 16
_IMAGES_OF_LOSS = 256
"""The loss is computed on so many logits, but of at least so many images, evenly spread if there are more."""


class NearBest(NamedTuple):
    """The choice, whose correct images were counted again."""

    alpha: float
    beta: float
    ensemble: int
    correct: int


class _Cost(NamedTuple):
    """The loss of all images together, in nats, and the penalty of α and β. Costs sort lowest first."""

    cost: float
    alpha: float
    beta: float
    ensemble: int


def near_highest(highest: int, total: int) -> float:
    """Return the number of correct images that is one standard error below the highest."""
    return highest - math.sqrt(highest * (total - highest) / total)


def choose_near_best(
    candidates: Sequence[Candidate], images: ReducedImages, ensembles: Sequence[Ensemble], prior: Prior, floor: int
) -> NearBest | None:
    """Return the candidate with the lowest cost among those near the highest accuracy.

    Args:
        candidates: the best α of every β and ensemble.
        images: the images that the choice is made on.
        ensembles: what the candidates' numbers of ensembles refer to.
        prior: the expected α and β.
        floor: images that must be correct.

    Returns:
        None if no candidate has its accuracy when it is counted again.
    """
    total = len(images.rows)
    highest = total - min(candidates).wrong
    enough = max(math.ceil(near_highest(highest, total)), floor)
    near = sorted((c for c in candidates if total - c.wrong >= enough), key=lambda c: (c.ensemble, c.beta))
    step = max(1, len(near) // _PAIRS)
    pairs = dict.fromkeys([min(near), *near[step // 2 :: step]])
    step = max(1, total // max(_IMAGES_OF_LOSS, _LOGITS_OF_LOSS // images.images.classes))
    judged = images.originals(torch.arange(0, total, step, device=images.rows.device)).load()
    costs = [
        cost
        for number in dict.fromkeys(c.ensemble for c in pairs)
        for cost in _costs([c for c in pairs if c.ensemble == number], images, judged, ensembles[number], prior, enough)
    ]
    for cost in sorted(costs):
        correct = images.count_correct(cost.alpha, cost.beta, ensembles[cost.ensemble])
        if correct >= enough:
            return NearBest(cost.alpha, cost.beta, cost.ensemble, correct)
    return None


def _costs(
    candidates: Sequence[Candidate],
    images: ReducedImages,
    judged: HeldOut,
    ensemble: Ensemble,
    prior: Prior,
    enough: int,
) -> Iterator[_Cost]:
    """Yield those values of α that are accurate enough at the β of each candidate of one ensemble, with their costs.

    The loss is that of the images of `judged`. A candidate's own α is accurate enough.
    """
    total, has_alpha = len(images.rows), ensemble.baseline != NOTHING
    others = [ratio * prior.alpha for ratio in _RATIOS if has_alpha]
    counts = images.count_correct_at(others, [c.beta for c in candidates], ensemble) if others else None
    for i, candidate in enumerate(candidates):
        base, term, _, _ = judged.combine(candidate.beta, ensemble)
        alphas = base.new_tensor([candidate.alpha, *others])
        if counts is not None:
            alphas = torch.cat([alphas[:1], alphas[1:][counts[i] >= enough]])
        for some in alphas.split(max(1, _LOGITS_AT_ONCE // base.numel())):
            losses = free_temperature_loss(base + some[:, None, None] * term, judged.labels)
            for alpha, loss in zip(some.tolist(), losses.tolist(), strict=True):
                penalty = prior.penalty(alpha, candidate.beta, zero_shot=has_alpha)
                yield _Cost(total * loss + penalty, alpha, candidate.beta, candidate.ensemble)
