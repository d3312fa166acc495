"""Find pairs of images that look alike: all pairs whose features have at least some cosine, exactly.

With several encoders the cosine of a pair is the smallest of theirs. An encoder that tells nothing apart gives every
pair a cosine near 1, and would otherwise call everything a duplicate.

All pairs are compared, block by block, so the memory beside the features does not grow with the number of images.

Legend: n images, C width of a source's features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.errors import CafoError

BLOCK = 1024


class Pair(NamedTuple):
    """Two images that look alike."""

    first: int
    second: int
    """the larger number of the two"""
    cosine: float
    """smallest over the sources"""


class NearDuplicates(NamedTuple):
    """The pairs that were found."""

    pairs: tuple[Pair, ...]
    """those with the largest cosines, the largest first; ties in the order of the images"""
    total: int
    """the number of all pairs at or above the threshold"""


@torch.no_grad()
def find_near_duplicates(
    features: Mapping[str, Tensor], threshold: float, *, most: int = 10_000, block: int = BLOCK
) -> NearDuplicates:
    """Return the pairs of images whose cosine is at least the threshold.

    Args:
        features: {source: (n, C)} of any length of rows; a row of zeros is like no other.
        threshold: the smallest cosine.
        most: at most so many pairs are returned, so that a threshold that is too low does not fill the memory.
        block: images that are compared at once with as many others.

    Raises:
        CafoError: no source, or a threshold that is no cosine.
    """
    if not features:
        raise CafoError("near-duplicates need the features of at least one encoder")
    if not -1 < threshold <= 1:
        raise CafoError(f"the threshold of near-duplicates is a cosine, over -1 and at most 1, got {threshold}")
    images = len(next(iter(features.values())))
    best, total = torch.empty(0, dtype=torch.float32), 0
    at = torch.empty(0, 2, dtype=torch.int64)
    for start in range(0, images, block):
        for other in range(start, images, block):
            cosines = _cosines(features, slice(start, start + block), slice(other, other + block))
            if other == start:
                cosines = cosines.masked_fill(torch.ones_like(cosines, dtype=torch.bool).tril(), -torch.inf)
            pairs = (cosines >= threshold).nonzero()
            total += len(pairs)
            best = torch.cat([best, cosines[pairs[:, 0], pairs[:, 1]].cpu()])
            at = torch.cat([at, pairs.cpu() + torch.tensor([start, other])])
            if len(best) > 2 * most:
                best, at = _largest(best, at, most)
    best, at = _largest(best, at, most)
    pairs_found = zip(at.tolist(), best.tolist(), strict=True)
    return NearDuplicates(tuple(Pair(first, second, cosine) for (first, second), cosine in pairs_found), total)


def _cosines(features: Mapping[str, Tensor], rows: slice, columns: slice) -> Tensor:
    """Return the smallest cosine over the sources of each pair of a block, at most 1."""
    smallest: Tensor | None = None
    for values in features.values():
        cosines = F.normalize(values[rows].float(), dim=1) @ F.normalize(values[columns].float(), dim=1).T
        smallest = cosines if smallest is None else torch.minimum(smallest, cosines)
    assert smallest is not None
    return smallest.clamp_max_(1.0)


def _largest(cosines: Tensor, at: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the pairs with the largest cosines; ties by the first image, then by the second."""
    order = at[:, 1].argsort(stable=True)
    order = order[at[order, 0].argsort(stable=True)]
    order = order[cosines[order].argsort(descending=True, stable=True)][:most]
    return cosines[order], at[order]
