"""Data sets: class names, templates and lists of images. No image is opened here.

CaFo (arXiv 2303.02151), section 4.1: eleven sets in CoOp's layout under one data root, few-shot splits from CoOp's
`split_zhou_*.json`, `{"train" | "val" | "test": [[path relative to the images, label, class name], …]}`.

Two rules hold for every reader. The width N of all predictions is the length of the class list, whatever labels
occur. And the test list is read by `open_test` alone: nothing else notices whether test files exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cafo.errors import CafoError
from cafo.files import as_path, read_json

PHOTO = ("a photo of a {}.",)

IMAGENET_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""CLIP's seven templates for ImageNet."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


class Item(NamedTuple):
    """One image of a split."""

    path: str
    """relative to the data set's `image_root`, with forward slashes"""
    label: int
    class_name: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set whose train and val lists are known and whose test list is still closed."""

    name: str
    class_names: tuple[str, ...]
    """the N classes; label n is class_names[n]"""
    templates: tuple[str, ...]
    """sentences with one `{}` for the class name"""
    image_root: Path
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    read_test: Callable[[], tuple[Item, ...]] = field(repr=False, compare=False)

    def open_test(self) -> tuple[Item, ...]:
        """Read the test list. Only an evaluation should.

        Raises:
            ValueError: the list is missing or malformed, or has a class that the class list has not.
        """
        return self.read_test()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where one of the eleven sets lies under the data root."""

    folder: str
    images: str
    split: str = ""
    templates: tuple[str, ...] = PHOTO
    stable_diffusion: str = ""
    """folder of Stable Diffusion's images where it is not `sd_<folder>`"""


LAYOUTS: Mapping[str, Layout] = {
    "imagenet": Layout(folder="imagenet", images="images", templates=IMAGENET_TEMPLATES),
    "stanford_cars": Layout(folder="stanford_cars", images="", split="split_zhou_StanfordCars.json"),
    "ucf101": Layout(
        folder="ucf101",
        images="UCF-101-midframes",
        split="split_zhou_UCF101.json",
        templates=("a photo of a person doing {}.",),
    ),
    "caltech101": Layout(
        folder="caltech-101",
        images="101_ObjectCategories",
        split="split_zhou_Caltech101.json",
        stable_diffusion="sd_caltech_101",
    ),
    "oxford_flowers": Layout(
        folder="oxford_flowers",
        images="jpg",
        split="split_zhou_OxfordFlowers.json",
        templates=("a photo of a {}, a type of flower.",),
    ),
    "sun397": Layout(folder="sun397", images="SUN397", split="split_zhou_SUN397.json"),
    "dtd": Layout(
        folder="dtd", images="images", split="split_zhou_DescribableTextures.json", templates=("{} texture.",)
    ),
    "eurosat": Layout(
        folder="eurosat",
        images="2750",
        split="split_zhou_EuroSAT.json",
        templates=("a centered satellite photo of {}.",),
    ),
    "fgvc_aircraft": Layout(
        folder="fgvc_aircraft", images="images", templates=("a photo of a {}, a type of aircraft.",)
    ),
    "oxford_pets": Layout(
        folder="oxford_pets",
        images="images",
        split="split_zhou_OxfordPets.json",
        templates=("a photo of a {}, a type of pet.",),
    ),
    "food101": Layout(
        folder="food-101",
        images="images",
        split="split_zhou_Food101.json",
        templates=("a photo of {}, a type of food.",),
    ),
}

TEST_ONLY = ("imagenet_v2", "imagenet_sketch")
"""Targets of the distribution shift: trained on ImageNet, tested here."""


