"""Class names, sentence templates and lists of labelled images of a data set. No image is opened here.

CaFo (arXiv 2303.02151), section 4.1. Few-shot splits are CoOp's `split_zhou_*.json`:
`{"train" | "val" | "test": [[path relative to the images, label, class name], …]}`.

Two rules hold for every reader:
- The number of classes N is the length of the class list, whatever labels occur in the split.
- Only `Dataset.open_test` reads the test list. Nothing else depends on whether test files exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cafo.class_folders import list_class_folders, list_images, refuse_empty_classes
from cafo.dataset_checks import check_class_names, check_disjoint, check_items, check_labels, infer_classes
from cafo.dataset_layouts import (
    IMAGENET_TEMPLATES,
    LAYOUTS,
    PHOTO_TEMPLATES,
    TEST_ONLY,
    DatasetLayout,
    check_templates,
)
from cafo.errors import DatasetError, refuse_text
from cafo.files import as_path, read_json


class Item(NamedTuple):
    """One labelled image of a split."""

    path: str
    """relative to the data set's `image_root`, with forward slashes"""
    label: int
    class_name: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set with its train and val lists read, and its test list unread.

    Raises:
        DatasetError: a path with two labels or in both lists, or a name or path that is not UTF-8.
        CafoError: a template without exactly one `{}`.
    """

    name: str
    class_names: tuple[str, ...]
    """the N classes; label n is class_names[n]"""
    templates: tuple[str, ...]
    """sentences with one `{}` for the class name"""
    image_root: Path
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    read_test: Callable[[], tuple[Item, ...]] = field(repr=False, compare=False)
    notices: tuple[str, ...] = ()
    """what a user should know about the data set, such as files that were ignored; one sentence each"""

    def __post_init__(self) -> None:
        check_templates(self.templates)
        check_items([*self.train, *self.val], self.name)
        check_disjoint({"train": self.train, "val": self.val}, self.name)

    def open_test(self) -> tuple[Item, ...]:
        """Read the test list. Call it in an evaluation only, never to choose anything.

        Raises:
            DatasetError: the list is missing or malformed, names a class that is not in the class list, or has
                an image with two labels or of another split.
        """
        test = self.read_test()
        check_items(test, f"{self.name}, test")
        check_disjoint({"train": self.train, "val": self.val, "test": test}, self.name)
        return test


def load_dataset(name: str, root: str | Path, *, val_share: float = 0.01, seed: int = 0) -> Dataset:
    """Load one of the paper's eleven sets, or a test set of the distribution shift, from the data root.

    Args:
        name: a key of `LAYOUTS`, or one of `TEST_ONLY`.
        root: the folder that holds the sets in CoOp's layout.
        val_share: share of ImageNet's training images held out for validation, since its own `val` folder is the
            test split. The other sets bring a validation list.
        seed: seed of that selection.

    Raises:
        DatasetError: an unknown name; a missing root, folder or list; a malformed list.
    """
    root = as_path(root)
    if name in TEST_ONLY:
        return _load_shifted_imagenet(name, root)
    if name not in LAYOUTS:
        raise DatasetError(f"no data set called {name!r}; there are {', '.join([*LAYOUTS, *TEST_ONLY])}")
    layout = LAYOUTS[name]
    folder = _require_folder(
        root / layout.folder, f"put {name} in CoOp's layout under the data root, or give another root"
    )
    if name == "imagenet":
        return _load_imagenet(folder, layout, val_share, seed)
    if name == "fgvc_aircraft":
        return _load_fgvc_aircraft(folder, layout)
    return load_split(
        folder / layout.split,
        _require_folder(folder / layout.images, "unpack the images"),
        name=name,
        templates=layout.templates,
    )


def load_split(
    split: str | Path,
    image_root: str | Path,
    *,
    name: str = "",
    templates: Sequence[str] = PHOTO_TEMPLATES,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Load a data set from a split file in CoOp's format.

    Args:
        split: the JSON file.
        image_root: the folder that its paths are relative to.
        name: name of the data set; by default the file's name without its suffix.
        templates: sentences with one `{}` for the class name.
        class_names: the class list. By default it follows from the (label, name) pairs of train and val, which must
            then cover every label.

    Raises:
        DatasetError: a malformed file, a label with two names, two labels of one name, a label without images, a label
            outside the class list, an image with two labels or in two lists.
        CafoError: the file is missing or is not JSON.
    """
    refuse_text(templates, "templates")
    refuse_text(class_names, "class_names")
    split = as_path(split)
    content = _read_split_lists(split)
    lists = {part: _parse_items(content.get(part, []), f"{split}, {part}") for part in ("train", "val")}
    if not lists["train"] and not lists["val"]:
        raise DatasetError(f"{split} lists no train and no val image; a test-only set needs no split file of its own")
    names = tuple(class_names) if class_names is not None else infer_classes([*lists["train"], *lists["val"]], split)

    def read_test() -> tuple[Item, ...]:
        current = _read_split_lists(split)
        if "test" not in current:
            raise DatasetError(f"{split} has no test list; an evaluation needs one")
        return check_labels(_parse_items(current["test"], f"{split}, test"), names, split)

    return Dataset(
        name=name or split.stem,
        class_names=names,
        templates=tuple(templates),
        image_root=_require_folder(as_path(image_root), "give the folder that the paths of the split are relative to"),
        train=check_labels(lists["train"], names, split),
        val=check_labels(lists["val"], names, split),
        read_test=read_test,
        notices=check_class_names(names, split),
    )


