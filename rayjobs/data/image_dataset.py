"""The images and sentences that a CaFo job names, and the lists of images it has to encode."""

from rayjobs.errors import UserError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from pydantic import Field
from cafo.datasets import (
    LAYOUTS,
    TEST_ONLY,
    Dataset,
    Item,
    load_dataset,
    load_generated,
    load_generated_list,
    load_split,
    load_tree,
)
from cafo.fewshot import FewShot
from cafo.generate import best_per_class
from cafo.prompt import read_prompts, template_prompts
from rayjobs.config import config
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.storage.paths import AnyPath, resolve_path


Sentences = Literal["file", "templates"]


@config
class ImageDatasetConfig:
    """One data set: images, labels, sentences."""

    name: str = ""
    """One of the eleven sets by name, read from `root`; any other name needs `split` or `tree`."""
    root: AnyPath = "data"
    """The folder that holds the sets in CoOp's layout. It, and the files and folders below, may be URLs."""
    split: AnyPath | None = None
    """A CoOp-style split JSON of a set of your own."""
    images: AnyPath | None = None
    """The folder that the split's paths are relative to; by default the split's own."""
    tree: AnyPath | None = None
    """A folder with one folder per class, split by `seed`."""
    tree_shares: tuple[float, float] = (0.5, 0.2)
    """Shares of train and val in a tree; the rest is test."""
    val_share: float = Field(default=0.01, gt=0, lt=1)
    """The share of ImageNet's training images held out for validation."""
    seed: int = 0
    """Of the splits that are drawn here: a tree's, and ImageNet's validation images."""
    templates: list[str] | None = None
    """Sentences with {} for the class name; by default the data set's own."""
    prompts: AnyPath | None = None
    """The JSON of sentences that cafo-prompt wrote, or CaFo's own; null for the templates alone."""
    generated: Literal["dalle", "sd"] | AnyPath | None = None
    """Drawn images: `dalle` or `sd` for a set in CoOp's layout under `root`, or the list that cafo-generate wrote."""
    short_classes: Literal["error", "report"] = "error"
    """What to do with a class of fewer than K training images: stop, or take what there is and report it."""

    def open(self) -> Dataset:
        """The data set with its test list still closed. Raises ValueError."""
        if self.split and self.tree:
            raise UserError("data.split and data.tree exclude each other")
        if self.split:
            split = resolve_path(self.split)
            dataset = load_split(split, resolve_path(self.images) if self.images else split.parent, name=self.name)
        elif self.tree:
            dataset = load_tree(resolve_path(self.tree), name=self.name, seed=self.seed, shares=self.tree_shares)
        elif not self.name:
            raise UserError(f"data: give a name ({', '.join(LAYOUTS)}), or data.split, or data.tree")
        else:
            dataset = load_dataset(self.name, resolve_path(self.root), val_share=self.val_share, seed=self.seed)
        if self.templates:
            dataset = replace(dataset, templates=tuple(self.templates))
        if not dataset.val and self.name not in TEST_ONLY:
            raise UserError(f"{dataset.name} has no validation image, and nothing is ever chosen on test")
        return dataset

    def drawn(self, dataset: Dataset, keep: int) -> tuple[Path, tuple[Item, ...]]:
        """The folder and the best `keep` generated images of each class. Raises ValueError."""
        if not keep:
            return dataset.image_root, ()
        if not self.generated:
            raise UserError("generated images are asked for: data.generated says where they are, and it is not set")
        if self.generated in ("dalle", "sd"):
            root, items = load_generated(dataset, resolve_path(self.root), self.generated)
        else:
            path = resolve_path(self.generated)
            root, items = path.parent, load_generated_list(path, dataset.class_names)
        return root, best_per_class(items, keep)

    def sentences(self, dataset: Dataset, kind: Sentences) -> dict[str, list[str]]:
        """Every class's sentences. Raises ValueError naming the classes without one."""
        if kind == "templates":
            return template_prompts(dataset.templates, dataset.class_names)
        if self.prompts is None:
            raise UserError("sentences from a file are asked for, and data.prompts names none")
        return read_prompts(resolve_path(self.prompts), dataset.class_names)
