"""The choice of a method's hyperparameters: one protocol for all methods.

    val       on validation images
    crossfit  on training images, each predicted by a fit on the other folds; the final fit is on all of them
    none      on nothing: the method's defaults

The folds are those of CaFo's own cross-fit. With one image per class nothing can be held out, and a cross-fit leaves
the defaults.

The rule is CaFo's (`cafo.search.Rule`): `highest` takes the first that has the highest, as the
authors do; `near_best` takes, of those within one standard error of the highest, the one with the lowest loss at a free
temperature, as CaFo does.

Legend: B images, N classes, A values of α.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cafo.alpha_intervals import count_correct_at
from cafo.cache import count_correct
from cafo.calibration import free_temperature_loss
from cafo.choice_names import Rule
from cafo.cross_fit import stratified_folds
from cafo.errors import CafoError
from cafo.estimate import Estimate
from cafo.methods.base import Features, FewShotImages, Fitted, Method, Setting, Stage, Terms
from cafo.near_best import near_highest

Select = Literal["val", "crossfit", "none"]
_COMPARED = 256
"""settings whose loss is computed, evenly spread over those near the highest accuracy"""


class Judged(NamedTuple):
    """A fitted method, and images that it was not fitted on."""

    fitted: Fitted
    features: Features
    labels: Tensor
    """(B,) int64"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """A fitted method with chosen hyperparameters."""

    fitted: Fitted
    setting: Setting
    how: Select
    """`none` also where a cross-fit could hold no image out"""
    correct: int | None = None
    """images of the choice that are correct; None for `none`, like `total`"""
    total: int | None = None
    """all images of the choice"""
    estimate: Estimate | None = None
    """an estimate of the accuracy on new images"""

    def logits(self, features: Features) -> Tensor:
        """Return the logits of images: (B, N)."""
        return self.fitted.terms(features)(self.setting).logits(self.setting["alpha"])


def fit_and_choose(
    method: Method,
    images: FewShotImages,
    how: Select,
    *,
    val: tuple[Features, Tensor] | None = None,
    seed: int = 0,
    folds: int = 5,
    rule: Rule = "near_best",
    estimate: bool = False,
) -> Chosen:
    """Fit a method on all training images, and choose its hyperparameters.

    Args:
        method: the method.
        images: the training images.
        how: what the choice is made on.
        val: features and labels of validation images, for `val`.
        seed: seed of the fit and of the folds.
        folds: number of folds of a cross-fit.
        rule: how one setting is chosen.
        estimate: estimate the accuracy on new images, where there are images to choose on; it takes `folds` times as
            long as the choice.

    Raises:
        CafoError: the method lacks something, there are no validation images, or a loss is not finite.
    """
    fitted = fit(method, images, seed)
    judged: list[Judged] = []
    if how == "val":
        if val is None or not len(val[1]):
            raise CafoError("there is no validation image to choose on; give some, or choose by crossfit")
        judged = [Judged(fitted, *val)]
    elif how == "crossfit":
        judged = held_out_fits(method, images, folds, seed)
    setting = choose(method, judged, rule)
    if not judged:
        return Chosen(fitted=fitted, setting=setting, how="none")
    return Chosen(
        fitted=fitted,
        setting=setting,
        how=how,
        correct=sum(count_judged(one, setting) for one in judged),
        total=sum(len(one.labels) for one in judged),
        estimate=estimate_accuracy(method, _parts(judged, folds, seed), rule) if estimate else None,
    )


def fit(method: Method, images: FewShotImages, seed: int) -> Fitted:
    """Fit a method. Raises CafoError if the images lack what it needs."""
    if lack := method.lacks(images.given):
        raise CafoError(lack)
    return method.fit(images, seed)


def held_out_fits(method: Method, images: FewShotImages, folds: int, seed: int) -> list[Judged]:
    """Fit a method without each fold of the training images, and return each fit with the images of its fold.

    Args:
        method, images: as for `fit_and_choose`.
        folds: at least 2; no more are made than the largest class has images.
        seed: seed of the folds and of the fits.

    Returns:
        No fit if no class has two images, or if a fit without a fold lacks what the method needs.
    """
    fold_of = stratified_folds(images.labels, torch.arange(len(images.labels)), folds, seed)
    judged = []
    for fold in range(int(fold_of.max()) + 1):
        others, held = images.rows(fold_of != fold), (fold_of == fold).nonzero()[:, 0]
        if method.lacks(others.given):
            return []
        judged.append(Judged(method.fit(others, seed), images.plain.rows(held), images.labels[held]))
    return judged


def estimate_accuracy(method: Method, parts: Sequence[Judged], rule: Rule = "near_best") -> Estimate | None:
    """Return the accuracy on each part of settings that were chosen on the others; None of fewer than two parts.

    The accuracy on the images of a choice is too high, since the setting was chosen for them.
    """
    if len(parts) < 2:
        return None
    correct = 0
    for i, held in enumerate(parts):
        setting = choose(method, [*parts[:i], *parts[i + 1 :]], rule)
        correct += count_judged(held, setting)
    return Estimate(correct=correct, total=sum(len(one.labels) for one in parts))


def _parts(judged: Sequence[Judged], folds: int, seed: int) -> list[Judged]:
    """Divide the images of a choice for an estimate: the folds of a cross-fit, or parts of the validation images."""
    if len(judged) > 1:
        return list(judged)
    (one,) = judged
    rows = torch.arange(len(one.labels))
    fold_of = stratified_folds(one.labels, rows, folds, seed)
    fold_of[fold_of < 0] = torch.arange(int((fold_of < 0).sum())) % folds
    parts = [(fold_of == fold).nonzero()[:, 0] for fold in fold_of.unique()]
    return [Judged(one.fitted, one.features.rows(part), one.labels[part]) for part in parts]


@torch.no_grad()
def count_judged(judged: Judged, setting: Setting) -> int:
    """Return the number of images that a fitted method has right at a setting."""
    terms = judged.fitted.terms(judged.features)(setting)
    return count_correct(terms.logits(setting["alpha"]), judged.labels)


@torch.no_grad()
def choose(method: Method, judged: Sequence[Judged], rule: Rule = "near_best") -> Setting:
    """Choose a method's hyperparameters, stage by stage, on all judged images together.

    Args:
        method: the method that was fitted.
        judged: fits and the images that each predicts; none leaves the defaults.
        rule: how one setting is chosen.
    """
    setting: Setting = method.defaults
    images = [one for one in judged if len(one.labels)]
    for stage in method.stages if images else ():
        setting = {**setting, **_choose_in_stage(stage, setting, images, rule)}
    return setting


def _choose_in_stage(stage: Stage, setting: Setting, judged: Sequence[Judged], rule: Rule) -> Setting:
    labels = torch.cat([one.labels for one in judged])
    predictions = [one.fitted.terms(one.features) for one in judged]

    def terms(candidate: Setting) -> Terms:
        parts = [predict({**setting, **candidate}) for predict in predictions]
        return Terms(torch.cat([part.base for part in parts]), torch.cat([part.term for part in parts]))

    alphas = torch.tensor(stage.alphas, dtype=torch.float32)
    correct = torch.stack([_count_correct(terms(candidate), labels, alphas) for candidate in stage.settings])
    highest = int(correct.max())
    first = int((correct == highest).flatten().nonzero()[0])
    picked = [first]
    if rule == "near_best":
        near = (correct >= near_highest(highest, len(labels))).flatten().nonzero()[:, 0].tolist()
        step = max(1, len(near) // _COMPARED)
        picked = sorted({first, *near[step // 2 :: step]})
    best, lowest = first, math.inf
    for index in picked if len(picked) > 1 else []:
        candidate, alpha = stage.settings[index // len(alphas)], stage.alphas[index % len(alphas)]
        loss = float(free_temperature_loss(terms(candidate).logits(alpha), labels))
        if loss < lowest:
            best, lowest = index, loss
    return {**stage.settings[best // len(alphas)], "alpha": stage.alphas[best % len(alphas)]}


def _count_correct(terms: Terms, labels: Tensor, alphas: Tensor) -> Tensor:
    """Return the number of correct images at each α: (A,)."""
    if len(alphas) == 1:
        return torch.tensor([count_correct(terms.logits(float(alphas[0])), labels)])
    return count_correct_at(alphas, terms.base, terms.term, labels)
