"""Read a folder of images as a data set: one folder per class, alone or below folders `train`, `val` and `test`.

Without folders of splits, the images of each class are divided by a seed. Where the classes have few images, all of
them are training images: α, β and the accuracy can then be had by cross-fit (`cafo.selection`), and a label that trains
is worth more than one that is set aside.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cafo.class_folders import is_image_name, list_class_folders, list_images, refuse_empty_classes
from cafo.dataset_checks import check_class_names
from cafo.dataset_layouts import PHOTO_TEMPLATES
from cafo.datasets import Dataset, label_images, require_folder
from cafo.errors import DatasetError, refuse_text
from cafo.fewshot import rank
from cafo.files import as_path
from cafo.items import Item

FEW_IMAGES = 20
"""Images of the median class up to which all images become training images."""

DEFAULT_SHARES = (0.5, 0.2)
"""Shares of train and val where the classes have more."""

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class _Splits(NamedTuple):
    """The images of a folder by split, and notices about what else lies there."""

    class_names: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    read_test: Callable[[], tuple[Item, ...]]
    notices: tuple[str, ...]


def load_tree(
    root: str | Path,
    *,
    name: str = "",
    templates: Sequence[str] = PHOTO_TEMPLATES,
    seed: int = 0,
    shares: tuple[float, float] | None = None,
) -> Dataset:
    """Load a folder with one subfolder per class, or with folders `train`, `val` and `test` of such subfolders.

    Folders of splits are read as they are; `val` (or `valid`, `validation`) and `test` may be missing. Otherwise every
    class is divided in the given shares, as nearly as its images allow, and has at least one training image:
    `apportion` says how. The images of a class are ranked by a hash of seed and path, so the order of a listing does
    not matter. Another image of a class may move others of this class to another split. What is no image is ignored,
    and the data set's `notices` count and name it.

    Args:
        root: the folder.
        name: name of the data set; by default the folder's.
        templates: sentences with one `{}` for the class name.
        seed: seed of the division.
        shares: shares of train and val; the rest is test. None makes all images training images where the median class
            has at most `FEW_IMAGES`, and is `DEFAULT_SHARES` otherwise. It has no meaning with folders of splits.

    Raises:
        DatasetError: no such folder, no class folders, a class folder without an image, or shares that are negative or
            add up to more than 1 or give train nothing.
    """
    refuse_text(templates, "templates")
    root = require_folder(as_path(root), "give the folder that holds one folder per class")
    if shares is not None and (min(shares) < 0 or sum(shares) > 1 or not shares[0] > 0):
        raise DatasetError(
            f"shares of train and val must be at least 0 and add up to at most 1, with some for train; got {shares}"
        )
    names, beside = list_class_folders(root)
    folders = _split_folders(root, names)
    splits = _list_splits(root, folders) if folders else _divide(root, names, seed, shares)
    return Dataset(
        name=name or root.name,
        class_names=splits.class_names,
        templates=tuple(templates),
        image_root=root,
        train=splits.train,
        val=splits.val,
        read_test=splits.read_test,
        notices=(*beside, *splits.notices, *check_class_names(splits.class_names, root)),
    )


def apportion(count: int, shares: tuple[float, float]) -> tuple[int, int, int]:
    """Return how many of a class's images are train, val and test.

    Each split gets the whole part of its share; what is left goes to the largest remainders, of equal ones to train,
    then test, then val. A class always has a training image. So with shares 0.5 and 0.2, one image is train; two are
    train and test; three are one of each; five are 3, 1 and 1.
    """
    train, val = shares
    wanted = {"train": train * count, "test": (1 - train - val) * count, "val": val * count}
    wanted = {split: round(number, 9) for split, number in wanted.items()}
    found = {split: int(number) for split, number in wanted.items()}
    by_remainder = sorted(wanted, key=lambda split: found[split] - wanted[split])  # stable: train, test, val on ties
    for split in by_remainder[: count - sum(found.values())]:
        found[split] += 1
    if not found["train"]:
        found[max(found, key=lambda split: found[split])] -= 1
        found["train"] = 1
    return found["train"], found["val"], found["test"]


def _divide(root: Path, names: tuple[str, ...], seed: int, shares: tuple[float, float] | None) -> _Splits:
    """Divide the images of each class folder. Each split is ordered by class and file name."""
    listing = list_images(root, names)
    refuse_empty_classes(root, listing)
    few = statistics.median(len(files) for files in listing.images.values()) <= FEW_IMAGES
    shares = shares or ((1.0, 0.0) if few else DEFAULT_SHARES)
    parts: tuple[list[Item], list[Item], list[Item]] = ([], [], [])
    for ranked in rank(label_images(listing.images, {name: name for name in names}), names, seed=seed):
        start = 0
        for part, count in zip(parts, apportion(len(ranked), shares), strict=True):
            part += sorted(ranked[start : start + count])
            start += count
    train, val, test = (tuple(part) for part in parts)
    return _Splits(names, train, val, lambda: test, listing.notices)


def _split_folders(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return {split: folder} if the folders are those of splits, with class folders below them; else nothing."""
    splits = {_SPLITS.get(name.casefold(), ""): name for name in names}
    if "" in splits or "train" not in splits:
        return {}
    if any(is_image_name(entry.name) for entry in (root / splits["train"]).iterdir()):
        return {}  # classes that are called train, test and so on
    if len(splits) < len(names):
        raise DatasetError(f"{root}: {', '.join(names)} name one split twice; keep one folder for each split")
    return splits


def _list_splits(root: Path, folders: Mapping[str, str]) -> _Splits:
    """List the folders of splits. The classes are those of train; test is listed when it is opened."""
    names, notices = list_class_folders(root / folders["train"])
    refuse_empty_classes(root / folders["train"], list_images(root / folders["train"], names))
    if "val" in folders:
        of_val, more = list_class_folders(root / folders["val"])
        if strangers := sorted({*of_val} - {*names}):
            raise DatasetError(f"{root / folders['val']}: no training images of {', '.join(strangers[:5])}; add some")
        notices += more

    def read(split: str) -> tuple[tuple[Item, ...], tuple[str, ...]]:
        if split not in folders:
            return (), ()
        paths = {f"{folders[split]}/{class_name}": class_name for class_name in names}
        listing = list_images(root, paths)
        return tuple(label_images(listing.images, paths)), listing.notices

    def read_test() -> tuple[Item, ...]:
        if "test" in folders:
            of_test, _ = list_class_folders(root / folders["test"])
            if strangers := sorted({*of_test} - {*names}):
                raise DatasetError(
                    f"{root / folders['test']}: {', '.join(strangers[:5])} have no training images, so no image can "
                    "be found to be theirs; add training images, or remove these folders"
                )
        return read("test")[0]

    (train, of_train), (val, of_val_images) = read("train"), read("val")
    return _Splits(names, train, val, read_test, (*notices, *of_train, *of_val_images))
