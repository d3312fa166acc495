"""Find labels that are likely wrong: images whose own class is outvoted when their own keys are left out.

Each training image is classified by the keys of all other images, and by p_ZS. Its margin is the logit of its own
class less the largest logit of another class. A negative margin means that the other images and the text together
favour another class, and the lower it is, the likelier the label is wrong. Leaving an image's own key out is exact for
keys that are mean features; trained keys have learned from all labels, the wrong ones too, and cannot be used.

Legend: B images, M keys, N classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.cache import Cache
from cafo.cross_fit import TrainingImages, has_others, leave_one_out
from cafo.held_out import HeldOutImages

_FLOATS_AT_ONCE = 1 << 24


class LabelCheck(NamedTuple):
    """The judgement of the other images on the label of each of B images."""

    margins: Tensor
    """(B,) float32: the logit of the image's label less that of `suggested`; NaN for an image that is not judged"""
    suggested: Tensor
    """(B,) int64: the likeliest other class"""
    logits: Tensor
    """(B, N): those of the image without its own key; NaN for an image that is not judged"""

    @property
    def judged(self) -> Tensor:
        """(B,) bool: false for an image whose class has no other image, which nothing can be said of."""
        return ~self.margins.isnan()

    def suspects(self) -> list[int]:
        """Return the images whose own class is outvoted, the likeliest errors first; ties in the images' order."""
        rows = (self.margins < 0).nonzero()[:, 0]
        return rows[self.margins[rows].argsort(stable=True)].tolist()


def check_labels(logits: Tensor, labels: Tensor) -> LabelCheck:
    """Return the margins of images whose logits were made without them.

    Args:
        logits: (B, N), with NaN for an image that is not judged.
        labels: (B,) int64.
    """
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    largest, suggested = others.max(dim=1)
    return LabelCheck(own[:, 0] - largest, suggested, logits)


def held_out_training_images(cache: Cache, images: TrainingImages, rows: Tensor) -> HeldOutImages:
    """Return some of the training images, each of which sees all keys but its own; M · len(rows) floats per source.

    Args:
        cache: the cache with untrained keys.
        images: its training images.
        rows: (B',) numbers of images that are judged: images whose class has another image.
    """
    features = {name: f[rows] for name, f in images.features.items()}
    return leave_one_out(cache, replace(images, features=features, rows=images.rows[rows]))


@torch.no_grad()
def check_training_labels(cache: Cache, images: TrainingImages) -> LabelCheck:
    """Judge the label of every training image by the other images' keys, block by block.

    Args:
        cache: a cache with untrained keys, and the α, β and ensemble to judge with.
        images: its training images. Images of equal content see none of each other's keys.

    Raises:
        CafoError: what `cafo.ensemble.combine` raises.
    """
    labels = cache.labels[images.rows]
    logits = cache.classifier.new_full((len(labels), len(cache.class_names)), torch.nan)
    judged = has_others(cache.labels, images.groups_of(cache), images.rows).nonzero()[:, 0]
    for rows in judged.split(max(1, _FLOATS_AT_ONCE // max(1, len(cache.labels)))):
        held_out = held_out_training_images(cache, images, rows)
        logits[rows] = held_out.combine(cache.beta, cache.ensemble).logits(cache.alpha)
    return check_labels(logits, labels)
