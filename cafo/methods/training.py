"""The training loop that Tip-Adapter-F and APE-T share: AdamW along a cosine, one view per epoch.

The authors keep the trained numbers in float16, whose second moments underflow to 0; here all is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cafo.key_training import check_finite
from cafo.methods.base import FewShotImages


@dataclass(frozen=True, kw_only=True)
class Training:
    """Hyperparameters of a training."""

    epochs: int
    lr: float
    eps: float
    weight_decay: float
    batch: int = 256
    """images per step"""


def train(
    parameters: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    images: FewShotImages,
    training: Training,
    seed: int,
) -> Iterator[int]:
    """Train parameters in place, and yield the number of each epoch after it: 0 before the first.

    Epoch e passes once over the images in a random order, each with view (e - 1) mod V. The learning rate falls along a
    cosine over all steps, to zero after the last.

    Args:
        parameters: leaves that require gradients.
        loss: from unit features (b, C) and labels (b,) of some images.
        images: the training images.
        training: the hyperparameters.
        seed: seed of the order.

    Raises:
        CafoError: a loss is not finite.
    """
    views, labels = images.views.unit, images.labels
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, eps=training.eps, weight_decay=training.weight_decay)
    steps = training.epochs * -(-len(labels) // training.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    rng = torch.Generator().manual_seed(seed)
    yield 0
    for epoch in range(1, training.epochs + 1):
        for rows in torch.randperm(len(labels), generator=rng).split(training.batch):
            with torch.enable_grad():
                value = loss(views[(epoch - 1) % len(views), rows], labels[rows])
                check_finite(value, f"epoch {epoch}", training.lr)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
            optimizer.step()
            schedule.step()
        yield epoch
