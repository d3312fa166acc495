"""Prediction sets: the classes of an image among which its own is, with a stated probability.

Split conformal prediction (Vovk et al. 2005) with the score of Sadinle, Lei and Wasserman (arXiv 1609.00451), s = 1 - p
of the true class. With B scores of held-out images and a coverage of 1 - ε, the threshold is the ⌈(B + 1)(1 - ε)⌉-th
smallest score, and the set of an image is every class with 1 - p at most the threshold. If the held-out images and a
new one may change places, its class is in its set with a probability of at least 1 - ε.

Two departures. The likeliest class is always in the set, which can only raise the coverage. And the held-out images of
a cross-fit or of leave-one-out were predicted by other keys than the classifier's, of fewer images, so that the
guarantee is not exact; docs/predict.md has the coverage that was measured.

Legend: B held-out images, N classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cafo.errors import CafoError


def score_threshold(scores: Tensor, coverage: float) -> float:
    """Return the largest score, 1 - p, that a class of a set may have.

    Args:
        scores: (B,), ascending, of held-out images.
        coverage: 1 - ε, above 0 and below 1.

    Raises:
        CafoError: a coverage that is no such number, or fewer images than it needs.
    """
    if not 0 < coverage < 1:
        raise CafoError(f"a coverage lies between 0 and 1, such as 0.9, got {coverage}")
    # Floating point must not lift a product such as 10 · 0.9 over the whole number that it is.
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    if rank > len(scores):
        needed = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise CafoError(
            f"prediction sets with a coverage of {coverage:g} need {needed} held-out images, and the classifier has "
            f"{len(scores)}: take a lower coverage, or fit it with more labelled images"
        )
    return float(scores[rank - 1])


def in_set(probabilities: Tensor, threshold: float) -> Tensor:
    """Return whether each class is in the set of each image: (M, N) probabilities → (M, N) bool.

    Args:
        probabilities: (M, N), as calibrated as those of the scores.
        threshold: from `score_threshold`.
    """
    members = 1 - probabilities <= threshold
    likeliest = probabilities.argmax(dim=-1, keepdim=True)
    return members | torch.zeros_like(members).scatter(-1, likeliest, True)
