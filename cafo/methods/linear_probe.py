"""Linear probe: multinomial logistic regression on embeddings, without text.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (ICML 2021, arXiv 2103.00020):

    minimise  mean cross-entropy of (F Wᵀ + b)  +  ‖W‖² / (2 c M)

by L-BFGS, on the embeddings as they are, unnormalised, of images without augmentation; b is not penalised. c is
scikit-learn's C. CoOp's sweep tries seven values and then bisects; here one value for each power of ten is tried, each
fit beginning at the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.methods.base import (
    Features,
    FewShotImages,
    Method,
    Setting,
    Stage,
    Tensors,
    Terms,
    combinations,
    powers_of_ten,
)


@dataclass(frozen=True, kw_only=True)
class LinearProbe(Method):
    """Logistic regression; its hyperparameter is the inverse penalty c."""

    inverse_penalties: tuple[float, ...] = tuple(powers_of_ten(-6, 6))
    """candidates, rising"""
    default: float = 1.0
    """c where nothing is chosen: scikit-learn's default"""
    steps: int = 1000
    """most iterations of L-BFGS for each candidate"""
    tolerance: float = 1e-4
    """the largest entry of the gradient at which it ends"""

    @property
    def defaults(self) -> Setting:
        """The default penalty."""
        return {"alpha": 0.0, "inverse_penalty": self.default}

    @property
    def stages(self) -> Sequence[Stage]:
        """The candidates, the largest first, as CoOp has them."""
        return [Stage(combinations(inverse_penalty=self.inverse_penalties[::-1]))]

    def fit(self, images: FewShotImages, seed: int) -> Regressions:
        """Fit a regression for every candidate."""
        features = images.plain.embeddings.double()
        # W is a combination of the features, so the regression is the same in coordinates of their span.
        basis = torch.linalg.qr(features.T).Q  # (C, min(M, C))
        inputs = features @ basis
        weights = torch.zeros(images.num_classes, basis.shape[1], dtype=torch.float64, requires_grad=True)
        biases = torch.zeros(images.num_classes, dtype=torch.float64, requires_grad=True)
        found = {}
        for inverse_penalty in sorted({*self.inverse_penalties, self.default}):
            _minimise(inputs, images.labels, weights, biases, inverse_penalty, self)
            found[inverse_penalty] = ((weights.detach() @ basis.T).float(), biases.detach().float())
        return Regressions(found)

    def restore(self, tensors: Tensors, setting: Setting) -> Regressions:
        """Return the regression of one penalty."""
        return Regressions({setting["inverse_penalty"]: (tensors["weights"], tensors["biases"])})


def _minimise(
    inputs: Tensor, labels: Tensor, weights: Tensor, biases: Tensor, inverse_penalty: float, probe: LinearProbe
) -> None:
    optimizer = torch.optim.LBFGS(
        [weights, biases],
        max_iter=probe.steps,
        tolerance_grad=probe.tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weights.square().sum() / (2 * inverse_penalty * len(labels))
        loss = F.cross_entropy(inputs @ weights.T + biases, labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)


class Regressions:
    """The weights and biases for each inverse penalty."""

    def __init__(self, weights: Mapping[float, tuple[Tensor, Tensor]]) -> None:
        """Take {c: (W (N, C), b (N,))}."""
        self.weights = weights

    def tensors(self, setting: Setting) -> Tensors:
        """Return W and b."""
        weights, biases = self.weights[setting["inverse_penalty"]]
        return {"weights": weights, "biases": biases}

    def terms(self, features: Features) -> Callable[[Setting], Terms]:
        """Return f·W + b, and the term 0; the setting has `inverse_penalty`."""
        embeddings = features.embeddings.float()

        def at(setting: Setting) -> Terms:
            weights, biases = self.weights[setting["inverse_penalty"]]
            logits = embeddings @ weights.T + biases
            return Terms(logits, torch.zeros_like(logits))

        return at
