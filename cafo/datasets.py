"""Data sets of labelled images: the class, and the reader of split files. No image is opened here.

CaFo (arXiv 2303.02151), section 4.1. The paper's own sets are in `cafo.paper_datasets`, folders of images in
`cafo.image_trees`. Few-shot splits are CoOp's `split_zhou_*.json`: `{"train" | "val" | "test": [[path relative to the
images, label, class name], …]}`.

Two rules hold for every reader:
- The number of classes N is the length of the class list, whatever labels occur in the split.
- Only `Dataset.open_test` reads the test list. Nothing else depends on whether test files exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cafo.dataset_checks import check_class_names, check_disjoint, check_items, check_labels, infer_classes
from cafo.dataset_layouts import PHOTO_TEMPLATES, check_templates
from cafo.errors import DatasetError, refuse_text
from cafo.files import as_path, read_json
from cafo.items import Item, leads_out


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
    """notices for the user, such as files that were ignored; one sentence each"""

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
        image_root=require_folder(as_path(image_root), "give the folder that the paths of the split are relative to"),
        train=check_labels(lists["train"], names, split),
        val=check_labels(lists["val"], names, split),
        read_test=read_test,
        notices=check_class_names(names, split),
    )


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


def require_folder(path: Path, hint: str) -> Path:
    """Return the path of a folder. Raises DatasetError, which ends with the hint, if there is none."""
    if not path.is_dir():
        raise DatasetError(f"no folder {path}; {hint}")
    return path


def label_images(images: Mapping[str, Sequence[str]], class_folders: Mapping[str, str]) -> list[Item]:
    """Return the images {folder: file names} of class folders {folder: class name}: by label, then by file name.

    The labels are the positions of the folders in the mapping.
    """
    return [
        Item(f"{folder}/{file}", label, name)
        for label, (folder, name) in enumerate(class_folders.items())
        for file in images[folder]
    ]


def stable_uniform(seed: int, path: str) -> float:
    """Return a pseudo-random number in [0, 1) from the hash of a seed and a path: the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
                if leads_out(path):
                    raise DatasetError(
                        f"{where}, entry {number}: {path!r} leads out of the folder of the images; give a path below it"
                    )
                items.append(Item(path, label, name))
            case _:
                raise DatasetError(f"{where}, entry {number}: {entry!r} is not [path, label, class name]")
    return tuple(items)
