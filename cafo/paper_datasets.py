"""The paper's eleven data sets, ImageNet's shifted test sets, and their generated images, in CoOp's folder layout.

CaFo (arXiv 2303.02151), section 4.1. As everywhere, only `Dataset.open_test` reads a test list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cafo.class_folders import list_images
from cafo.dataset_checks import check_class_names
from cafo.dataset_layouts import IMAGENET_TEMPLATES, LAYOUTS, TEST_ONLY, DatasetLayout
from cafo.datasets import Dataset, label_images, load_generated_list, load_split, require_folder, stable_uniform
from cafo.errors import DatasetError
from cafo.files import as_path
from cafo.items import Item


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
    folder = require_folder(
        root / layout.folder,
        f"put {name} there in CoOp's layout, or set data.root (the argument `root`) to the folder that holds it",
    )
    if name == "imagenet":
        return _load_imagenet(folder, layout, val_share, seed)
    if name == "fgvc_aircraft":
        return _load_fgvc_aircraft(folder, layout)
    return load_split(
        folder / layout.split,
        require_folder(folder / layout.images, "unpack the images"),
        name=name,
        templates=layout.templates,
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
    folder = require_folder(as_path(root) / folder_name, "put the generated images there, or leave them out")
    lists = sorted(folder.glob(f"{source}_*.json"))
    if len(lists) != 1:
        names = ", ".join(path.name for path in lists) or "none"
        raise DatasetError(f"{folder} should hold one list {source}_*.json, found {names}")
    images = folder / layout.images
    image_root = images if images.is_dir() else folder
    return image_root, load_generated_list(lists[0], dataset.class_names)


def _load_imagenet(folder: Path, layout: DatasetLayout, val_share: float, seed: int) -> Dataset:
    """Load `images/{train,val}/<wnid>/…` with CoOp's `classnames.txt`; the folder `val` is the test split."""
    wnids, names = _read_wnid_names(folder / "classnames.txt")
    images = require_folder(folder / layout.images, "unpack ImageNet there")
    require_folder(images / "train", "unpack ImageNet's training images there")
    train_folders = {f"train/{wnid}": name for wnid, name in zip(wnids, names, strict=True)}
    test_folders = {f"val/{wnid}": name for wnid, name in zip(wnids, names, strict=True)}
    listing = list_images(images, train_folders)
    items = label_images(listing.images, train_folders)
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
        image_root=require_folder(folder / layout.images, "unpack the images"),
        train=read_list("train"),
        val=read_list("val"),
        read_test=lambda: read_list("test"),
    )


def _list_test_images(root: Path, class_folders: Mapping[str, str]) -> tuple[Item, ...]:
    items = label_images(list_images(root, class_folders).images, class_folders)
    if not items:
        raise DatasetError(
            f"no test image under {root} in folders like {next(iter(class_folders))}; unpack the test images there"
        )
    return tuple(items)


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
