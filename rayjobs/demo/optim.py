"""The optimizer loop of the demo's tiny models."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def train_steps(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    *,
    steps: int,
    peak_lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float = 1.0,
) -> Iterator[float]:
    """Train with AdamW under a one-cycle learning rate; yield the loss of every step, after the step.

    loss_of_step: computes the loss of step 0, 1, … with the model as it is then.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=betas, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps, cycle_momentum=False)
    for step in range(steps):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        yield loss.item()
