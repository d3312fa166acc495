"""Lists of images to be encoded, each with its role: training, generated, validation or test images."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cafo.class_folders import is_image_name
from cafo.datasets import Dataset, Item
from cafo.fewshot import FewShot
from rayjobs.errors import DataError
from rayjobs.storage.paths import resolve_path


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """Images of one role that are encoded in the same way."""

    role: str
    """`train`, `generated`, `val`, the name of a test set, or the number of a source of records; `train-2` and so on
    for images that replace unreadable ones"""
    root: Path
    """the folder that the items' paths are relative to"""
    items: tuple[Item, ...]
    views: int
    """V, augmented views of each image; 0 for the one plain view that predictions are made from"""
    training: bool = False
    """the images are of few-shot choices"""


def training_list(
    dataset: Dataset, choices: Iterable[FewShot], views: int, *, without: Collection[Item] = (), number: int = 1
) -> ImageList:
    """Return the images of all few-shot choices, each once, in an order that does not depend on the choices' order.

    Args:
        dataset: the data set.
        choices: the choices.
        views: V, augmented views of each image.
        without: images that are left out.
        number: number of the list, if it holds replacements; it makes the role `train-NUMBER`.
    """
    items = sorted({item for choice in choices for item in choice.items if item not in without})
    role = "train" if number == 1 else f"train-{number}"
    return ImageList(role=role, root=dataset.image_root, items=tuple(items), views=views, training=True)


def plain_list(role: str, root: Path, items: Sequence[Item]) -> ImageList:
    """Return images that are encoded as they are, without augmented views."""
    return ImageList(role=role, root=root, items=tuple(items), views=0)


def unlabelled_list(role: str, path: str | Path) -> ImageList:
    """Return the images below a folder, at any depth, or one image file; none has a label.

    Args:
        role: the role of the list.
        path: the folder or the file, local or a URL.

    Raises:
        DataError: there is no image at the path.
    """
    root = resolve_path(path)
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if is_image_name(file.name))
    if root.is_file():
        root, names = root.parent, [root.name]
    if not names:
        raise DataError(f"{path} has no image; give an image file, or a folder with images at any depth")
    return plain_list(role, root, [Item(name, 0, "") for name in names])
