"""Encode the images of few-shot choices. A chosen image that cannot be read gives way to the next of its class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cafo import fewshot
from cafo.datasets import Dataset, Item
from cafo.fewshot import FewShot
from rayjobs.data.feature_store import Features, FeatureStore
from rayjobs.data.image_list import ImageList, plain_list, training_list

PLAIN = "plain"
"""Role of the training images as they are predicted, from one plain view."""

Choices = Mapping[tuple[int, int], FewShot]
"""(shots, seed) → the few-shot choice"""


@dataclass(frozen=True, kw_only=True)
class FewShotPlan:
    """The few-shot choices that are made of a data set: one for every K and seed."""

    dataset: Dataset
    shots: Sequence[int]
    seeds: Sequence[int]
    short: Literal["error", "report"]
    """treatment of a class that has fewer than K images"""
    joined: Sequence[Item] = ()
    """images that join every choice, in addition to K of each class"""

    def choose(self, unreadable: frozenset[str] = frozenset()) -> Choices:
        """Make the choices; they depend on the seeds, the images' paths and the class names alone.

        Args:
            unreadable: paths that are not chosen.

        Raises:
            DatasetError: a class has fewer than K images and `short` is `error`.
        """
        train, names = self.dataset.train, self.dataset.class_names
        joined = [item for item in self.joined if item.path not in unreadable]
        choices = {}
        for seed in self.seeds:
            ranked = fewshot.rank(train, names, seed=seed, unreadable=unreadable)  # the slow part, for all K at once
            for shots in self.shots:
                choice = fewshot.choose(
                    train, names, shots=shots, seed=seed, short=self.short, unreadable=unreadable, ranked=ranked
                )
                items = tuple(sorted([*choice.items, *joined], key=lambda item: item.label))  # by label, as they were
                choices[shots, seed] = replace(choice, items=items)
        return choices


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Few-shot choices of images that can be read, and all images that were encoded."""

    choices: Choices
    lists: Mapping[str, ImageList]
    """role → images; a role without images is missing"""
    features: Mapping[str, Features]
    """role → features"""


def encode_few_shot(
    store: FeatureStore, plan: FewShotPlan, views: int, others: Sequence[ImageList] = (), *, plain: bool = False
) -> EncodedImages:
    """Encode the chosen images and other lists, and choose again until all chosen images can be read.

    Replacements are lists of their own, so that no image is encoded twice.

    Args:
        store: the feature store.
        plan: the choices.
        views: V, augmented views of each training image.
        others: lists that are encoded in the same pass.
        plain: also encode the chosen images as they are, without augmented views: as the list `PLAIN`.

    Raises:
        DataError: too many images of a list cannot be read.
        DatasetError: a class has fewer than K images that can be read, and the plan's `short` is `error`.
    """
    choices, unreadable = plan.choose(), frozenset[str]()
    wanted = [training_list(plan.dataset, choices.values(), views), *others]
    lists = {images.role: images for images in wanted if images.items}
    features = dict(store.load(list(lists.values())))
    while True:
        encoded = {item for images in lists.values() if images.training for item in images.items}
        unreadable |= {
            image.path for role, found in features.items() if lists[role].training for image in found.rejected
        }
        if not any(item.path in unreadable for choice in choices.values() for item in choice.items):
            break
        choices = plan.choose(unreadable)
        number = 1 + sum(images.training for images in lists.values())
        replacements = training_list(plan.dataset, choices.values(), views, without=encoded, number=number)
        if replacements.items:
            lists[replacements.role] = replacements
            features |= store.load([replacements], max_rejected_fraction=1.0)
    chosen = sorted({item for choice in choices.values() for item in choice.items})
    if plain and chosen:
        lists[PLAIN] = plain_list(PLAIN, plan.dataset.image_root, chosen)
        features |= store.load([lists[PLAIN]])
    return EncodedImages(choices=choices, lists=lists, features=features)