def load_dataset(name: str, root: str | Path, *, val_share: float = 0.01, seed: int = 0) -> Dataset:
    """One of the eleven sets, or a test-only target, under the data root.

    Args:
        val_share: of ImageNet's train images, carved out for validation (its own `val` folder is the test split).
        seed: of that carving.

    Raises:
        ValueError: an unknown name; a missing root, folder or list; a malformed list.
    """
    root = as_path(root)
    if name in TEST_ONLY:
        return _imagenet_target(name, root)
    if name not in LAYOUTS:
        raise CafoError(f"no data set called {name!r}; there are {', '.join([*LAYOUTS, *TEST_ONLY])}")
    layout = LAYOUTS[name]
    folder = _existing(root / layout.folder, f"put {name} in CoOp's layout under the data root, or give another root")
    if name == "imagenet":
        return _imagenet(folder, layout, val_share, seed)
    if name == "fgvc_aircraft":
        return _fgvc(folder, layout)
    return load_split(
        folder / layout.split,
        _existing(folder / layout.images, "unpack the images"),
        name=name,
        templates=layout.templates,
    )


def load_split(
    split: str | Path,
    image_root: str | Path,
    *,
    name: str = "",
    templates: Sequence[str] = PHOTO,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Any CoOp-style split file.

    Args:
        class_names: the class list; without it, the (label, name) pairs of train and val, which must leave no gap.

    Raises:
        ValueError: a missing or malformed file, labels with two names or with gaps, a label outside the class list.
    """
    split = as_path(split)
    content = _splits(split)
    lists = {part: _items(content.get(part, []), f"{split}, {part}") for part in ("train", "val")}
    if not lists["train"] and not lists["val"]:
        raise CafoError(f"{split} lists no train and no val image; a test-only set needs no split file of its own")
    names = tuple(class_names) if class_names is not None else _class_list([*lists["train"], *lists["val"]], split)

    def read_test() -> tuple[Item, ...]:
        now = _splits(split)
        if "test" not in now:
            raise CafoError(f"{split} has no test list; an evaluation needs one")
        return _fitting(_items(now["test"], f"{split}, test"), names, split)

    return Dataset(
        name=name or split.stem,
        class_names=names,
        templates=tuple(templates),
        image_root=_existing(as_path(image_root), "give the folder that the paths of the split are relative to"),
        train=_fitting(lists["train"], names, split),
        val=_fitting(lists["val"], names, split),
        read_test=read_test,
    )


def load_tree(
    root: str | Path,
    *,
    name: str = "",
    templates: Sequence[str] = PHOTO,
    seed: int = 0,
    shares: tuple[float, float] = (0.5, 0.2),
) -> Dataset:
    """A plain tree with one folder per class, split by seed into train, val and test.

    Each image's split follows from the seed and its own path only: not from the order of the listing, nor from which
    other images are there, so deleting the test images moves none of the others. The shares hold on average.

    Args:
        shares: of train and val; the rest is test.

    Raises:
        ValueError: no such folder, no class folders, or shares that are no shares.
    """
    root = _existing(as_path(root), "give the folder that holds one folder per class")
    if min(shares) < 0 or sum(shares) > 1:
        raise CafoError(f"shares of train and val must be at least 0 and add up to at most 1, got {shares}")
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise CafoError(f"{root} has no class folders; give the folder that holds one folder per class")
    ends = (shares[0], shares[0] + shares[1])

    def parts() -> list[tuple[Item, ...]]:
        items = _listing(root, {n: n for n in names}, names)
        drawn = [(sum(stable_uniform(seed, item.path) >= end for end in ends), item) for item in items]
        return [tuple(item for part, item in drawn if part == wanted) for wanted in range(3)]

    train, val, _ = parts()
    return Dataset(
        name=name or root.name,
        class_names=names,
        templates=tuple(templates),
        image_root=root,
        train=train,
        val=val,
        read_test=lambda: parts()[2],
    )


def load_generated(dataset: Dataset, root: str | Path, source: str = "dalle") -> tuple[Path, tuple[Item, ...]]:
    """The generated images of one of the eleven sets: `<source>_<folder>` with one `<source>_*.json` in CoOp's format.

    Returns:
        The folder that the paths are relative to, and the items.

    Raises:
        ValueError: a missing folder, none or several lists, a class that the data set has not.
    """
    if dataset.name not in LAYOUTS:
        raise CafoError(f"{dataset.name!r} is not one of the eleven sets; read its list with `load_generated_list`")
    layout = LAYOUTS[dataset.name]
    named = layout.stable_diffusion if source == "sd" else ""
    way_out = "put the generated images there, or leave them out"
    folder = _existing(as_path(root) / (named or f"{source}_{layout.folder}"), way_out)
    lists = sorted(folder.glob(f"{source}_*.json"))
    if len(lists) != 1:
        found = ", ".join(path.name for path in lists) or "none"
        raise CafoError(f"{folder} should hold one list {source}_*.json, found {found}")
    inner = folder / layout.images
    image_root = inner if inner.is_dir() else folder
    return image_root, load_generated_list(lists[0], dataset.class_names)


def load_generated_list(path: str | Path, class_names: Sequence[str]) -> tuple[Item, ...]:
    """A CoOp-style list of generated images: its `train` entries, checked against the class list."""
    path = as_path(path)
    content = read_json(path, "give the JSON that the generate step wrote")
    entries = content.get("train", []) if isinstance(content, dict) else content
    return _fitting(_items(entries, f"{path}, train"), tuple(class_names), path)


def stable_uniform(seed: int, path: str) -> float:
    """A number in [0, 1) from a seed and a path, the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _imagenet(folder: Path, layout: Layout, val_share: float, seed: int) -> Dataset:
    """`images/{train,val}/<wnid>/…` with CoOp's `classnames.txt`; its val folder is the test split, as everywhere."""
    wnids, names = _wnid_names(folder / "classnames.txt")
    images = _existing(folder / layout.images, "unpack ImageNet there")
    ids = {f"train/{wnid}": name for wnid, name in zip(wnids, names, strict=True)}
    _existing(images / "train", "unpack ImageNet's training images there")
    items = _listing(images, ids, names)
    held_out = [stable_uniform(seed, item.path) < val_share for item in items]
    return Dataset(
        name="imagenet",
        class_names=names,
        templates=layout.templates,
        image_root=images,
        train=tuple(item for item, out in zip(items, held_out, strict=True) if not out),
        val=tuple(item for item, out in zip(items, held_out, strict=True) if out),
        read_test=lambda: _test_listing(images, {f"val/{w}": n for w, n in zip(wnids, names, strict=True)}, names),
    )


def _imagenet_target(name: str, root: Path) -> Dataset:
    """ImageNet-V2 (folders named by class number) and ImageNet-Sketch (by wnid), classes in ImageNet's order."""
    if name == "imagenet_v2":
        folder, images = root / "imagenetv2", "imagenetv2-matched-frequency-format-val"
    else:
        folder, images = root / "imagenet-sketch", "images"
    own = folder / "classnames.txt"
    wnids, names = _wnid_names(own if own.is_file() else root / "imagenet" / "classnames.txt")
    folders = [str(label) for label in range(len(names))] if name == "imagenet_v2" else wnids
    return Dataset(
        name=name,
        class_names=names,
        templates=IMAGENET_TEMPLATES,
        image_root=folder / images,
        train=(),
        val=(),
        read_test=lambda: _test_listing(folder / images, dict(zip(folders, names, strict=True)), names),
    )


def _fgvc(folder: Path, layout: Layout) -> Dataset:
    """FGVC-Aircraft's own lists: `variants.txt`, and `images_variant_<split>.txt` with lines `<image> <variant>`."""
    names = tuple(line.strip() for line in _lines(folder / "variants.txt"))
    labels = {name: label for label, name in enumerate(names)}

    def part(split: str) -> tuple[Item, ...]:
        path = folder / f"images_variant_{split}.txt"
        items = []
        for number, line in enumerate(_lines(path), start=1):
            image, _, variant = line.strip().partition(" ")
            if variant not in labels:
                raise CafoError(f"{path}, line {number}: {variant!r} is not in {folder / 'variants.txt'}")
            items.append(Item(f"{image}.jpg", labels[variant], variant))
        return tuple(items)

    return Dataset(
        name="fgvc_aircraft",
        class_names=names,
        templates=layout.templates,
        image_root=_existing(folder / layout.images, "unpack the images"),
        train=part("train"),
        val=part("val"),
        read_test=lambda: part("test"),
    )


def _existing(path: Path, way_out: str) -> Path:
    if not path.is_dir():
        raise CafoError(f"no folder {path}; {way_out}")
    return path


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise CafoError(f"no file {path}; it comes with the data set's download")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _wnid_names(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """CoOp's `classnames.txt`: lines `<wnid> <name>`; the line number is the label."""
    pairs = [line.strip().partition(" ") for line in _lines(path)]
    if bad := [wnid for wnid, _, name in pairs if not name]:
        raise CafoError(f"{path} needs lines of a wnid and a name; {bad[0]!r} stands alone")
    return tuple(wnid for wnid, _, _ in pairs), tuple(name.strip() for _, _, name in pairs)


def _listing(root: Path, folders: Mapping[str, str], names: Sequence[str]) -> list[Item]:
    """All images of class folders {relative folder: class name}, given in label order; sorted by path within a
    class."""
    items = []
    for label, (folder, name) in enumerate(folders.items()):
        with suppress(FileNotFoundError, NotADirectoryError):
            files = sorted(p.name for p in (root / folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            items += [Item(f"{folder}/{file}", label, name) for file in files if not file.startswith(".")]
    assert len(folders) == len(names)
    return items


def _test_listing(root: Path, folders: Mapping[str, str], names: Sequence[str]) -> tuple[Item, ...]:
    items = _listing(root, folders, names)
    if not items:
        raise CafoError(
            f"no test image under {root} in folders like {next(iter(folders))}; unpack the test images there"
        )
    return tuple(items)


def _splits(path: Path) -> dict[str, Any]:
    content = read_json(path, "download CoOp's split file, or give a split JSON")
    if not isinstance(content, dict):
        raise CafoError(f"{path} should be an object with train, val and test, got a {type(content).__name__}")
    return content


def _items(entries: Any, where: str) -> tuple[Item, ...]:
    if not isinstance(entries, list):
        raise CafoError(f"{where} should be a list of [path, label, class name], got {type(entries).__name__}")
    items = []
    for number, entry in enumerate(entries):
        match entry:
            case [str(path), int(label), str(name)] if not isinstance(label, bool) and label >= 0:
                items.append(Item(path, label, name))
            case _:
                raise CafoError(f"{where}, entry {number}: {entry!r} is not [path, label, class name]")
    return tuple(items)


def _class_list(items: Iterable[Item], where: Path) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for item in items:
        if names.setdefault(item.label, item.class_name) != item.class_name:
            raise CafoError(
                f"{where} gives label {item.label} two names: {names[item.label]!r} and {item.class_name!r} "
                f"({item.path})"
            )
    if gaps := sorted(set(range(len(names))) - set(names)):
        raise CafoError(f"{where} has no train or val image of label {gaps[0]}; give the class list as `class_names`")
    return tuple(names[label] for label in range(len(names)))


def _fitting(items: tuple[Item, ...], names: Sequence[str], where: Path) -> tuple[Item, ...]:
    for item in items:
        if item.label >= len(names) or names[item.label] != item.class_name:
            known = repr(names[item.label]) if item.label < len(names) else f"beyond the {len(names)} classes"
            raise CafoError(
                f"{where}: {item.path} has label {item.label} and class {item.class_name!r}, "
                f"but that label is {known} in the class list"
            )
    return items
