"""The training of a cache's keys, which are all that CaFo trains.

CaFo (arXiv 2303.02151), section 3.3: AdamW on the cross-entropy of the ensembled logits, at the initial α and β. The
encoders are frozen, so training needs features alone, not images.

Legend: M keys, B images, V views, C width of a source's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.cache import Cache, accuracy
from cafo.calibration import free_temperature_loss
from cafo.errors import CafoError


@dataclass(frozen=True, kw_only=True)
class KeyTraining:
    """Hyperparameters of the keys' training; the defaults are the paper's (section 4.1)."""

    epochs: int = 20
    batch: int = 256
    """images per step"""
    lr: float = 1e-3
    eps: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0
    """seed of the order of the images in each epoch"""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Metrics of one epoch; epoch 0 is the cache before training."""

    epoch: int
    loss: float
    """mean cross-entropy over the epoch's images; NaN at epoch 0"""
    accuracy: float
    """share of the validation or held-out images that are correct, at the initial α and β; NaN if there are none"""
    held_out_loss: float = math.nan
    """their loss at a free temperature (`cafo.calibration`)"""


class Views(Protocol):
    """Features of augmented views, (V, M, C): a tensor, or what gathers rows of one when they are asked for."""

    @property
    def shape(self) -> torch.Size:
        """(V, M, C)."""

    def __getitem__(self, at: tuple[int, Tensor]) -> Tensor:
        """Return some images' features of one view: (v, (b,) int64) → (b, C)."""


SelectEpochBy = Literal["loss", "accuracy"]
"""The measure that an epoch's keys are chosen by: the lowest loss at a free temperature, or the highest accuracy."""


def measure_epoch(number: int, loss: float, logits: Tensor, labels: Tensor) -> Epoch:
    """Return the metrics of an epoch from the logits (B, N) of images that the keys were not trained on."""
    held_out_loss = float(free_temperature_loss(logits, labels))
    return Epoch(epoch=number, loss=loss, accuracy=accuracy(logits, labels), held_out_loss=held_out_loss)


class BestEpoch:
    """The best of the epochs so far; the earliest on ties."""

    def __init__(self, select_by: SelectEpochBy) -> None:
        self.select_by = select_by
        self.epoch = Epoch(epoch=0, loss=math.nan, accuracy=-math.inf, held_out_loss=math.inf)

    def take(self, epoch: Epoch) -> bool:
        """Compare an epoch with the best one. Returns whether it is better, and thus the best now."""
        if self.select_by == "loss":
            better = epoch.held_out_loss < self.epoch.held_out_loss
        else:
            better = epoch.accuracy > self.epoch.accuracy
        if better:
            self.epoch = epoch
        return better


class KeyTrainer:
    """Trains a cache's keys epoch by epoch, by cross-entropy on the ensembled logits at the cache's α and β.

    Epoch e passes once over the images, each with view e mod V. The learning rate falls along a cosine over all steps,
    to zero after the last. The given cache is not changed.

    Raises:
        CafoError: there is no image or no view.
    """

    def __init__(
        self,
        cache: Cache,
        views: Mapping[str, Views],
        labels: Tensor,
        training: KeyTraining,
        keep: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """Begin with the keys of a cache.

        Args:
            cache: the cache before training.
            views: {source: (V, M', C)} unit features of the training images, with the same V for all sources.
            labels: (M',) int64.
            training: the hyperparameters.
            keep: returns an equal tensor for the keys and each of the optimizer's moments, which are then updated where
                it lies, such as in a file.
        """
        self.views, self.labels, self.training = views, labels, training
        self.num_views, self.images = next(iter(views.values())).shape[:2]
        if not self.images or not self.num_views:
            raise CafoError("training the keys needs at least one image and one view of it")
        self.keys = {name: keep(k.detach().clone()).requires_grad_() for name, k in cache.keys.items()}
        self.cache = replace(cache, keys=self.keys)
        self.epoch = 0
        self._optimizer = torch.optim.AdamW(
            self.keys.values(), lr=training.lr, eps=training.eps, weight_decay=training.weight_decay
        )
        steps = training.epochs * -(-self.images // training.batch)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, max(steps, 1))
        self._rng = torch.Generator().manual_seed(training.seed)
        for key in self.keys.values():  # as AdamW's first step would make them, but where `keep` puts them
            moments = {name: keep(torch.zeros_like(key)) for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[key] = {"step": torch.tensor(0.0), **moments}

    def run_epoch(self) -> float:
        """Train for one epoch. Returns its mean loss.

        Raises:
            CafoError: a loss is not finite; the message gives its step and learning rate.
        """
        self.epoch += 1
        total_loss = 0.0
        order = torch.randperm(self.images, generator=self._rng)
        for step, rows in enumerate(order.split(self.training.batch), start=1):
            rows = rows.to(self.labels.device)
            batch = {name: v[(self.epoch - 1) % self.num_views, rows] for name, v in self.views.items()}
            loss = F.cross_entropy(self.cache.combine(batch).logits(self.cache.alpha), self.labels[rows])
            lr = float(self._schedule.get_last_lr()[0])
            check_finite(loss, f"epoch {self.epoch}, step {step}", lr, rows)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self._schedule.step()
            total_loss += loss.item() * len(rows)
        self._optimizer.zero_grad(set_to_none=True)  # gradients are as large as the keys
        return total_loss / self.images

    def copy_keys(self) -> dict[str, Tensor]:
        """Return the keys as they are now."""
        return {name: k.detach().clone() for name, k in self.keys.items()}


def train_keys(
    cache: Cache,
    views: Mapping[str, Views],
    labels: Tensor,
    val_features: Mapping[str, Tensor],
    val_labels: Tensor,
    training: KeyTraining,
    report: Callable[[Epoch], None] = lambda epoch: None,
    select_by: SelectEpochBy = "accuracy",
) -> tuple[Cache, Epoch]:
    """Train the keys, and return those of the epoch that is best on validation images, the earliest on ties.

    The untrained keys compete too. Test images play no part.

    Args:
        cache, views, labels, training: as for `KeyTrainer`.
        val_features, val_labels: {source: (B, C)} and (B,) int64.
        report: called after every epoch; an exception from it ends the training.
        select_by: what is compared, at the cache's α and β.

    Returns:
        The cache with the best keys, and the epoch that they come from.

    Raises:
        CafoError: no images or views, or a loss that is not finite; the message gives its step and learning rate.
    """
    trainer = KeyTrainer(cache, views, labels, training) if training.epochs else None
    best, best_keys = BestEpoch(select_by), dict(cache.keys)
    for number in range(training.epochs + 1):
        loss = trainer.run_epoch() if trainer and number else math.nan
        logits = (trainer.cache if trainer else cache).logits(val_features)
        epoch = measure_epoch(number, loss, logits, val_labels)
        if best.take(epoch) and trainer:
            best_keys = trainer.copy_keys()
        report(epoch)
    return replace(cache, keys=best_keys), best.epoch


def check_finite(loss: Tensor, when: str, lr: float, rows: Tensor | None = None) -> None:
    """Raise CafoError if a loss is NaN or infinite.

    Args:
        loss: the loss of one step.
        when: the step, for the message.
        lr: its learning rate.
        rows: its images; None for all of them.
    """
    if not torch.isfinite(loss):
        images = "" if rows is None else f"images {rows[:5].tolist()}…, "
        raise CafoError(
            f"the loss is {loss.item()} at {when} ({images}learning rate {lr:.3g}); "
            "lower the learning rate or check the features"
        )
