"""APE-T: a residual of each class on chosen channels, for its text and keys alike, and a weight of each key.

Zhu et al., "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement" (ICCV 2023,
arXiv 2304.01195), as the authors' code has it:

    T̃ = T + pad(R)        G̃ = G + pad(R[y])        Ỹ = u ⊙ Y        R (N, Q) = 0 and u (M,) = 1 at first
    logits = 100 f T̃ᵀ + α · exp(-β (1 - f G̃ᵀ)) Ỹ

R and u are trained by cross-entropy at α₀ and β₀ = 1; nothing is renormalised, and all channels are used but only Q
have a residual: those with the largest score J of APE, from text alone, with w = 0.2.

The authors' best epoch is here a hyperparameter, chosen before α and β. Their code selects Q channels where it
allocates another number, and does not run as published; here both are Q, as a share of the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import affinity
from cafo.methods.ape import CALTECH_GRID, best_channels
from cafo.methods.base import Features, FewShotImages, Method, Setting, Stage, Tensors, Terms, class_sums, combinations
from cafo.methods.training import Training, train
from cafo.methods.voting import VotingGrid, kernel

_CALTECH = Training(epochs=30, lr=1e-3, eps=1e-3, weight_decay=0.1)
"""the authors' values for Caltech-101"""


@dataclass(frozen=True, kw_only=True)
class ApeT(Method):
    """APE-T: the epoch is chosen at α₀ and β₀, then α and β."""

    channels: float = 0.8
    """Q as a share of the channels"""
    similarity_weight: float = 0.2
    """w"""
    alpha: float = 1.0
    """α₀"""
    beta: float = 1.0
    """β₀"""
    training: Training = _CALTECH
    grid: VotingGrid = CALTECH_GRID

    @property
    def defaults(self) -> Setting:
        """α₀ and β₀ after the last epoch."""
        return {"alpha": self.alpha, "beta": self.beta, "epoch": self.training.epochs}

    @property
    def stages(self) -> Sequence[Stage]:
        """The epoch at α₀ and β₀, then α and β."""
        return [Stage(combinations(epoch=range(self.training.epochs + 1)), [self.alpha]), self.grid.stage()]

    def fit(self, images: FewShotImages, seed: int) -> Residuals:
        """Train the residuals and weights, and keep those of every epoch."""
        channels = best_channels(images.text, images.text, self.similarity_weight, self.channels)
        residual = torch.zeros(images.num_classes, len(channels), requires_grad=True)
        weights = torch.ones(len(images.labels), requires_grad=True)
        fitted = Residuals(images.text, images.keys, images.labels, channels)

        def loss(features: Tensor, labels: Tensor) -> Tensor:
            epoch = Epoch(residual, weights)
            terms = fitted.vote(features, affinity(fitted.keys(epoch), features), epoch, self.beta)
            return F.cross_entropy(terms.logits(self.alpha), labels)

        for epoch in train([residual, weights], loss, images, self.training, seed):
            fitted.epochs[epoch] = Epoch(residual.detach().clone(), weights.detach().clone())
        return fitted

    def restore(self, tensors: Tensors, setting: Setting) -> Residuals:
        """Return the residuals and weights of one epoch."""
        fitted = Residuals(*(tensors[name] for name in ("text", "untrained_keys", "labels", "channels")))
        fitted.epochs[int(setting["epoch"])] = Epoch(tensors["residual"], tensors["weights"])
        return fitted


class Epoch(NamedTuple):
    """The trained tensors after one epoch."""

    residual: Tensor
    """R, (N, Q)"""
    weights: Tensor
    """u, (M,)"""


class Residuals:
    """The residuals and weights of each epoch."""

    def __init__(self, text: Tensor, untrained_keys: Tensor, labels: Tensor, channels: Tensor) -> None:
        """Take T (N, C), G (M, C), its labels (M,) and the channels (Q,); `fit` adds what each epoch trained."""
        self.text, self.untrained_keys, self.labels, self.channels = text, untrained_keys, labels, channels
        self.epochs: dict[int, Epoch] = {}

    def tensors(self, setting: Setting) -> Tensors:
        """Return what is not trained, and R and u after the setting's epoch."""
        fixed = {name: value for name, value in vars(self).items() if name != "epochs"}
        return {**fixed, **self.epochs[int(setting["epoch"])]._asdict()}

    def keys(self, epoch: Epoch) -> Tensor:
        """Return G̃, (M, C)."""
        return self.untrained_keys.index_add(1, self.channels, epoch.residual[self.labels])

    def vote(self, features: Tensor, affinities: Tensor, epoch: Epoch, beta: float) -> Terms:
        """Return 100 f T̃ᵀ and the votes of keys with affinities (M, B)."""
        text = self.text.index_add(1, self.channels, epoch.residual)
        votes = kernel(affinities, beta) * epoch.weights[:, None]
        return Terms(100 * features @ text.T, class_sums(votes, self.labels, len(text)))

    @torch.no_grad()
    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return 100 f T̃ᵀ and the votes; the setting has `epoch` and `beta`."""
        unit = features.unit
        affinities = lru_cache(maxsize=1)(lambda epoch: affinity(self.keys(self.epochs[int(epoch)]), unit))

        def at(setting: Setting) -> Terms:
            epoch = setting["epoch"]
            return self.vote(unit, affinities(epoch), self.epochs[int(epoch)], setting["beta"])

        return at