def load_tree(
    root: str | Path,
    *,
    name: str = "",
    templates: Sequence[str] = PHOTO_TEMPLATES,
    seed: int = 0,
    shares: tuple[float, float] = (0.5, 0.2),
) -> Dataset:
    """Load a folder with one subfolder per class, split at random into train, val and test.

    The split of an image depends on the seed and on the image's own path alone: not on the order of the listing, nor
    on the other images. So deleting the test images moves no other image to another split. The shares hold on average.

    Args:
        root: the folder that holds the class folders.
        name: name of the data set; by default the folder's.
        templates: sentences with one `{}` for the class name.
        seed: seed of the split.
        shares: shares of train and val; the rest is test.

    What is no image is ignored, and `notices` of the data set count and name it.

    Raises:
        DatasetError: no such folder, no class folders, a class folder without an image, or shares that are negative or
            add up to more than 1.
    """
    refuse_text(templates, "templates")
    root = _require_folder(as_path(root), "give the folder that holds one folder per class")
    if min(shares) < 0 or sum(shares) > 1:
        raise DatasetError(f"shares of train and val must be at least 0 and add up to at most 1, got {shares}")
    names, beside = list_class_folders(root)
    listing = list_images(root, names)
    refuse_empty_classes(root, listing)
    val_from, test_from = shares[0], shares[0] + shares[1]

    def split_images(
        images: Mapping[str, Sequence[str]],
    ) -> tuple[tuple[Item, ...], tuple[Item, ...], tuple[Item, ...]]:
        items = [
            (stable_uniform(seed, item.path), item) for item in _label_images(images, {name: name for name in names})
        ]
        train = tuple(item for position, item in items if position < val_from)
        val = tuple(item for position, item in items if val_from <= position < test_from)
        test = tuple(item for position, item in items if test_from <= position)
        return train, val, test

    train, val, _ = split_images(listing.images)
    return Dataset(
        name=name or root.name,
        class_names=names,
        templates=tuple(templates),
        image_root=root,
        train=train,
        val=val,
        read_test=lambda: split_images(list_images(root, names).images)[2],
        notices=(*beside, *listing.notices, *check_class_names(names, root)),
    )


def load_generated(dataset: Dataset, root: str | Path, source: str = "dalle") -> tuple[Path, tuple[Item, ...]]:
    """Load the generated images of one of the eleven sets: `<source>_<folder>` with one list `<source>_*.json`.

    Args:
        dataset: one of the eleven sets.
        root: the data root.
        source: `dalle`, or `sd` for Stable Diffusion.

    Returns:
        The folder that the paths are relative to, and the items.

    Raises:
        DatasetError: a missing folder, no list or several, a class that is not the data set's.
    """
    if dataset.name not in LAYOUTS:
        raise DatasetError(f"{dataset.name!r} is not one of the eleven sets; read its list with `load_generated_list`")
    layout = LAYOUTS[dataset.name]
    folder_name = (layout.stable_diffusion if source == "sd" else "") or f"{source}_{layout.folder}"
    folder = _require_folder(as_path(root) / folder_name, "put the generated images there, or leave them out")
    lists = sorted(folder.glob(f"{source}_*.json"))
    if len(lists) != 1:
        names = ", ".join(path.name for path in lists) or "none"
        raise DatasetError(f"{folder} should hold one list {source}_*.json, found {names}")
    images = folder / layout.images
    image_root = images if images.is_dir() else folder
    return image_root, load_generated_list(lists[0], dataset.class_names)


def load_generated_list(path: str | Path, class_names: Sequence[str]) -> tuple[Item, ...]:
    """Read the `train` list of generated images in CoOp's format.

    Raises:
        DatasetError: a malformed list, or a label and name that differ from `class_names`.
        CafoError: the file is missing or is not JSON.
    """
    path = as_path(path)
    content = read_json(path, "give the JSON that the generate step wrote")
    entries = content.get("train", []) if isinstance(content, dict) else content
    return check_labels(_parse_items(entries, f"{path}, train"), tuple(class_names), path)


