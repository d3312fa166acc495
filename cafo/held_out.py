"""Images that a choice is made on, and what a cache says of each without having seen it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from cafo.cache import Cache, class_logits
from cafo.ensemble import Combination, Ensemble, combine


class HeldOut(NamedTuple):
    """Images with labels, p_ZS, and affinities to keys that were made without them: what `cafo.search` reads.

    They are validation images, or training images that were held out: of themselves (leave-one-out) or of the training
    of the keys (cross-fit). A key that an image may not see has the affinity -inf to it, so that its φ is 0.

    Legend: M keys, B images, N classes.
    """

    zero_shot: Tensor
    """(B, N)"""
    affinities: Mapping[str, Tensor]
    """source → (M, B)"""
    key_labels: Tensor
    """(M,) int64"""
    labels: Tensor
    """(B,) int64"""

    def combine(self, beta: float, ensemble: Ensemble) -> Combination:
        """Return eq. 3-9 at one β and ensemble, before α is applied: each part (B, N)."""
        classes = self.zero_shot.shape[1]
        sums = {name: class_logits(a, self.key_labels, classes, beta) for name, a in self.affinities.items()}
        return combine(self.zero_shot, sums, ensemble)

    def images(self, rows: Tensor) -> HeldOut:
        """Return some of the images."""
        return HeldOut(
            self.zero_shot[rows],
            {name: a[:, rows] for name, a in self.affinities.items()},
            self.key_labels,
            self.labels[rows],
        )


def on_validation(cache: Cache, features: Mapping[str, Tensor], labels: Tensor) -> HeldOut:
    """Return validation images, which see all keys.

    Args:
        cache: the cache with the trained keys.
        features: {source: (B, C)}.
        labels: (B,) int64.
    """
    return HeldOut(cache.zero_shot(features), cache.affinities(features), cache.labels, labels)
