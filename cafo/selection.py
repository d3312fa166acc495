"""Train a cache's keys, and choose the epoch, α, β and the ensemble: on validation images, or without any.

    val            on validation images
    crossfit       on training images, each held out of the training of the keys that predict it
    leave_one_out  on training images, each predicted without its own key; for keys that are not trained
    prior          not on images at all: what other data sets lead to expect, for one image per class

Whatever a choice is made on, the final keys are trained on all training images.

Legend: M keys, B images, V views, C width of a source's features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cafo.cache import Cache, zero_shot_logits
from cafo.calibration import calibrate
from cafo.choice_names import Rule, Select
from cafo.cross_fit import TrainingImages, cross_fit, leave_one_out
from cafo.ensemble import Ensemble
from cafo.errors import CafoError
from cafo.estimate import Estimate, estimate_accuracy
from cafo.held_out import HeldOutImages, blocks_of, on_validation
from cafo.key_training import Epoch, KeyTrainer, KeyTraining, SelectEpochBy, Views, measure_epoch, train_keys
from cafo.prior import expect
from cafo.search import SearchResult, reduce_for_search, search_reduced
from cafo.search_grid import BetaGrid
from cafo.spill import Spill

Report = Callable[[Epoch], None]

_IMAGES_OF_CALIBRATION = 10_000
"""images that the probabilities are calibrated on, evenly spread if there are more"""


def default_select(*, has_val: bool, shots: int, trained: bool) -> Select:
    """Return what a choice is made on where the user does not say.

    Args:
        has_val: whether there are validation images.
        shots: K. With one image per class, none can be held out.
        trained: whether the keys are trained.
    """
    if has_val:
        return "val"
    if shots < 2:
        return "prior"
    return "crossfit" if trained else "leave_one_out"


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """Settings of a choice."""

    grid: BetaGrid = field(default_factory=BetaGrid)
    ensembles: tuple[Ensemble, ...] = (Ensemble(),)
    """candidates"""
    rule: Rule = "near_best"
    """how α, β and the ensemble are chosen; `highest` also chooses the epoch by its accuracy, otherwise by its loss"""
    folds: int = 5
    """F of a cross-fit; never more than the images of the largest class"""
    estimate: bool | None = None
    """estimate the accuracy, which takes about as long as the search; None estimates it without validation images"""

    @property
    def epoch_by(self) -> SelectEpochBy:
        """The measure that the epoch is chosen by."""
        return "accuracy" if self.rule == "highest" else "loss"


@dataclass(frozen=True, kw_only=True)
class Selected:
    """A cache with chosen α, β and ensemble, and what they were chosen on."""

    cache: Cache
    how: Select
    """what the choice was made on: `prior` also where no image could be held out"""
    epoch: Epoch
    """the epoch that the keys come from"""
    images: HeldOutImages | None = None
    """the images of the choice"""
    search: SearchResult | None = None
    """None for `prior`, like `images`"""
    estimate: Estimate | None = None
    """an estimate of the accuracy on new images"""


def select(
    cache: Cache,
    views: Mapping[str, Views],
    how: Select,
    training: KeyTraining,
    choosing: Choosing,
    *,
    train: TrainingImages | None = None,
    val: tuple[Mapping[str, Tensor], Tensor] | None = None,
    report: Report = lambda epoch: None,
) -> Selected:
    """Train the keys and choose.

    Args:
        cache: the cache before training; its α, β and ensemble are those of the training.
        views: {source: (V, M, C)}, the views of the images that the keys are made of.
        how: what the choice is made on.
        training: the hyperparameters; with 0 epochs the keys stay as they are.
        choosing: settings of the choice.
        train: the training images, for every choice but `val`.
        val: features {source: (B, C)} and labels (B,) of the validation images, for `val`.
        report: called after every epoch with the metrics on the images of the choice; an exception from it ends the
            training.

    Raises:
        CafoError: the images of `how` are not given, leave-one-out with trained keys, or a loss that is not finite.
    """
    if how == "val":
        if val is None or not len(val[1]):
            raise CafoError("there is no validation image to choose on; give some, or choose by crossfit")
        trained, epoch = train_keys(cache, views, cache.labels, *val, training, report, choosing.epoch_by)
        return _choose(trained, epoch, how, on_validation(trained, *val), choosing, training.seed)
    if train is None:
        raise CafoError(f"a choice by {how} needs the training images' features")
    if how == "leave_one_out" and training.epochs:
        raise CafoError("leave_one_out needs untrained keys, as trained ones have seen all images; take crossfit")
    if how in ("crossfit", "leave_one_out"):
        if how == "crossfit":
            images, epoch = cross_fit(cache, views, train, training, choosing.folds, choosing.epoch_by, report)
        else:
            images = leave_one_out(cache, train)
            logits = images.combine(cache.beta, cache.ensemble).logits(cache.alpha)
            epoch = measure_epoch(0, math.nan, logits, images.labels)
            report(epoch)
        if len(images.labels) > 1:
            trained = _train_all(cache, views, training, epoch.epoch)
            return _choose(trained, epoch, how, images, choosing, training.seed)
    return _expect(cache, views, train, training, choosing.grid)


def _train_all(cache: Cache, views: Mapping[str, Views], training: KeyTraining, epochs: int) -> Cache:
    """Return the cache with keys that were trained on all images for some of the planned epochs."""
    if not epochs:
        return cache
    with Spill() as spill:
        trainer = KeyTrainer(cache, views, cache.labels, training, spill.keep_one)
        for _ in range(epochs):
            trainer.run_epoch()
    return replace(cache, keys=trainer.copy_keys())


def _choose(cache: Cache, epoch: Epoch, how: Select, images: HeldOutImages, choosing: Choosing, seed: int) -> Selected:
    grid, ensembles, rule = choosing.grid, choosing.ensembles, choosing.rule
    reduced = reduce_for_search(images, grid)
    best = search_reduced(reduced, grid=grid, ensembles=ensembles, rule=rule)
    chosen = replace(cache, alpha=best.alpha, beta=best.beta, ensemble=best.ensemble)
    step = -(-images.total // _IMAGES_OF_CALIBRATION)
    some = images.images(torch.arange(0, images.total, step, device=images.labels.device))
    logits = [block.combine(best.beta, best.ensemble).logits(best.alpha) for block in blocks_of(some)]
    chosen = replace(chosen, calibration=calibrate(torch.cat(logits), some.labels))
    estimate = None
    if choosing.estimate or (choosing.estimate is None and how != "val"):
        estimate = estimate_accuracy(reduced, grid, ensembles, rule, choosing.folds, seed)
    return Selected(cache=chosen, how=how, epoch=epoch, images=images, search=best, estimate=estimate)


def _expect(
    cache: Cache, views: Mapping[str, Views], train: TrainingImages, training: KeyTraining, grid: BetaGrid
) -> Selected:
    """Return the cache after all epochs, with the expected α and β."""
    features, labels = train.features[cache.zero_shot_source], cache.labels[train.rows]
    if not len(labels):  # K = 0: the generated images stand in
        features, labels = cache.keys[cache.zero_shot_source], cache.labels
    zero_shot = zero_shot_logits(features, cache.classifier)
    prior = expect(zero_shot, labels, len(cache.labels) / len(cache.class_names))
    trained = _train_all(cache, views, training, training.epochs)
    beta = min(max(prior.beta, grid.low), grid.high)
    epoch = Epoch(epoch=training.epochs, loss=math.nan, accuracy=math.nan)
    return Selected(cache=replace(trained, alpha=prior.alpha, beta=beta), how="prior", epoch=epoch)