def stable_uniform(seed: int, path: str) -> float:
    """Return a pseudo-random number in [0, 1) from the hash of a seed and a path: the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _load_imagenet(folder: Path, layout: DatasetLayout, val_share: float, seed: int) -> Dataset:
    """Load `images/{train,val}/<wnid>/…` with CoOp's `classnames.txt`; the folder `val` is the test split."""
    wnids, names = _read_wnid_names(folder / "classnames.txt")
    images = _require_folder(folder / layout.images, "unpack ImageNet there")
    _require_folder(images / "train", "unpack ImageNet's training images there")
    train_folders = {f"train/{wnid}": name for wnid, name in zip(wnids, names, strict=True)}
    test_folders = {f"val/{wnid}": name for wnid, name in zip(wnids, names, strict=True)}
    listing = list_images(images, train_folders)
    items = _label_images(listing.images, train_folders)
    val = tuple(item for item in items if stable_uniform(seed, item.path) < val_share)
    train = tuple(item for item in items if stable_uniform(seed, item.path) >= val_share)
    return Dataset(
        name="imagenet",
        class_names=names,
        templates=layout.templates,
        image_root=images,
        train=train,
        val=val,
        read_test=lambda: _list_test_images(images, test_folders),
        notices=(*listing.notices, *check_class_names(names, folder / "classnames.txt", repeated=True)),
    )


def _load_shifted_imagenet(name: str, root: Path) -> Dataset:
    """Load ImageNet-V2 (folders named by class number) or ImageNet-Sketch (by wnid), with ImageNet's class list."""
    if name == "imagenet_v2":
        folder, images = root / "imagenetv2", "imagenetv2-matched-frequency-format-val"
    else:
        folder, images = root / "imagenet-sketch", "images"
    own = folder / "classnames.txt"
    wnids, names = _read_wnid_names(own if own.is_file() else root / "imagenet" / "classnames.txt")
    folders = [str(label) for label in range(len(names))] if name == "imagenet_v2" else wnids
    return Dataset(
        name=name,
        class_names=names,
        templates=IMAGENET_TEMPLATES,
        image_root=folder / images,
        train=(),
        val=(),
        read_test=lambda: _list_test_images(folder / images, dict(zip(folders, names, strict=True))),
    )


def _load_fgvc_aircraft(folder: Path, layout: DatasetLayout) -> Dataset:
    """Load FGVC-Aircraft's lists: `variants.txt`, and `images_variant_<split>.txt` of lines `<image> <variant>`."""
    names = tuple(line.strip() for line in _read_lines(folder / "variants.txt"))
    labels = {name: label for label, name in enumerate(names)}

    def read_list(split: str) -> tuple[Item, ...]:
        path = folder / f"images_variant_{split}.txt"
        items = []
        for number, line in enumerate(_read_lines(path), start=1):
            image, _, variant = line.strip().partition(" ")
            if variant not in labels:
                raise DatasetError(f"{path}, line {number}: {variant!r} is not in {folder / 'variants.txt'}")
            items.append(Item(f"{image}.jpg", labels[variant], variant))
        return tuple(items)

    return Dataset(
        name="fgvc_aircraft",
        class_names=names,
        templates=layout.templates,
        image_root=_require_folder(folder / layout.images, "unpack the images"),
        train=read_list("train"),
        val=read_list("val"),
        read_test=lambda: read_list("test"),
    )


def _require_folder(path: Path, hint: str) -> Path:
    if not path.is_dir():
        raise DatasetError(f"no folder {path}; {hint}")
    return path


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DatasetError(f"no file {path}; it comes with the data set's download")
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error


def _read_wnid_names(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read CoOp's `classnames.txt`: lines `<wnid> <name>`, where the line number is the label."""
    pairs = [line.strip().partition(" ") for line in _read_lines(path)]
    if nameless := [wnid for wnid, _, name in pairs if not name]:
        raise DatasetError(f"{path} needs lines of a wnid and a name; {nameless[0]!r} has no name")
    return tuple(wnid for wnid, _, _ in pairs), tuple(name.strip() for _, _, name in pairs)


def _label_images(images: Mapping[str, Sequence[str]], class_folders: Mapping[str, str]) -> list[Item]:
    """Return the images {folder: file names} of class folders {folder: class name}: by label, then by file name.

    The labels are the positions of the folders in the mapping.
    """
    return [
        Item(f"{folder}/{file}", label, name)
        for label, (folder, name) in enumerate(class_folders.items())
        for file in images[folder]
    ]


def _list_test_images(root: Path, class_folders: Mapping[str, str]) -> tuple[Item, ...]:
    items = _label_images(list_images(root, class_folders).images, class_folders)
    if not items:
        raise DatasetError(
            f"no test image under {root} in folders like {next(iter(class_folders))}; unpack the test images there"
        )
    return tuple(items)


def _read_split_lists(path: Path) -> dict[str, Any]:
    content = read_json(path, "download CoOp's split file, or give a split JSON")
    if not isinstance(content, dict):
        raise DatasetError(f"{path} should be an object with train, val and test, got a {type(content).__name__}")
    return content


def _parse_items(entries: Any, where: str) -> tuple[Item, ...]:
    if not isinstance(entries, list):
        raise DatasetError(f"{where} should be a list of [path, label, class name], got {type(entries).__name__}")
    items = []
    for number, entry in enumerate(entries):
        match entry:
            case [str(path), int(label), str(name)] if not isinstance(label, bool) and label >= 0:
                items.append(Item(path, label, name))
            case _:
                raise DatasetError(f"{where}, entry {number}: {entry!r} is not [path, label, class name]")
    return tuple(items)
