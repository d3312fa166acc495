"""The data set that a CaFo job names: images, labels, generated images and descriptions of the classes."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from cafo.dataset_layouts import LAYOUTS
from cafo.datasets import Dataset, Item, load_generated_list, load_split
from cafo.image_trees import load_tree
from cafo.paper_datasets import load_dataset, load_generated
from cafo.prompt import read_prompts, template_prompts
from rayjobs.config import config
from rayjobs.errors import ConfigError
from rayjobs.storage.paths import AnyPath, resolve_path

logger = logging.getLogger(__name__)

Sentences = Literal["file", "templates"]


@config
class ImageDatasetConfig:
    """A data set of labelled images, with descriptions of its classes."""

    name: str = ""
    """Name of one of the paper's eleven sets, read from `root`. Any other set needs `split` or `tree`, and may have any
    name."""
    root: AnyPath = "data"
    """Folder that holds the eleven sets in CoOp's layout. Like the files and folders below, it may be a URL."""
    split: AnyPath | None = None
    """Split file in CoOp's JSON format, for a data set of your own."""
    images: AnyPath | None = None
    """Folder that the paths of `split` are relative to; null for the folder of `split`."""
    tree: AnyPath | None = None
    """Folder with one subfolder per class, whose images lie directly in it; or with folders `train`, `val` and `test`
    of such subfolders, of which the last two may be missing. Anything else in it is ignored, counted and named."""
    tree_shares: tuple[float, float] | None = None
    """Shares of train and val among each class's images of `tree`, which `seed` divides; the rest is test. Null makes
    all images training images if the median class has 20 or fewer, since α, β and the accuracy can then be had by
    cross-fit, and otherwise takes 0.5 and 0.2. It has no meaning for folders `train`, `val` and `test`."""
    val_share: float = Field(default=0.01, gt=0, lt=1)
    """Share of ImageNet's training images that is held out for validation."""
    seed: int = 0
    """Seed of the splits that are made here: of `tree`, and of ImageNet's validation images."""
    templates: list[str] | None = Field(default=None, min_length=1)
    """Sentences with {} for the class name; null for the data set's own."""
    prompts: AnyPath | None = None
    """JSON file of descriptions of each class, in the format of cafo-prompt and of CaFo; null to use templates only."""
    generated: Literal["dalle", "sd"] | AnyPath | None = None
    """Generated images: `dalle` or `sd` for one of the eleven sets under `root`, or the list of cafo-generate."""
    short_classes: Literal["error", "report"] = "error"
    """A class with fewer than K training images stops the job (`error`), or is used with those it has and reported
    (`report`)."""

    def open(self) -> Dataset:
        """Read the data set; its test list stays unread.

        Raises:
            ConfigError: no data set, or two, are named.
            CafoError: a file or folder is missing or malformed.
        """
        if self.split and self.tree:
            raise ConfigError("data.split and data.tree exclude each other; give one of them")
        if self.split:
            split = resolve_path(self.split)
            dataset = load_split(split, resolve_path(self.images) if self.images else split.parent, name=self.name)
        elif self.tree:
            dataset = load_tree(resolve_path(self.tree), name=self.name, seed=self.seed, shares=self.tree_shares)
        elif not self.name:
            raise ConfigError(f"data: give a name ({', '.join(LAYOUTS)}), or data.split, or data.tree")
        else:
            dataset = load_dataset(self.name, resolve_path(self.root), val_share=self.val_share, seed=self.seed)
        if self.templates:
            dataset = replace(dataset, templates=tuple(self.templates))
        return dataset

    def generated_images(self, dataset: Dataset, keep: int) -> tuple[Path, tuple[Item, ...]]:
        """Return the folder of the generated images, and the best `keep` images of each class.

        Raises:
            ConfigError: `keep` is not 0 and `generated` is not set.
            CafoError: the list or its folder is missing or malformed.
        """
        if not keep:
            return dataset.image_root, ()
        from cafo.generate import best_per_class  # imports PyTorch

        if not self.generated:
            raise ConfigError("generated images are used, but data.generated is not set; set it to their list")
        if self.generated in ("dalle", "sd"):
            root, items = load_generated(dataset, resolve_path(self.root), self.generated)
        else:
            path = resolve_path(self.generated)
            root, items = path.parent, load_generated_list(path, dataset.class_names)
        return root, best_per_class(items, keep)

    def sentences(self, dataset: Dataset, kind: Sentences) -> dict[str, list[str]]:
        """Return the descriptions of every class, from `prompts` or from the templates.

        Raises:
            ConfigError: `kind` is `file` and `prompts` is not set.
            CafoError: `prompts` cannot be read, or has no description of some classes; they are named.
        """
        if kind == "templates":
            return template_prompts(dataset.templates, dataset.class_names)
        if self.prompts is None:
            raise ConfigError(
                "descriptions from a file are used, but data.prompts is not set; set it to their JSON file"
            )
        return read_prompts(resolve_path(self.prompts), dataset.class_names)


def log_notices(notices: Iterable[str]) -> dict[str, str]:
    """Log what a user should know about images and results, and return it as an entry of `result.json`, if any."""
    texts = list(dict.fromkeys(notices))
    for text in texts:
        logger.warning("Note: %s", text)
    return {"notices": "; ".join(texts)} if texts else {}
