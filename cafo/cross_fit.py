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

from cafo.cache import Cache, affinity
from cafo.held_out import HeldOut
from cafo.key_training import BestEpoch, Epoch, KeyTrainer, KeyTraining, SelectEpochBy, Views, measure_epoch


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


def leave_one_out(cache: Cache, images: TrainingImages) -> HeldOut:
    """Return the training images, each of which sees all keys but its own.

    It is exact for untrained keys only: a trained key has learned from all images.

    Args:
        cache: the cache with untrained keys.
        images: its training images.
    """
    groups = images.groups_of(cache)
    others = has_others(cache.labels, groups, images.rows)
    rows = images.rows[others]
    own = groups[:, None] == groups[rows][None]  # (M, B')
    features = {name: f[others] for name, f in images.features.items()}
    affinities = {name: a.masked_fill(own, -math.inf) for name, a in cache.affinities(features).items()}
    return HeldOut(cache.zero_shot(features), affinities, cache.labels, cache.labels[rows])


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
    """The keys that are trained without one fold, and the images of that fold."""

    def __init__(
        self, cache: Cache, views: Mapping[str, Views], images: TrainingImages, held: Tensor, training: KeyTraining
    ) -> None:
        groups = images.groups_of(cache)
        self.held = held
        self.kept = (~torch.isin(groups, groups[images.rows[held]])).nonzero()[:, 0]
        keys = {name: k[self.kept] for name, k in cache.keys.items()}
        self.cache = replace(cache, keys=keys, labels=cache.labels[self.kept])
        self.features = {name: f[held] for name, f in images.features.items()}
        self.trainer: KeyTrainer | None = None
        if training.epochs:
            rows = {name: _Rows(v, self.kept) for name, v in views.items()}
            self.trainer = KeyTrainer(self.cache, rows, self.cache.labels, training)
        self.best_keys = keys

    def logits(self) -> Tensor:
        return (self.trainer.cache if self.trainer else self.cache).logits(self.features)

    def keep_best(self) -> None:
        if self.trainer:
            self.best_keys = self.trainer.copy_keys()


def cross_fit(
    cache: Cache,
    views: Mapping[str, Views],
    images: TrainingImages,
    training: KeyTraining,
    folds: int,
    select_by: SelectEpochBy,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> tuple[HeldOut, Epoch]:
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
    groups = images.groups_of(cache)[images.rows]
    labels = cache.labels[images.rows]
    fold_of = stratified_folds(labels, groups, folds, training.seed)
    held = [(fold_of == fold).nonzero()[:, 0] for fold in range(folds)]
    parts = [_Fold(cache, views, images, rows, training) for rows in held if len(rows)]
    order = torch.cat([part.held for part in parts]) if parts else fold_of[:0]
    best = BestEpoch(select_by)
    for number in range(training.epochs + 1 if parts else 0):
        losses = [part.trainer.run_epoch() for part in parts if number and part.trainer]
        logits = torch.cat([part.logits() for part in parts])
        epoch = measure_epoch(number, sum(losses) / len(losses) if losses else math.nan, logits, labels[order])
        if best.take(epoch):
            for part in parts:
                part.keep_best()
        report(epoch)
    return _join(cache, parts, images, order), best.epoch


def _join(cache: Cache, parts: Sequence[_Fold], images: TrainingImages, order: Tensor) -> HeldOut:
    """Return the images of all folds, each with its affinities to the keys that were trained without it."""
    features = {name: f[order] for name, f in images.features.items()}
    affinities = {}
    for name, key in cache.keys.items():
        affinities[name] = key.new_full((len(key), len(order)), -math.inf)
        start = 0
        for part in parts:
            columns = slice(start, start + len(part.held))
            affinities[name][part.kept, columns] = affinity(part.best_keys[name], part.features[name])
            start = columns.stop
    return HeldOut(cache.zero_shot(features), affinities, cache.labels, cache.labels[images.rows[order]])
