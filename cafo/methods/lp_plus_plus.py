"""LP++: a linear probe whose class weights are a visual part and a learned multiple of the text.

Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP" (CVPR 2024, arXiv 2404.02285):

    logits(f)_c = f·w_c + b_c + a_c · f·t_c                      (no factor 100)

trained by full-batch gradient descent on the cross-entropy, from

    w_c = sum of class c's features,   b = 0,   a_c = 250 · mean over classes and their images of f_i·t_{y_i}

with step sizes from Lipschitz constants, λ_max the largest eigenvalue of Fᵀ F:

    lr_w = 4 M / λ_max(Fᵀ F)            lr_a = M / (4 · max_c Σ_i (f_i·t_c)²)

w and b have momentum 0.9; a moves every 10th epoch, in the authors' code by the sum of the gradients of all epochs so
far, as they never set it to zero. `running_sum=False` takes the gradient of the one epoch.

The authors start b at random, and choose among all 300 epochs; here among every tenth, between which a stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.key_training import check_finite
from cafo.methods.base import Features, FewShotImages, Method, Setting, Stage, Tensors, Terms, class_sums, combinations

_MOMENTUM = 0.9
_TEXT_SCALE = 250
_EPOCHS_PER_TEXT_STEP = 10


@dataclass(frozen=True, kw_only=True)
class LpPlusPlus(Method):
    """LP++: nothing but the epoch is chosen, the latest on ties."""

    epochs: int = 300
    running_sum: bool = True
    """sum the gradients of `a` over all epochs, as the authors' code does"""

    @property
    def defaults(self) -> Setting:
        """The last epoch."""
        return {"alpha": 1.0, "epoch": self.epochs}

    @property
    def stages(self) -> Sequence[Stage]:
        """The epochs, the latest first."""
        return [Stage(combinations(epoch=self._kept_epochs[::-1]))]

    @property
    def _kept_epochs(self) -> list[int]:
        """The epochs whose weights are kept: those after which `a` moves, and the last."""
        return [*range(_EPOCHS_PER_TEXT_STEP, self.epochs, _EPOCHS_PER_TEXT_STEP), self.epochs]

    @torch.no_grad()
    def fit(self, images: FewShotImages, seed: int) -> Probe:
        """Train on the first view of each image."""
        features, labels = images.views.unit[0], images.labels
        count, similarity = len(labels), features @ images.text.T  # (M, N)
        own = class_sums(similarity.gather(1, labels[:, None]), labels, images.num_classes)[0]
        mean_own = (own / torch.bincount(labels, minlength=images.num_classes)).mean()
        weights = class_sums(features, labels, images.num_classes).T.contiguous()
        biases, text = torch.zeros(images.num_classes), (_TEXT_SCALE * mean_own).repeat(images.num_classes)
        lr = 4 * count / float(torch.linalg.matrix_norm(features, ord=2)) ** 2
        text_lr = count / (4 * float(similarity.square().sum(dim=0).max()))
        targets = F.one_hot(labels, images.num_classes).float()
        speed, bias_speed, text_gradient = torch.zeros_like(weights), torch.zeros_like(biases), torch.zeros_like(text)
        kept, kept_epochs = {}, set(self._kept_epochs)
        for epoch in range(1, self.epochs + 1):
            log_p = (features @ weights.T + biases + text * similarity).log_softmax(dim=-1)
            check_finite(-(targets * log_p).sum() / count, f"epoch {epoch}", lr)
            error = (log_p.exp() - targets) / count  # gradient of the loss by the logits, (M, N)
            speed = _MOMENTUM * speed + error.T @ features
            bias_speed = _MOMENTUM * bias_speed + error.sum(dim=0)
            text_gradient = (text_gradient if self.running_sum else 0) + (error * similarity).sum(dim=0)
            weights, biases = weights - lr * speed, biases - lr * bias_speed
            if epoch % _EPOCHS_PER_TEXT_STEP == 0:
                text = text - text_lr * text_gradient
            if epoch in kept_epochs:
                kept[epoch] = Weights(weights, biases, text)
        return Probe(images.text.contiguous(), kept)

    def restore(self, tensors: Tensors, setting: Setting) -> Probe:
        """Return the weights of one epoch."""
        weights = Weights(tensors["visual"], tensors["biases"], tensors["text_weights"])
        return Probe(tensors["text"], {int(setting["epoch"]): weights})


class Weights(NamedTuple):
    """The weights after one epoch."""

    visual: Tensor
    """w, (N, C)"""
    biases: Tensor
    """b, (N,)"""
    text: Tensor
    """a, (N,)"""


class Probe:
    """The weights of each kept epoch."""

    def __init__(self, text: Tensor, epochs: Mapping[int, Weights]) -> None:
        """Take the text (N, C) and {epoch: weights}."""
        self.text, self.epochs = text, epochs

    def tensors(self, setting: Setting) -> Tensors:
        """Return the text, and w, b and a after the setting's epoch."""
        weights = self.epochs[int(setting["epoch"])]
        return {"text": self.text, "visual": weights.visual, "biases": weights.biases, "text_weights": weights.text}

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return f·w + b, and the text's part as the term; the setting has `epoch`."""
        unit = features.unit

        def at(setting: Setting) -> Terms:
            weights = self.epochs[int(setting["epoch"])]
            return Terms(unit @ weights.visual.T + weights.biases, weights.text * (unit @ self.text.T))

        return at
