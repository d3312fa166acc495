"""Lists of images that are to be encoded, by the part they play."""

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



@dataclass(frozen=True, kw_only=True)
class ImageList:
    """Images of one role, to be encoded."""

    role: str
    root: Path
    items: tuple[Item, ...]
    views: int
    """Augmented views of each image; 0 for the one plain view that predictions are made from."""


def training_list(dataset: Dataset, choices: Iterable[FewShot], views: int) -> ImageList:
    """The images of all choices, each once, whatever the order of the choices."""
    items = sorted({item for choice in choices for item in choice.items})
    return ImageList(role="train", root=dataset.image_root, items=tuple(items), views=views)


def plain_list(role: str, root: Path, items: Sequence[Item]) -> ImageList:
    return ImageList(role=role, root=root, items=tuple(items), views=0)
