"""APE: Tip-Adapter's cache on chosen channels, its votes weighted by how far text disagrees.

Zhu et al., "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement" (ICCV 2023,
arXiv 2304.01195). The Q channels with the largest score are kept:

    J_k = -w · S_k + (1 - w) · U_k
    S_k = mean over pairs of different classes of the product of their means of channel k, text and keys together
    U_k = variance over the classes of the text's channel k

and with ′ for "the chosen channels, scaled to unit length":

    p      = softmax over classes of G′ T′ᵀ          (without the factor 100)
    r_i    = exp(γ · log₂((1 + ε) / (p_{i,y_i} + ε)))                 ε = 1e-6
    logits = 100 f Tᵀ + α · exp(-β (1 - f′ G′ᵀ)) (r ⊙ Y)

The authors set Q, w and the grids' ends for each data set; here Q is a share of the channels, near their middle, and
the rest is theirs for Caltech-101. Where classes have different numbers of images, S is a mean of class means, which is
the authors' formula for equal numbers. They vary β, then α, then γ; here α varies fastest, which matters to ties alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import affinity, zero_shot_logits
from cafo.methods.base import Features, FewShotImages, Method, Setting, Stage, Tensors, Terms, class_sums
from cafo.methods.voting import VotingGrid, kernel, linear_steps

CALTECH_GRID = VotingGrid(beta_high=7.0, alpha_high=7.0)
"""the authors' values for Caltech-101"""

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ape(Method):
    """APE: hyperparameters α, β and γ, nothing trained."""

    channels: float = 0.7
    """Q as a share of the channels"""
    similarity_weight: float = 0.5
    """w"""
    grid: VotingGrid = CALTECH_GRID
    gamma_high: float = 1.0
    """upper end of the grid of γ, which it leaves out"""
    gamma_steps: int = 20

    @property
    def defaults(self) -> Setting:
        """The authors' values before their search on Caltech-101."""
        return {"alpha": 1.0, "beta": 1.0, "gamma": 0.1}

    @property
    def stages(self) -> Sequence[Stage]:
        """The authors' grid."""
        return [self.grid.stage(gamma=linear_steps(0.0, self.gamma_high, self.gamma_steps))]

    def fit(self, images: FewShotImages, seed: int) -> ApeCache:
        """Choose the channels."""
        counts = torch.bincount(images.labels, minlength=images.num_classes)
        sums = images.text + class_sums(images.keys, images.labels, images.num_classes).T
        means = sums / (counts + 1)[:, None]
        kept = best_channels(means, images.text, self.similarity_weight, self.channels)
        keys, text = (F.normalize(rows[:, kept], dim=-1) for rows in (images.keys, images.text))
        return ApeCache(images.classifier, images.labels, kept, keys, disagreement(keys, text, images.labels))

    def restore(self, tensors: Tensors, setting: Setting) -> ApeCache:
        """Return the keys on the chosen channels."""
        names = ("classifier", "labels", "channels", "keys", "disagreement")
        return ApeCache(*(tensors[name] for name in names))


def best_channels(means: Tensor, text: Tensor, similarity_weight: float, share: float) -> Tensor:
    """Return the channels with the largest scores J: (Q,), best first.

    Args:
        means: (N, C): each class's mean over its text and keys.
        text: (N, C): the text classifier.
        similarity_weight: w.
        share: Q / C.
    """
    classes, width = means.shape
    similarity = (means.sum(dim=0).square() - means.square().sum(dim=0)) / (classes * (classes - 1))
    score = -similarity_weight * similarity + (1 - similarity_weight) * text.var(dim=0)
    return score.topk(max(1, int(share * width))).indices


def disagreement(keys: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Return log₂((1 + ε) / (p_{i,y_i} + ε)), how far text disagrees with each key's label: (M,).

    Args:
        keys: G′, (M, Q).
        text: T′, (N, Q).
        labels: (M,) int64.
    """
    share = (keys @ text.T).softmax(dim=-1).gather(1, labels[:, None])[:, 0]
    return torch.log2((1 + _EPSILON) / (share + _EPSILON))


class ApeCache:
    """The keys on the chosen channels, with their disagreement, and the text classifier."""

    def __init__(
        self, classifier: Tensor, labels: Tensor, channels: Tensor, keys: Tensor, disagreement: Tensor
    ) -> None:
        """Take the classifier (C, N), the keys' labels (M,), the channels (Q,), G′ (M, Q) and the disagreement (M,)."""
        self.classifier, self.labels, self.channels = classifier, labels, channels
        self.keys, self.disagreement = keys, disagreement

    def tensors(self, setting: Setting) -> Tensors:
        """Return all of them; no setting needs others."""
        return dict(vars(self))

    @torch.no_grad()
    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return 100 f Tᵀ and the weighted votes; the setting has `beta` and `gamma`."""
        base, classes = zero_shot_logits(features.unit, self.classifier), self.classifier.shape[1]
        seen = affinity(self.keys, F.normalize(features.unit[:, self.channels], dim=-1))
        kernels = lru_cache(maxsize=1)(lambda beta: kernel(seen, beta))

        def at(setting: Setting) -> Terms:
            weights = torch.exp(setting["gamma"] * self.disagreement)
            votes = kernels(setting["beta"]) * weights[:, None]
            return Terms(base, class_sums(votes, self.labels, classes))

        return at
