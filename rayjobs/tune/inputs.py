"""The images, features and classifiers of a sweep, and the arrays of them that all its trials share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cafo import fewshot
from cafo.choice_names import Select
from cafo.datasets import Dataset
from cafo.items import Item
from cafo.methods.base import Method, Projection
from cafo.methods.saved import TrainingFile
from rayjobs.data.feature_store import RejectedImage
from rayjobs.data.few_shot_images import PLAIN, EncodedImages
from rayjobs.data.image_dataset import Sentences
from rayjobs.data.text_classifier import ClassifierFile
from rayjobs.storage.files import atomic_path
from rayjobs.tune.images import SweepImage
from rayjobs.tune.trial import SharedInputs


@dataclass(frozen=True, kw_only=True)
class SweepInputs:
    """The inputs of a sweep, from which its trials' shared arrays are made."""

    dataset: Dataset
    images: EncodedImages
    """few-shot choices, and the training, generated and validation images with their features"""
    generated: Mapping[int, Sequence[Item]]
    """K' → the generated images"""
    classifiers: Mapping[tuple[str, Sentences], ClassifierFile]
    """(encoder, sentences) → zero-shot classifier"""
    identities: Mapping[str, str]
    """encoder → what identifies its weights and preprocessing"""
    rivals: Mapping[str, Method] = field(default_factory=dict)
    """the rivals by name"""
    projections: Mapping[str, Projection] = field(default_factory=dict)
    """encoder → its last layer, where a rival trains it"""

    @property
    def rejected(self) -> list[RejectedImage]:
        """Images that cannot be read."""
        return [image for of_role in self.images.features.values() for image in of_role.rejected]

    def counts(self) -> dict[str, int]:
        """Numbers of inputs that are missing or cut, for the sweep's result."""
        return {
            "rejected_images": len(self.rejected),
            "short_classes": len({name for choice in self.images.choices.values() for name in choice.short}),
            "truncated_sentences": max(classifier.truncated for classifier in self.classifiers.values()),
        }

    def readable_images(self) -> list[SweepImage]:
        """The images that trials are made of: chosen training images, generated and validation images."""
        chosen = {item for choice in self.images.choices.values() for item in choice.items}
        return [
            SweepImage(
                role="train" if images.training else role,
                class_name=images.items[row].class_name,
                path=images.items[row].path,
                content=self.images.features[role].contents[row] or "",
            )
            for role, images in self.images.lists.items()
            if role != PLAIN  # training images once more
            for row in self.images.features[role].rows
            if not images.training or images.items[row] in chosen
        ]

    def notices(self) -> Iterator[str]:
        """Sentences about classes that a trial has no key of."""
        names = self.dataset.class_names
        readable = {image.path for image in self.readable_images() if image.role == "generated"}
        for count, items in self.generated.items():
            generated = {item.class_name for item in items if item.path in readable}
            for (shots, seed), choice in self.images.choices.items():
                present = generated | {item.class_name for item in choice.items}
                lacking = [name for name in names if name not in present]
                if lacking and (shots or count):
                    first_names = ", ".join(lacking[:5]) + (" …" if len(lacking) > 5 else "")
                    yield f"K={shots}, seed {seed}, K'={count}: {len(lacking)} classes have no key: {first_names}"


def write_few_shot(folder: Path, inputs: SweepInputs) -> None:
    """Write the few-shot choices into the run's folder, for the reader; they are made anew at each start."""
    for (shots, seed), choice in inputs.images.choices.items():
        with atomic_path(folder / "few_shot" / f"shots{shots}-seed{seed}.json") as temporary:
            fewshot.save(choice, temporary)


def share_inputs(inputs: SweepInputs, select: Mapping[int, Select]) -> SharedInputs:
    """The arrays that all trials read. Images that may become keys are in one array: training images, then generated.

    Images that could not be read are left out of it and of all choices; `rejected.jsonl` names them.

    Args:
        inputs: the images and their features.
        select: K → what a choice is made on.
    """
    lists, features = inputs.images.lists, inputs.images.features
    key_roles = [role for role in lists if role not in ("val", PLAIN)]
    row_of: dict[tuple[str, Item], int] = {}
    labels: list[int] = []
    contents: list[str] = []
    files: list[TrainingFile] = []
    for role in key_roles:
        for position in features[role].rows:
            item = lists[role].items[position]
            row_of["train" if lists[role].training else role, item] = len(labels)
            labels.append(item.label)
            contents.append(features[role].contents[position] or item.path)
            files.append(TrainingFile(item.path, item.class_name, features[role].contents[position] or ""))
    groups = {content: group for group, content in enumerate(dict.fromkeys(contents))}

    def rows(role: str, items: Iterable[Item]) -> np.ndarray:
        return np.array([row_of[role, item] for item in items if (role, item) in row_of], np.int64)

    names = features[key_roles[0]].values
    val, plain_rows = features.get("val"), np.full(len(labels), -1, np.int64)
    if plain := features.get(PLAIN):
        for number, position in enumerate(plain.rows):
            plain_rows[row_of["train", lists[PLAIN].items[position]]] = number
    return SharedInputs(
        views={name: np.concatenate([features[role].values[name] for role in key_roles], axis=1) for name in names},
        labels=np.array(labels, np.int64),
        few_shot={key: rows("train", choice.items) for key, choice in inputs.images.choices.items()},
        generated={count: rows("generated", items) for count, items in inputs.generated.items()},
        val={name: values[0] for name, values in val.values.items()} if val else {},
        val_labels=np.array([inputs.dataset.val[row].label for row in val.rows] if val else [], np.int64),
        plain={name: plain.values[name][0] if plain else views[0, :0] for name, views in names.items()},
        plain_rows=plain_rows,
        groups=np.array([groups[content] for content in contents], np.int64),
        select=select,
        classifiers={key: classifier.weights.numpy() for key, classifier in inputs.classifiers.items()},
        class_names=inputs.dataset.class_names,
        identities=inputs.identities,
        rivals=inputs.rivals,
        prompts={
            key: classifier.embeddings.numpy()
            for key, classifier in inputs.classifiers.items()
            if classifier.embeddings is not None
        },
        files=tuple(files),
        projections={
            name: (weight.numpy(), None if bias is None else bias.numpy())
            for name, (weight, bias) in inputs.projections.items()
        },
    )
