"""Hold out training images: leave-one-out for untrained keys, cross-fit for trained ones.

Without a validation set, α, β, the epoch and the ensemble's weights are chosen on the training images, each of which
is predicted by keys that were made without it:

- Leave-one-out, exact and almost free where keys are not trained: an image sees all keys but its own. A key is the mean
  of all of its image's views, so no view of the image is left.
- Cross-fit: the images are divided into folds, stratified by class. For each fold, keys are trained on the other folds
  alone. The predictions of all folds together are those of one set of images.

Images of equal content count as one: none of them sees another's key, and they share a fold. An image whose class has
no other image is never held out, as its class would have no key; generated images are never held out either.

Legend: M keys, B labelled images, B' of them held out, N classes, V views, C width of a source's features, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cafo.cache import Cache
from cafo.held_out import HeldOutFeatures, KeySet
from cafo.key_training import BestEpoch, Epoch, KeyTrainer, KeyTraining, SelectEpochBy, Views, measure_epoch
from cafo.spill import Spill


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingImages:
    """The labelled images that a cache's keys are made of, as they are predicted: from one plain view each."""

    features: Mapping[str, Tensor]
    """source → (B, C)"""
    rows: Tensor
    """(B,) int64: the key of each image; the cache's other keys are of generated images"""
    groups: Tensor | None = None
    """(M,) int64: equal for keys of images of equal content; None if no two are"""

    def to(self, device: str | torch.device) -> TrainingImages:
        """Return the images in a device's memory."""
        groups = None if self.groups is None else self.groups.to(device)
        features = {name: f.to(device) for name, f in self.features.items()}
        return replace(self, features=features, rows=self.rows.to(device), groups=groups)

    def groups_of(self, cache: Cache) -> Tensor:
        """Return the group of each key: (M,)."""
        return torch.arange(len(cache.labels), device=cache.labels.device) if self.groups is None else self.groups


def leave_one_out(cache: Cache, images: TrainingImages) -> HeldOutFeatures:
    """Return the training images, each of which sees all keys but its own.

    It is exact for untrained keys only: a trained key has learned from all images.

    Args:
        cache: the cache with untrained keys.
        images: its training images.
    """
    groups = images.groups_of(cache)
    others = has_others(cache.labels, groups, images.rows).nonzero()[:, 0]
    held_out = _held_out(cache, images, others, [KeySet(cache.keys)])
    return replace(held_out, groups=(groups, groups[images.rows[others]]))


def stratified_folds(labels: Tensor, groups: Tensor, folds: int, seed: int) -> Tensor:
    """Return the fold of each image, int64; -1 for an image that is never held out.

    The images of a class are dealt to the folds in a random order, each class beginning where the last one ended. So
    a class has almost as many images in one fold as in another, and so have the folds. A class with fewer groups of
    images than folds is held out as often as it has groups; one with a single group never.

    Args:
        labels: (B,) int64.
        groups: (B,) int64: equal for images that must share a fold.
        folds: F, at least 2; no more folds are made than the largest class has groups.
        seed: seed of the order.
    """
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=rng).tolist()
    members: dict[int, dict[int, list[int]]] = {}
    for row in order:
        members.setdefault(int(labels[row]), {}).setdefault(int(groups[row]), []).append(row)
    made = min(folds, max((len(of_class) for of_class in members.values()), default=0))
    fold, dealt = torch.full((len(labels),), -1, dtype=torch.int64), 0
    for label in sorted(members):
        if len(members[label]) < 2:
            continue
        for rows in members[label].values():
            fold[rows] = dealt % made
            dealt += 1
    return fold.to(labels.device)


def has_others(labels: Tensor, groups: Tensor, rows: Tensor) -> Tensor:
    """Return, for each training image, whether its class has a key of another group: (B,) bool."""
    pairs = torch.unique(torch.stack([labels, groups]), dim=1)
    return torch.bincount(pairs[0])[labels[rows]] > 1


class _Rows:
    """Some rows of views, without a copy."""

    def __init__(self, views: Views, rows: Tensor) -> None:
        self.views, self.rows = views, rows
        self.shape = torch.Size((views.shape[0], len(rows), views.shape[2]))

    def __getitem__(self, at: tuple[int, Tensor]) -> Tensor:
        view, rows = at
        return self.views[view, self.rows[rows]]


