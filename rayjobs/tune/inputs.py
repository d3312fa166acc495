"""The images, features and classifiers of a sweep, and the arrays of them that all its trials share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cafo import fewshot
from cafo.datasets import Dataset, Item
from cafo.fewshot import FewShot
from rayjobs.data.feature_store import Features, RejectedImage
from rayjobs.data.image_list import ImageList
from rayjobs.data.text_classifier import ClassifierFile
from rayjobs.errors import ProvenanceError
from rayjobs.storage.files import atomic_path, read_json, write_json
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.tune.trial import SharedInputs


@dataclass(frozen=True, kw_only=True)
class SweepInputs:
    """The inputs of a sweep, from which its trials' shared arrays are made."""

    dataset: Dataset
    few_shot: Mapping[tuple[int, int], FewShot]
    """(shots, seed) → the few-shot choice"""
    generated: Mapping[int, Sequence[Item]]
    """K' → the generated images"""
    lists: Mapping[str, ImageList]
    """role (train, generated, val) → the encoded images; a role without images is missing"""
    features: Mapping[str, Features]
    """role → features"""
    classifiers: Mapping[tuple[str, str], ClassifierFile]
    """(encoder, sentences) → zero-shot classifier"""
    identities: Mapping[str, str]
    """encoder → what identifies its weights and preprocessing"""

    @property
    def rejected(self) -> list[RejectedImage]:
        """Images that cannot be read."""
        return [image for of_role in self.features.values() for image in of_role.rejected]

    def counts(self) -> dict[str, int]:
        """Numbers of inputs that are missing or cut, for the sweep's result."""
        return {
            "rejected_images": len(self.rejected),
            "short_classes": len({name for choice in self.few_shot.values() for name in choice.short}),
            "truncated_sentences": max(classifier.truncated for classifier in self.classifiers.values()),
        }


def few_shot_choices(
    dataset: Dataset,
    shots: Sequence[int],
    seeds: Sequence[int],
    folder: Path,
    short: Literal["error", "report"],
) -> dict[tuple[int, int], FewShot]:
    """The few-shot choice of each (shots, seed): read from the run's folder, or made and saved there.

    short: what to do with a class that has fewer than K images.
    """
    choices = {}
    for count in shots:
        for seed in seeds:
            path = folder / "few_shot" / f"shots{count}-seed{seed}.json"
            if not path.exists():
                choice = fewshot.choose(dataset.train, dataset.class_names, shots=count, seed=seed, short=short)
                with atomic_path(path) as temporary:
                    fewshot.save(choice, temporary)
            choices[count, seed] = fewshot.load(path)
    return choices


def check_same_inputs(folder: Path, inputs: SweepInputs) -> None:
    """Record the images, weights and sentences of a sweep's trials.

    Raises ProvenanceError if trials of other inputs are in the folder.
    """
    labels = [[list(item) for item in images.items] for images in inputs.lists.values()]
    few_shot = [[list(item) for item in choice.items] for choice in inputs.few_shot.values()]
    classifiers = {", ".join(key): inputs.classifiers[key].store for key in sorted(inputs.classifiers)}
    now = {
        "lists of images": fingerprint([labels, few_shot]),
        "images or encoders": {role: dict(of_role.stores) for role, of_role in inputs.features.items()},
        "sentences or text encoders": classifiers,
    }
    path = folder / "inputs.json"
    if path.exists() and (before := read_json(path)) != now:
        changed = [name for name in now if before.get(name) != now[name]]
        raise ProvenanceError(
            f"{folder} holds trials of other {' and other '.join(changed)} than there are now: choose another run.name"
        )
    write_json(path, now)


def share_inputs(inputs: SweepInputs) -> SharedInputs:
    """The arrays that all trials read. Images that may become keys are in one array: training images, then generated.

    Images that could not be read are left out of it and of all choices; `rejected.jsonl` names them.
    """
    key_roles = [role for role in ("train", "generated") if role in inputs.lists]
    row_of: dict[tuple[str, Item], int] = {}
    labels: list[int] = []
    for role in key_roles:
        for position in inputs.features[role].rows:
            item = inputs.lists[role].items[position]
            row_of[role, item] = len(labels)
            labels.append(item.label)

    def rows(role: str, items: Iterable[Item]) -> np.ndarray:
        return np.array([row_of[role, item] for item in items if (role, item) in row_of], np.int64)

    val = inputs.features["val"]
    return SharedInputs(
        views={
            name: np.concatenate([inputs.features[role].values[name] for role in key_roles], axis=1)
            for name in val.values
        },
        labels=np.array(labels, np.int64),
        few_shot={key: rows("train", choice.items) for key, choice in inputs.few_shot.items()},
        generated={count: rows("generated", items) for count, items in inputs.generated.items()},
        val={name: values[0] for name, values in val.values.items()},
        val_labels=np.array([inputs.dataset.val[position].label for position in val.rows], np.int64),
        classifiers={key: classifier.weights.numpy() for key, classifier in inputs.classifiers.items()},
        class_names=inputs.dataset.class_names,
        identities=inputs.identities,
    )
