"""The loss of logits whose temperature is free: how well they order the classes, whatever their size.

The size of CaFo's logits depends on α, so that a plain log-loss would choose α by calibration. Here the logits of a set
of images are divided by the one temperature that fits them best. As few images may all be correct, where the best
temperature would be 0, the targets are smoothed as if one more image had been there of which nothing is known.

Legend: B images, N classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 8


def free_temperature_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy at the best temperature, for any number of sets of logits: (…, B, N) → (…).

    The loss is convex in the inverse temperature, which Newton's method finds on its logarithm.

    Args:
        logits: (…, B, N).
        labels: (B,) int64.
    """
    images, classes = logits.shape[-2:]
    unknown = 1 / (images + 1)
    targets = logits.new_full((images, classes), unknown / classes)
    targets[torch.arange(images, device=labels.device), labels] += 1 - unknown
    centred = logits - logits.mean(dim=-1, keepdim=True)
    scale = centred.square().mean(dim=(-1, -2), keepdim=True).sqrt().clamp_min(torch.finfo(logits.dtype).tiny)
    centred = centred / scale
    aimed = (targets * centred).sum(dim=-1)  # (…, B)
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
    inverse = log_inverse.exp()
    normaliser = torch.logsumexp(inverse * centred, dim=-1)
    return (normaliser - inverse[..., 0] * aimed).mean(dim=-1)
