"""Nearest class mean: the simplest classifier of features, without text and without hyperparameters.

Mensink et al., "Distance-Based Image Classification: Generalizing to New Classes at Near-Zero Cost" (TPAMI 2013); with
a trained encoder it is the classifier of Snell et al., "Prototypical Networks for Few-shot Learning" (NeurIPS 2017):

    logits(f)_c = -½ ‖f - μ_c‖²        μ_c the mean of class c's unit features, over images and views
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cafo.methods.base import Features, FewShotImages, Method, Setting, Stage, Tensors, Terms, class_means


@dataclass(frozen=True, kw_only=True)
class NearestMean(Method):
    """Nearest class mean; it has nothing to choose."""

    @property
    def defaults(self) -> Setting:
        """No hyperparameter."""
        return {"alpha": 0.0}

    @property
    def stages(self) -> Sequence[Stage]:
        """Nothing is chosen."""
        return []

    def fit(self, images: FewShotImages, seed: int) -> ClassMeans:
        """Compute the means."""
        return ClassMeans(class_means(*images.samples, images.num_classes))

    def restore(self, tensors: Tensors, setting: Setting) -> ClassMeans:
        """Return the means."""
        return ClassMeans(tensors["means"])


class ClassMeans:
    """The mean of each class."""

    def __init__(self, means: Tensor) -> None:
        """Take the means (N, C)."""
        self.means = means

    def tensors(self, setting: Setting) -> Tensors:
        """Return the means."""
        return {"means": self.means}

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return half the negative squared distances, and the term 0."""
        distances = torch.cdist(features.unit, self.means, compute_mode="donot_use_mm_for_euclid_dist")
        logits = -0.5 * distances.square()
        return lambda setting: Terms(logits, torch.zeros_like(logits))
