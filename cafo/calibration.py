"""The one temperature that fits the logits of a set of images best: for a choice, and for calibrated probabilities.

The size of CaFo's logits depends on α, so that a plain log-loss would choose α by calibration. Here the logits of a set
of images are divided by the one temperature that fits them best. As few images may all be correct, where the best
temperature would be 0, the targets are smoothed as if one more image had been there of which nothing is known.

On held-out images at the chosen values, that temperature makes calibrated probabilities: softmax(logits / temperature).

Legend: B images, N classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 8
_MOST_IMAGES = 10_000
"""images that a temperature is fitted on; one number needs no more"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """The temperature and the scores of a classifier, from held-out images."""

    temperature: float
    """the logits are divided by it before the softmax"""
    scores: Tensor
    """(B,) float32, ascending: 1 - the probability of its own class, of each held-out image"""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return calibrated probabilities: (B, N) → (B, N)."""
        return torch.softmax(logits / self.temperature, dim=-1)


@torch.no_grad()
def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """Fit the temperature on held-out images, and keep their scores.

    Args:
        logits: (B, N), of images that the classifier was not trained on.
        labels: (B,) int64.
    """
    rows = torch.arange(0, len(labels), max(1, -(-len(labels) // _MOST_IMAGES)), device=labels.device)
    fitted = Calibration(temperature=float(best_temperature(logits[rows], labels[rows])), scores=logits.new_empty(0))
    own = [
        fitted.probabilities(some).gather(-1, true[:, None])[:, 0]
        for some, true in zip(logits.split(_MOST_IMAGES), labels.split(_MOST_IMAGES), strict=True)
    ]
    return Calibration(temperature=fitted.temperature, scores=(1 - torch.cat(own)).sort().values.float().cpu())


def best_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the temperature with the lowest smoothed loss, for any number of sets of logits: (…, B, N) → (…).

    Args:
        logits: (…, B, N).
        labels: (B,) int64.
    """
    fit = _fit(logits, labels)
    return (fit.scale / fit.inverse)[..., 0, 0]


def free_temperature_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy at the best temperature, for any number of sets of logits: (…, B, N) → (…).

    Args:
        logits: (…, B, N).
        labels: (B,) int64.
    """
    fit = _fit(logits, labels)
    normaliser = torch.logsumexp(fit.inverse * fit.centred, dim=-1)
    return (normaliser - fit.inverse[..., 0] * fit.aimed).mean(dim=-1)


class _Fit(NamedTuple):
    """The best inverse temperature of logits of unit size."""

    centred: Tensor
    """(…, B, N): the logits with mean 0 for each image, divided by `scale`"""
    aimed: Tensor
    """(…, B): mean of `centred` under the smoothed targets"""
    scale: Tensor
    """(…, 1, 1): root mean square of the logits"""
    inverse: Tensor
    """(…, 1, 1): the best inverse temperature of `centred`"""


def _fit(logits: Tensor, labels: Tensor) -> _Fit:
    """Minimise the loss, which is convex in the inverse temperature, by Newton's method on its logarithm."""
    images, classes = logits.shape[-2:]
    unknown = 1 / (images + 1)
    targets = logits.new_full((images, classes), unknown / classes)
    targets[torch.arange(images, device=labels.device), labels] += 1 - unknown
    centred = logits - logits.mean(dim=-1, keepdim=True)
    scale = centred.square().mean(dim=(-1, -2), keepdim=True).sqrt().clamp_min(torch.finfo(logits.dtype).tiny)
    centred = centred / scale
    aimed = (targets * centred).sum(dim=-1)
    log_inverse = torch.zeros_like(scale)
    for _ in range(_STEPS):
        inverse = log_inverse.exp()
        p = torch.softmax(inverse * centred, dim=-1)
        weighted = p * centred
        mean = weighted.sum(dim=-1)
        variance = (weighted * centred).sum(dim=-1) - mean.square()
        slope = (mean - aimed).mean(dim=-1)[..., None, None] * inverse
        curvature = variance.mean(dim=-1)[..., None, None] * inverse.square() + slope.abs()
        log_inverse = log_inverse - (slope / curvature.clamp_min(1e-12)).clamp(-1, 1)
    return _Fit(centred, aimed, scale, log_inverse.exp())
