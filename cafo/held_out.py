"""Images that a choice is made on, and what a cache says of each without having seen it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from cafo.cache import Cache, combine_affinities, count_correct
from cafo.ensemble import Combination, Ensemble


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
        return combine_affinities(self.zero_shot, self.affinities, self.key_labels, beta, ensemble)

    def count_correct(self, alpha: float, beta: float, ensemble: Ensemble) -> int:
        """Return the number of images that are correct at some values, by eq. 9 itself in float32."""
        return count_correct(self.combine(beta, ensemble).logits(alpha), self.labels)

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
