"""The cache that an inspection looks at, the images of its keys, and the images that it was chosen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.cache import Cache
from cafo.cross_fit import TrainingImages
from cafo.held_out import HeldOutImages, on_validation
from cafo.inspection.label_errors import LabelCheck, check_labels, check_training_labels, held_out_training_images
from cafo.items import Item
from rayjobs.data.few_shot_images import PLAIN
from rayjobs.errors import ConfigError, DataError
from rayjobs.tune.inputs import SweepInputs, share_inputs
from rayjobs.tune.selection import ChosenSetting, best_choice
from rayjobs.tune.trial import SharedRows, shared_tensor, training_images


class SeenImage(NamedTuple):
    """An image of an inspection."""

    split: str
    """`train`, `generated`, `val`, `test`, or the name of the setting that gave it"""
    root: Path
    path: str
    class_name: str
    """empty for an image without a label, or whose label is not read"""
    content: str
    """fingerprint of the file"""

    @property
    def file(self) -> Path:
        """The image's file."""
        return self.root / self.path


@dataclass(frozen=True, kw_only=True, eq=False)
class Inspected:
    """A chosen cache, and the images that it was made of and chosen on."""

    cache: Cache
    """the trained cache, as the sweep has chosen it"""
    untrained: Cache
    """the same with keys that are mean features, which an image can be left out of exactly"""
    keys: tuple[SeenImage, ...]
    """(M): the image of each key"""
    train: TrainingImages
    """the labelled training images, which the first keys are made of"""
    val: Mapping[str, Tensor]
    """source → (B, C); empty if the sweep has not chosen on validation images"""
    val_labels: Tensor
    val_images: tuple[SeenImage, ...]

    @property
    def train_images(self) -> tuple[SeenImage, ...]:
        """The images of `train`."""
        return self.keys[: len(self.train.rows)]

    def check_labels(self) -> tuple[LabelCheck, LabelCheck]:
        """Judge the labels of the training images, each without its own key, and of the validation images."""
        empty = torch.empty(0, len(self.cache.class_names))
        on_val = self.cache.logits(self.val) if len(self.val_labels) else empty
        return check_training_labels(self.untrained, self.train), check_labels(on_val, self.val_labels)

    def held_out(self, rows: Tensor) -> HeldOutImages:
        """Return validation images, or training images without their own keys where there is none."""
        if len(self.val_labels):
            return on_validation(self.cache, {n: f[rows] for n, f in self.val.items()}, self.val_labels[rows])
        return held_out_training_images(self.untrained, self.train, rows)


def pick_choice(
    chosen: Sequence[ChosenSetting], *, shots: int | None, method: str | None, seed: int | None
) -> tuple[ChosenSetting, str]:
    """Return the choice to inspect and the name of its trial: the best of CaFo's that fit, at its first seed.

    Raises ConfigError if none fits; the message names those there are.
    """
    own = [choice for choice in chosen if not choice.setting.rival]
    fitting = [c for c in own if shots in (None, c.shots) and method in (None, c.method)]
    trials = [(choice, t) for choice in fitting for t in choice.seeds if seed in (None, t.seed)]
    if not trials:
        there = "; ".join(
            f"{c.method} at {c.shots} shots, seeds {', '.join(str(t.seed) for t in c.seeds)}" for c in own
        )
        raise ConfigError(
            f"the sweep has chosen no cache of CaFo at shots={shots}, method={method}, seed={seed}; "
            f"it has chosen {there or 'rivals alone, which have no keys that could be explained'}"
        )
    best = best_choice([choice for choice, _ in trials])
    return next((choice, trial.trial) for choice, trial in trials if choice is best)


def gather(inputs: SweepInputs, choice: ChosenSetting, cache: Cache, seed: int) -> Inspected:
    """Put a choice's cache together with its images.

    Args:
        inputs: the sweep's inputs, with plain features of the training images.
        choice: the chosen setting.
        cache: the cache of its trial at `seed`.
        seed: the seed.

    Raises:
        DataError: the cache's keys are not of these images.
    """
    setting, key = choice.setting, (choice.shots, seed)
    shared = share_inputs(inputs, {})
    few_shot = shared.few_shot[key]
    rows = torch.cat([torch.from_numpy(few_shot), torch.from_numpy(shared.generated[setting.generated])])
    keys = [*_seen(inputs, "train", inputs.images.choices[key].items)]
    if "generated" in inputs.images.lists:
        keys += _seen(inputs, "generated", inputs.generated[setting.generated])
    labels = torch.from_numpy(shared.labels)[rows]
    if len(keys) != len(cache.labels) or not labels.equal(cache.labels):
        raise DataError(
            f"the cache has {len(cache.labels)} keys, but {len(keys)} images of the data set would make it; put back "
            "the images that the sweep was run with, or sweep again under another run.name"
        )
    untrained = {
        name: SharedRows(shared_tensor(shared.views[name]), setting.views, rows).keys() for name in setting.encoders
    }
    has_val = "val" in inputs.images.lists
    return Inspected(
        cache=cache,
        untrained=replace(cache, keys=untrained),
        keys=tuple(keys),
        train=training_images(shared, few_shot, rows.numpy(), setting.encoders),
        val={name: shared_tensor(shared.val[name]) for name in setting.encoders} if has_val else {},
        val_labels=torch.from_numpy(shared.val_labels),
        val_images=tuple(_seen(inputs, "val", inputs.dataset.val)) if has_val else (),
    )


def _seen(inputs: SweepInputs, split: str, items: Sequence[Item]) -> list[SeenImage]:
    """The images of some items of one split, without those that cannot be read."""
    lists, features = inputs.images.lists, inputs.images.features
    readable = {}
    for role, images in lists.items():
        if role != PLAIN and (role == split or (images.training and split == "train")):
            for row in features[role].rows:
                item = images.items[row]
                content = features[role].contents[row] or item.path
                readable[item] = SeenImage(split, images.root, item.path, item.class_name, content)
    return [readable[item] for item in items if item in readable]
