"""Check a data set of image files with a fitted classifier, in one process and in memory.

    model = CaFo.load("pets.safetensors", encoders)
    found = inspect_folder(model, "photos")          # its training and validation images, all of them
    found.label_errors()                             # [LabelError(photos/cat/7.jpg, "cat", "lynx", -3.1), …]
    found.near_duplicates(0.9)                       # [(photos/cat/1.jpg, photos/cat/9.jpg, 0.97), …]

Every image is judged by all other images of the data set, not only by the shots that the classifier was fitted on: they
become the keys of a cache with the classifier's text, α, β and ensemble. Test images are never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.cache import Cache
from cafo.cross_fit import TrainingImages
from cafo.dataset_checks import class_changes
from cafo.datasets import Dataset
from cafo.errors import DatasetError
from cafo.image_trees import load_tree
from cafo.inspection.confusions import Confusion, find_confusions
from cafo.inspection.label_errors import LabelCheck, check_training_labels, held_out_training_images
from cafo.inspection.near_duplicates import find_near_duplicates
from cafo.model import CaFo


class LabelError(NamedTuple):
    """An image whose label is likely wrong."""

    path: Path
    label: str
    suggested: str
    margin: float
    """the logit of the label less that of the suggested class; negative, and the lower the likelier an error"""


class NearDuplicate(NamedTuple):
    """Two files that look alike."""

    first: Path
    second: Path
    cosine: float


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderInspection:
    """The labelled images of a data set as the keys of one cache, and what they say of one another."""

    paths: tuple[Path, ...]
    """the M files"""
    cache: Cache
    """their features as untrained keys, with the classifier's text, α, β and ensemble"""
    images: TrainingImages
    check: LabelCheck
    """each image without its own key"""

    def label_errors(self) -> list[LabelError]:
        """Return the images whose own class is outvoted, the likeliest errors first."""
        names = self.cache.class_names
        return [
            LabelError(
                self.paths[row],
                names[int(self.cache.labels[row])],
                names[int(self.check.suggested[row])],
                float(self.check.margins[row]),
            )
            for row in self.check.suspects()
        ]

    def near_duplicates(self, threshold: float, *, most: int = 10_000) -> list[NearDuplicate]:
        """Return the pairs of files with at least this cosine under every encoder, the likest first."""
        found = find_near_duplicates(self.images.features, threshold, most=most)
        return [NearDuplicate(self.paths[pair.first], self.paths[pair.second], pair.cosine) for pair in found.pairs]

    def confusions(self, *, most: int = 20, votes: int = 6) -> list[Confusion]:
        """Return the pairs of classes that are taken for each other; keys and images are numbers of `paths`."""
        held_out = partial(held_out_training_images, self.cache, self.images)
        values = (self.cache.alpha, self.cache.beta, self.cache.ensemble)
        return find_confusions(self.check.logits, self.cache.labels, held_out, values, most=most, votes=votes)


def inspect_folder(model: CaFo, data: Dataset | str | Path, *, seed: int = 1) -> FolderInspection:
    """Encode the training and validation images of a data set, and judge their labels.

    Args:
        model: a fitted classifier of the same classes.
        data: a data set, or a folder as `load_tree` reads it.
        seed: seed of the split of a folder.

    Raises:
        DatasetError: the data set's classes are not the classifier's; the message names the difference.
        ImageError: an image that cannot be read.
    """
    dataset = data if isinstance(data, Dataset) else load_tree(data, seed=seed)
    if change := class_changes(model.cache.class_names, dataset.class_names):
        raise DatasetError(
            f"{dataset.name} has other classes than the classifier ({change}); give the data set that it was fitted on"
        )
    items = [*dataset.train, *dataset.val]
    paths = tuple(dataset.image_root / item.path for item in items)
    features: Mapping[str, Tensor] = model.features(paths)
    contents: dict[bytes, int] = {}
    groups = [contents.setdefault(hashlib.sha256(path.read_bytes()).digest(), row) for row, path in enumerate(paths)]
    cache = replace(
        model.cache,
        keys={name: features[name] for name in model.cache.keys},
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        key_names=tuple(item.path for item in items),
    )
    images = TrainingImages(features=features, rows=torch.arange(len(items)), groups=torch.tensor(groups))
    return FolderInspection(paths=paths, cache=cache, images=images, check=check_training_labels(cache, images))
