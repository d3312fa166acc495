"""Tip-Adapter and Tip-Adapter-F: a cache of features votes, and its keys may be trained.

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (ECCV 2022, arXiv 2207.09519):

    logits(f) = 100 f Tᵀ + α · exp(-β (1 - f Gᵀ)) Y

with T the unit text classifier, G the keys (mean of each image's views, then unit length) and Y their one-hot labels.
Tip-Adapter-F trains G, from these keys on and never renormalised, by cross-entropy of the logits at α₀ and β₀.

The authors take the best epoch on the test set; here the epoch is a hyperparameter like α and β, chosen before them.
The grids' ends are the authors' for Caltech-101.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import affinity, zero_shot_logits
from cafo.methods.base import Features, FewShotImages, Method, Setting, Stage, Tensors, Terms, class_sums, combinations
from cafo.methods.training import Training, train
from cafo.methods.voting import VotingGrid, kernel

_CALTECH = Training(epochs=20, lr=1e-3, eps=1e-4, weight_decay=0.01)
_GRID = VotingGrid(beta_high=12.0, alpha_high=5.0)
"""the authors' values for Caltech-101"""


@dataclass(frozen=True, kw_only=True)
class TipAdapter(Method):
    """Tip-Adapter: hyperparameters α and β, nothing trained."""

    grid: VotingGrid = _GRID

    @property
    def defaults(self) -> Setting:
        """The authors' values before their search on ImageNet."""
        return {"alpha": 1.17, "beta": 1.0, "epoch": 0}

    @property
    def stages(self) -> Sequence[Stage]:
        """The authors' grid."""
        return [self.grid.stage()]

    def fit(self, images: FewShotImages, seed: int) -> TipCache:
        """Make the keys."""
        return TipCache(images.classifier, images.labels, {0: images.keys})

    def restore(self, tensors: Tensors, setting: Setting) -> TipCache:
        """Return the keys."""
        return TipCache.restore(tensors, setting)


@dataclass(frozen=True, kw_only=True)
class TipAdapterF(Method):
    """Tip-Adapter-F: the keys are trained; the epoch is chosen at α₀ and β₀, then α and β."""

    grid: VotingGrid = _GRID
    alpha: float = 1.17
    """α₀"""
    beta: float = 1.0
    """β₀"""
    training: Training = _CALTECH

    @property
    def defaults(self) -> Setting:
        """α₀ and β₀ after the last epoch."""
        return {"alpha": self.alpha, "beta": self.beta, "epoch": self.training.epochs}

    @property
    def stages(self) -> Sequence[Stage]:
        """The epoch at α₀ and β₀, then α and β."""
        return [Stage(combinations(epoch=range(self.training.epochs + 1)), [self.alpha]), self.grid.stage()]

    def fit(self, images: FewShotImages, seed: int) -> TipCache:
        """Train the keys, and keep those of every epoch."""
        keys = images.keys.requires_grad_()

        def loss(features: Tensor, labels: Tensor) -> Tensor:
            votes = class_sums(kernel(affinity(keys, features), self.beta), images.labels, images.num_classes)
            return F.cross_entropy(100 * features @ images.text.T + self.alpha * votes, labels)

        epochs = train([keys], loss, images, self.training, seed)
        return TipCache(images.classifier, images.labels, {epoch: keys.detach().clone() for epoch in epochs})

    def restore(self, tensors: Tensors, setting: Setting) -> TipCache:
        """Return the keys of one epoch."""
        return TipCache.restore(tensors, setting)


class TipCache:
    """The keys of each epoch, and their votes."""

    def __init__(self, classifier: Tensor, labels: Tensor, keys: Mapping[int, Tensor]) -> None:
        """Take the text classifier (C, N), the keys' labels (M,) and keys {epoch: (M, C)}."""
        self.classifier, self.labels, self.keys = classifier, labels, keys

    @classmethod
    def restore(cls, tensors: Tensors, setting: Setting) -> TipCache:
        """Return what has given `tensors`."""
        return cls(tensors["classifier"], tensors["labels"], {int(setting["epoch"]): tensors["keys"]})

    def tensors(self, setting: Setting) -> Tensors:
        """Return the classifier, the labels, and the keys of the setting's epoch."""
        return {"classifier": self.classifier, "labels": self.labels, "keys": self.keys[int(setting["epoch"])]}

    @torch.no_grad()
    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return 100 f Tᵀ and the votes; the setting has `beta` and `epoch`."""
        unit, classes = features.unit, self.classifier.shape[1]
        base = zero_shot_logits(unit, self.classifier)
        affinities = lru_cache(maxsize=1)(lambda epoch: affinity(self.keys[int(epoch)], unit))

        def at(setting: Setting) -> Terms:
            votes = kernel(affinities(setting["epoch"]), setting["beta"])
            return Terms(base, class_sums(votes, self.labels, classes))

        return at