class _Fold:
    """The keys that are trained without one fold, and the images of that fold.

    The folds train in turns, epoch by epoch, since an epoch is judged on all of them together. Keys, moments and best
    keys of all folds are several times as large as the cache, so they are kept in a temporary file if they are many.
    """

    def __init__(
        self,
        cache: Cache,
        views: Mapping[str, Views],
        images: HeldOutFeatures,
        kept: Tensor,
        training: KeyTraining,
        spill: Spill,
    ) -> None:
        self.cache, self.images, self.kept, self.spill = cache, images, kept, spill
        keys = {name: k[kept] for name, k in cache.keys.items()}
        smaller = replace(cache, keys=keys, labels=cache.labels[kept], key_names=())
        rows = {name: _Rows(v, kept) for name, v in views.items()}
        self.trainer = KeyTrainer(smaller, rows, smaller.labels, training, spill.keep_one)
        self.best_keys: dict[str, Tensor] = {}
        """all keys at the best epoch; those of the fold's own images, which none of them sees, are zero"""

    def logits(self) -> Tensor:
        return self.trainer.cache.logits({name: f[self.images.rows] for name, f in self.images.features.items()})

    def keep_best(self) -> None:
        if not self.best_keys:
            self.best_keys = {n: self.spill.keep_one(torch.zeros_like(k)) for n, k in self.cache.keys.items()}
        for name, keys in self.trainer.keys.items():
            self.best_keys[name][self.kept] = keys.detach()


def cross_fit(
    cache: Cache,
    views: Mapping[str, Views],
    images: TrainingImages,
    training: KeyTraining,
    folds: int,
    select_by: SelectEpochBy,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[HeldOutFeatures, Epoch]:
    """Train keys without each fold, and return the held-out images at the epoch that is best on all of them together.

    Args:
        cache: the cache before training.
        views: {source: (V, M, C)}, the views of all keys' images.
        images: the training images.
        training: the hyperparameters, for the keys of every fold; its seed also divides the images.
        folds: F.
        select_by: how the epoch is chosen.
        report: called after every epoch of all folds; an exception from it ends the training.

    Returns:
        The held-out images, and the epoch. Both are empty of meaning if no class has two images: B' is 0.

    Raises:
        CafoError: a loss is not finite.
    """
    groups, labels = images.groups_of(cache), cache.labels[images.rows]
    fold_of = stratified_folds(labels, groups[images.rows], folds, training.seed)
    held = [(fold_of == fold).nonzero()[:, 0] for fold in range(int(fold_of.max()) + 1 if len(fold_of) else 0)]
    order = torch.cat(held) if held else fold_of[:0]
    seen = [~torch.isin(groups, groups[images.rows[rows]]) for rows in held]
    held_out = _held_out(cache, images, order, [KeySet(cache.keys, of_fold) for of_fold in seen], fold_of[order])
    best = BestEpoch(select_by)
    if not len(order):
        return held_out, best.epoch
    with Spill() as spill:
        parts = []
        for fold, of_fold in enumerate(seen if training.epochs else ()):
            own = held_out.images((fold_of[order] == fold).nonzero()[:, 0])
            parts.append(_Fold(cache, views, own, of_fold.nonzero()[:, 0], training, spill))
        _train_in_turns(cache, held_out, parts, training.epochs, best, report)
    if best.epoch.epoch:
        key_sets = [KeySet(part.best_keys, of_fold) for part, of_fold in zip(parts, seen, strict=True)]
        held_out = replace(held_out, key_sets=key_sets)
    return held_out, best.epoch


def _train_in_turns(
    cache: Cache,
    held_out: HeldOutFeatures,
    parts: Sequence[_Fold],
    epochs: int,
    best: BestEpoch,
    report: Callable[[Epoch], None],
) -> None:
    """Train all folds epoch by epoch; keep their keys whenever an epoch is the best so far."""
    for number in range(epochs + 1):
        if number:
            loss = sum(part.trainer.run_epoch() for part in parts) / len(parts)
            logits = torch.cat([part.logits() for part in parts])
        else:
            loss = math.nan
            logits = held_out.combine(cache.beta, cache.ensemble).logits(cache.alpha)
        epoch = measure_epoch(number, loss, logits, held_out.labels)
        if best.take(epoch) and number:
            for part in parts:
                part.keep_best()
        report(epoch)


def _held_out(
    cache: Cache,
    images: TrainingImages,
    order: Tensor,
    key_sets: Sequence[KeySet],
    sets: Tensor | None = None,
) -> HeldOutFeatures:
    return HeldOutFeatures(
        features=images.features,
        rows=order,
        labels=cache.labels[images.rows[order]],
        key_sets=key_sets or [KeySet(cache.keys)],
        key_labels=cache.labels,
        classifier=cache.classifier,
        zero_shot_source=cache.zero_shot_source,
        sets=sets,
    )
