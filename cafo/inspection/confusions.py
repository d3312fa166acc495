"""Find the classes that are taken for each other, and what pulls: the text, a source, and the keys of which class.

The images are ones that the classifier has not learned from: validation images, or training images without their own
keys. For each pair of a true and a predicted class, the contributions to the difference of the two logits are averaged
over the images of that confusion. They add up to the mean difference.

Legend: B images, M keys, N classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.ensemble import Ensemble
from cafo.held_out import HeldOutImages
from cafo.inspection.contributions import Vote, decompose, largest_votes

_IMAGES_AT_ONCE = 64


class Confusion(NamedTuple):
    """One pair of classes. All pulls are toward the predicted class and away from the true one; they are means over
    `images`, and `text` and `sources` add up to `margin`."""

    label: int
    """the true class, as labelled"""
    predicted: int
    images: tuple[int, ...]
    """the images of the true class that were given the predicted one"""
    of: int
    """the number of images of the true class"""
    margin: float
    text: float
    """p_ZS's part"""
    sources: dict[str, float]
    """source → the part of all its keys"""
    votes: tuple[Vote, ...]
    """the keys with the largest pulls either way, the largest first"""


def find_confusions(
    logits: Tensor,
    labels: Tensor,
    held_out: Callable[[Tensor], HeldOutImages],
    values: tuple[float, float, Ensemble],
    *,
    most: int = 20,
    votes: int = 6,
) -> list[Confusion]:
    """Return the pairs of classes with the most confusions; ties by the share of the class, then in the classes' order.

    Args:
        logits: (B, N), with NaN for an image that is left out.
        labels: (B,) int64.
        held_out: gives some of the images by their numbers, with the affinities that their logits were made of.
        values: α, β and the ensemble.
        most: the number of pairs that are returned.
        votes: the number of keys that are named for each.
    """
    judged = ~logits.isnan().any(dim=1)
    predicted = logits.argmax(dim=1)
    counts = torch.bincount(labels[judged], minlength=logits.shape[1]).tolist()
    pairs: dict[tuple[int, int], list[int]] = {}
    for image in (judged & (predicted != labels)).nonzero()[:, 0].tolist():
        pairs.setdefault((int(labels[image]), int(predicted[image])), []).append(image)
    order = sorted(pairs, key=lambda pair: (-len(pairs[pair]), -len(pairs[pair]) / counts[pair[0]], pair))
    return [_explain_pair(pair, pairs[pair], counts[pair[0]], held_out, values, votes) for pair in order[:most]]


def _explain_pair(
    pair: tuple[int, int],
    images: list[int],
    of: int,
    held_out: Callable[[Tensor], HeldOutImages],
    values: tuple[float, float, Ensemble],
    votes: int,
) -> Confusion:
    label, predicted = pair
    text, margin, pulls, key_labels = 0.0, 0.0, dict[str, Tensor](), torch.empty(0, dtype=torch.int64)
    for rows in torch.tensor(images).split(_IMAGES_AT_ONCE):
        part = held_out(rows).load()
        found = decompose(part.zero_shot, part.affinities, part.key_labels, *values)
        toward, away = torch.full_like(part.labels, predicted), torch.full_like(part.labels, label)
        of_text, of_keys = found.pulls(toward, away)
        logits = found.logits()
        text += float(of_text.sum()) / len(images)
        margin += float((logits[:, predicted] - logits[:, label]).sum()) / len(images)
        for name, pull in of_keys.items():
            pulls[name] = pulls.get(name, 0.0) + pull.sum(dim=1) / len(images)
        key_labels = part.key_labels
    return Confusion(
        label=label,
        predicted=predicted,
        images=tuple(images),
        of=of,
        margin=margin,
        text=text,
        sources={name: float(pull.sum()) for name, pull in pulls.items()},
        votes=largest_votes(pulls, key_labels, votes)[0],
    )
