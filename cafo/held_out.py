"""Images that a choice is made on, and what a cache says of each without having seen it.

They are validation images, or training images that were held out: of themselves (leave-one-out) or of the training of
the keys (cross-fit). A key that an image may not see has the affinity -inf to it, so that its φ is 0.

`HeldOut` holds affinities, which take M numbers for each image and source. `HeldOutFeatures` holds what they are
products of, and computes those of some images when they are asked for: the choice reads it in blocks, so that memory
does not grow with the number of images.

Legend: M keys, B images, N classes, C width of a source's features, F sets of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cafo.cache import Cache, affinity, combine_affinities, count_correct, zero_shot_logits
from cafo.ensemble import Combination, Ensemble

IMAGES_PER_BLOCK = 256


class HeldOut(NamedTuple):
    """Images with labels, p_ZS, and affinities to keys that were made without them."""

    zero_shot: Tensor
    """(B, N)"""
    affinities: Mapping[str, Tensor]
    """source → (M, B)"""
    key_labels: Tensor
    """(M,) int64"""
    labels: Tensor
    """(B,) int64"""

    @property
    def total(self) -> int:
        """B."""
        return self.zero_shot.shape[0]

    @property
    def classes(self) -> int:
        """N."""
        return self.zero_shot.shape[1]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self.affinities)

    def combine(self, beta: float, ensemble: Ensemble) -> Combination:
        """Return eq. 3-9 at one β and ensemble, before α is applied: each part (B, N)."""
        return combine_affinities(self.zero_shot, self.affinities, self.key_labels, beta, ensemble)

    def count_correct(self, alpha: float, beta: float, ensemble: Ensemble) -> int:
        """Return the number of images that are correct at some values, by eq. 6-9 in float64 on p_ZS and affinities."""
        affinities = {name: a.double() for name, a in self.affinities.items()}
        exact = self._replace(zero_shot=self.zero_shot.double(), affinities=affinities)
        return count_correct(exact.combine(beta, ensemble).logits(alpha), self.labels)

    def images(self, rows: Tensor) -> HeldOut:
        """Return some of the images."""
        return HeldOut(
            self.zero_shot[rows],
            {name: a[:, rows] for name, a in self.affinities.items()},
            self.key_labels,
            self.labels[rows],
        )

    def load(self) -> HeldOut:
        """Return the images themselves, as their affinities are known."""
        return self


class KeySet(NamedTuple):
    """Keys that some images see."""

    keys: Mapping[str, Tensor]
    """source → (M, C)"""
    seen: Tensor | None = None
    """(M,) bool: the keys that they may see; None for all"""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutFeatures:
    """Images with labels, features and the keys that were made without them."""

    features: Mapping[str, Tensor]
    """source → (n, C): features of at least these images; they may be memory-mapped, and of any floating type"""
    rows: Tensor
    """(B,) int64: the row of `features` of each image"""
    labels: Tensor
    """(B,) int64"""
    key_sets: Sequence[KeySet]
    """F sets"""
    key_labels: Tensor
    """(M,) int64"""
    classifier: Tensor
    """W, (C, N)"""
    zero_shot_source: str
    """the source whose features are multiplied with W"""
    sets: Tensor | None = None
    """(B,) int64: the set of keys that each image sees; None for the only one"""
    groups: tuple[Tensor, Tensor] | None = None
    """(M,) and (B,) int64: an image does not see the keys whose group is its own; None if it sees all of its set"""

    @property
    def total(self) -> int:
        """B."""
        return len(self.rows)

    @property
    def classes(self) -> int:
        """N."""
        return self.classifier.shape[1]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self.key_sets[0].keys)

    def images(self, rows: Tensor) -> HeldOutFeatures:
        """Return some of the images, whose features are not copied."""
        return replace(
            self,
            rows=self.rows[rows],
            labels=self.labels[rows],
            sets=None if self.sets is None else self.sets[rows],
            groups=None if self.groups is None else (self.groups[0], self.groups[1][rows]),
        )

    def load(self) -> HeldOut:
        """Return the images with their affinities, which are computed now."""
        features = {name: self.features[name][self.rows] for name in {self.zero_shot_source, *self.sources}}
        affinities = {name: self._affinity(name, features[name]) for name in self.sources}
        zero_shot = zero_shot_logits(features[self.zero_shot_source], self.classifier)
        return HeldOut(zero_shot, affinities, self.key_labels, self.labels)

    def combine(self, beta: float, ensemble: Ensemble) -> Combination:
        """Return eq. 3-9 at one β and ensemble, before α is applied: each part (B, N)."""
        parts = [block.combine(beta, ensemble) for block in blocks_of(self)]
        if len(parts) == 1:
            return parts[0]
        return Combination(
            torch.cat([part.base for part in parts]),
            torch.cat([part.term for part in parts]),
            torch.cat([part.shares for part in parts]),
            parts[0].sources,
        )

    def count_correct(self, alpha: float, beta: float, ensemble: Ensemble) -> int:
        """Return the number of images that are correct at some values, by eq. 6-9 in float64 on p_ZS and affinities."""
        return sum(block.count_correct(alpha, beta, ensemble) for block in blocks_of(self))

    def _affinity(self, name: str, features: Tensor) -> Tensor:
        # One row per image in memory: the sums over the classes of one image then read memory in order.
        products = torch.empty(len(features), len(self.key_labels), device=features.device)
        for number, (keys, seen) in enumerate(self.key_sets):
            at = slice(None) if self.sets is None else (self.sets == number).nonzero()[:, 0]
            found = affinity(features[at], keys[name])
            products[at] = found if seen is None else found.masked_fill_(~seen, -torch.inf)
        if self.groups is not None:
            products.masked_fill_(self.groups[0] == self.groups[1][:, None], -torch.inf)
        return products.T


HeldOutImages: TypeAlias = HeldOut | HeldOutFeatures


def blocks_of(images: HeldOutImages, size: int = IMAGES_PER_BLOCK) -> Iterator[HeldOut]:
    """Yield all images in blocks, with their affinities; one empty block if there is no image."""
    for rows in torch.arange(images.total, device=images.labels.device).split(size):
        yield images.images(rows).load()


def on_validation(cache: Cache, features: Mapping[str, Tensor], labels: Tensor) -> HeldOutFeatures:
    """Return validation images, which see all keys.

    Args:
        cache: the cache with the trained keys.
        features: {source: (B, C)}.
        labels: (B,) int64.

    Raises:
        CafoError: features of a source are missing.
    """
    cache.require(features)
    return HeldOutFeatures(
        features=features,
        rows=torch.arange(len(labels), device=labels.device),
        labels=labels,
        key_sets=[KeySet(cache.keys)],
        key_labels=cache.labels,
        classifier=cache.classifier,
        zero_shot_source=cache.zero_shot_source,
    )
