"""GDA: Gaussian discriminant analysis with one covariance for all classes, beside the zero-shot classifier.

Wang et al., "A Hard-to-Beat Baseline for Training-Free CLIP-based Adaptation" (ICLR 2024, arXiv 2402.04087):

    μ_c = mean of class c's unit features (all views are samples)       A = Σ_i (x_i - μ_{y_i})(x_i - μ_{y_i})ᵀ
    Π   = C · (A + tr(A)/(n-1) · I)⁻¹            n = V·M samples, C the width of an embedding
    w_c = Π μ_c,    b_c = log(1/N) - ½ μ_cᵀ Π μ_c
    logits(f) = 100 f Tᵀ + α (f·w + b)

Counting views as samples weakens the shrinkage: the number of views acts on the result like a hyperparameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cafo.cache import zero_shot_logits
from cafo.methods.base import (
    Features,
    FewShotImages,
    Given,
    Method,
    Setting,
    Stage,
    Tensors,
    Terms,
    class_means,
    powers_of_ten,
)


@dataclass(frozen=True, kw_only=True)
class Gda(Method):
    """Gaussian discriminant analysis beside the zero-shot classifier."""

    alpha_powers: tuple[int, int] = (-4, 2)
    """The least and the largest α, as powers of ten."""

    @property
    def defaults(self) -> Setting:
        """The middle of the authors' grid, which give none."""
        return {"alpha": 0.1}

    @property
    def stages(self) -> Sequence[Stage]:
        """The authors' grid of α."""
        return [Stage([{}], powers_of_ten(*self.alpha_powers))]

    def lacks(self, given: Given) -> str | None:
        """Several samples of some class are needed, for else there is no variance."""
        if given.shots * given.views > 1:
            return None
        return "GDA needs two images or two views of each class; give more views"

    def fit(self, images: FewShotImages, seed: int) -> Discriminant:
        """Solve for w and b."""
        return Discriminant(images.classifier, *discriminant(*images.samples, images.num_classes))

    def restore(self, tensors: Tensors, setting: Setting) -> Discriminant:
        """Return the discriminant."""
        return Discriminant(tensors["classifier"], tensors["weights"], tensors["biases"])


def discriminant(samples: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return the weights (N, C) and biases (N,) of the discriminant, with a uniform prior over the classes.

    Args:
        samples: (n, C).
        labels: (n,) int64.
        num_classes: N.
    """
    samples = samples.double()
    count, width = samples.shape
    means = class_means(samples, labels, num_classes)
    centred = samples - means[labels]
    scatter = centred.T @ centred
    shrunk = scatter + scatter.trace() / (count - 1) * torch.eye(width, dtype=samples.dtype, device=samples.device)
    weights = width * torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk)).T  # (N, C)
    biases = -math.log(num_classes) - 0.5 * (means * weights).sum(dim=1)
    return weights.float(), biases.float()


class Discriminant:
    """The weights and biases, and the text classifier."""

    def __init__(self, classifier: Tensor, weights: Tensor, biases: Tensor) -> None:
        """Take the classifier (C, N), weights (N, C) and biases (N,)."""
        self.classifier, self.weights, self.biases = classifier, weights, biases

    def tensors(self, setting: Setting) -> Tensors:
        """Return the classifier, w and b."""
        return {"classifier": self.classifier, "weights": self.weights, "biases": self.biases}

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return 100 f Tᵀ and f·w + b."""
        terms = Terms(zero_shot_logits(features.unit, self.classifier), features.unit @ self.weights.T + self.biases)
        return lambda setting: terms
