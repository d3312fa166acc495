"""From logits to predictions: calibrated probabilities, the likeliest classes, the margin, and prediction sets.

Legend: B images, K classes that are kept of each, M keys, N classes, C width of a source's features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.cache import Cache
from cafo.calibration import Calibration
from cafo.ensemble import NOTHING, ZERO_SHOT
from cafo.errors import CafoError
from cafo.prediction_sets import in_set, score_threshold


class ClassProbability(NamedTuple):
    """A class and its probability."""

    class_name: str
    probability: float


class Prediction(NamedTuple):
    """The likeliest classes of an image."""

    class_name: str
    """the likeliest class"""
    probability: float
    """its calibrated probability"""
    margin: float
    """how much more probable it is than the next class"""
    top: tuple[ClassProbability, ...]
    """the likeliest classes, as many as were asked for, the likeliest first"""
    prediction_set: tuple[str, ...] | None = None
    """the classes among which its own is with the coverage that was asked for, the likeliest first; None if none was"""


class Ranked(NamedTuple):
    """The likeliest classes of B images."""

    labels: Tensor
    """(B, K) int64, the likeliest first; of equal ones, the first of the class list"""
    probabilities: Tensor
    """(B, K)"""
    margins: Tensor
    """(B,)"""
    sets: tuple[tuple[int, ...], ...] | None
    """the classes of each image's prediction set, the likeliest first; None if no coverage was asked for"""


def rank(logits: Tensor, calibration: Calibration | None, top: int, coverage: float | None = None) -> Ranked:
    """Return the likeliest classes.

    Args:
        logits: (B, N), of a classifier.
        calibration: the classifier's; None gives the plain softmax of the logits.
        top: K; all classes if it is more.
        coverage: of the prediction sets; None for none.

    Raises:
        CafoError: `top` is below 1, or a coverage that the classifier cannot give.
    """
    if top < 1:
        raise CafoError(f"top is the number of classes to keep of each image, 1 or more, got {top}")
    probabilities = logits.softmax(dim=-1) if calibration is None else calibration.probabilities(logits)
    values, order = probabilities.sort(dim=-1, descending=True, stable=True)
    sets = None
    if coverage is not None:
        members = in_set(probabilities, set_threshold(calibration, coverage))
        sizes = members.sum(dim=-1).tolist()  # a set is the likeliest classes, as its scores are below a threshold
        sets = tuple(tuple(row[:size].tolist()) for row, size in zip(order, sizes, strict=True))
    return Ranked(order[:, :top], values[:, :top], values[:, 0] - values[:, 1], sets)


def set_threshold(calibration: Calibration | None, coverage: float) -> float:
    """Return the threshold of the prediction sets of a classifier with this calibration.

    Raises:
        CafoError: the classifier knows no held-out images, or too few for this coverage.
    """
    if calibration is None:
        raise CafoError(
            "prediction sets need held-out images, and this classifier was chosen without any, or was saved by an "
            "earlier version: fit it again, with two or more labelled images per class"
        )
    return score_threshold(calibration.scores, coverage)


def predict(cache: Cache, logits: Tensor, top: int, coverage: float | None) -> list[Prediction]:
    """Return `rank` of a classifier's logits (B, N) as a prediction for each image, with the names of the classes."""
    ranked, names = rank(logits, cache.calibration, top, coverage), cache.class_names
    sets = ranked.sets or [None] * len(logits)
    predictions = []
    for labels, values, margin, members in zip(
        ranked.labels.tolist(), ranked.probabilities.tolist(), ranked.margins.tolist(), sets, strict=True
    ):
        best = tuple(ClassProbability(names[label], value) for label, value in zip(labels, values, strict=True))
        in_it = None if members is None else tuple(names[label] for label in members)
        predictions.append(Prediction(*best[0], margin, best, in_it))
    return predictions


def used_part(cache: Cache) -> Cache:
    """Return the cache without the sources that its ensemble leaves out: equal logits from fewer encoders.

    Where p_ZS is left out too, and its encoder with it, a source that is used takes its place with a classifier of
    zeros, which the ensemble does not read.
    """
    ensemble = cache.ensemble
    used = set(cache.keys if ensemble.sources is None else ensemble.sources)
    used |= set(ensemble.scales) | ({ensemble.baseline} - {ZERO_SHOT, NOTHING})
    kept = replace(cache, keys={name: keys for name, keys in cache.keys.items() if name in used})
    if ensemble.baseline != NOTHING or cache.zero_shot_source in used:
        return kept
    name, keys = next(iter(kept.keys.items()))
    zeros = torch.zeros(keys.shape[1], len(cache.class_names))
    return replace(kept, zero_shot_source=name, classifier=zeros.to(keys.device))


def used_encoders(cache: Cache) -> tuple[str, ...]:
    """Return the names of the encoders whose features a cache reads."""
    return tuple(dict.fromkeys([*cache.keys, cache.zero_shot_source]))
