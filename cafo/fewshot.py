"""Choose K training images of each class by a seed, independently of the order of files.

CaFo (arXiv 2303.02151), section 4.1: K = 1, 2, 4, 8, 16 training images per class. Images are ranked within their class
by a hash of seed and path, and the first K are taken. So the order of a listing does not matter, the same seed gives
the same images on every machine, and choices of one seed nest: K = 4 is part of K = 8.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cafo.datasets import stable_uniform
from cafo.errors import CafoError, DatasetError, refuse_text
from cafo.files import read_json, write_json
from cafo.items import Item, leads_out


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A few-shot choice, and the classes that have fewer than K images."""

    shots: int
    seed: int
    items: tuple[Item, ...]
    """by label, then by rank"""
    short: dict[str, int]
    """{class name: number of images} of the classes with fewer than K; their images are in `items` once each"""


def choose(
    items: Sequence[Item],
    class_names: Sequence[str],
    *,
    shots: int,
    seed: int,
    short: Literal["error", "report"] = "error",
    unreadable: Collection[str] = (),
    ranked: Sequence[Sequence[Item]] | None = None,
) -> FewShot:
    """Choose K images of every class of the class list.

    An image that turned out to be unreadable gives way to the next of its class; all others stay as they are.

    Args:
        items: the training images.
        class_names: the class list; label n is class_names[n].
        shots: K.
        seed: seed of the choice.
        short: what to do with a class that has fewer than K images: raise an error, or report it in the result.
        unreadable: paths that are not chosen.
        ranked: what `rank` returns for these images, seed and unreadable paths, if it is known already.

    Raises:
        CafoError: K is negative.
        DatasetError: a class has fewer than K images and `short` is `error`.
    """
    refuse_text(class_names, "class_names")
    if shots < 0:
        raise CafoError(f"shots must be at least 0, got {shots}")
    if ranked is None:
        ranked = rank(items, class_names, seed=seed, unreadable=unreadable)
    counts = {name: len(images) for name, images in zip(class_names, ranked, strict=True)}
    lacking = {name: count for name, count in counts.items() if count < shots}
    if lacking and short == "error":
        listed = ", ".join(f"{name} ({count})" for name, count in list(lacking.items())[:10])
        raise DatasetError(
            f"{len(lacking)} of {len(class_names)} classes have fewer than {shots} training images: {listed}; "
            f"take fewer shots, or allow short classes (data.short_classes=report; the argument `short`)"
            f"{_name_unreadable(items, set(lacking), unreadable)}"
        )
    chosen = tuple(item for images in ranked for item in images[:shots])
    return FewShot(shots=shots, seed=seed, items=chosen, short=lacking)


def rank(
    items: Sequence[Item], class_names: Sequence[str], *, seed: int, unreadable: Collection[str] = ()
) -> list[list[Item]]:
    """Return the images of each class in the order in which a seed chooses them, without the unreadable ones."""
    ranked: list[list[Item]] = [[] for _ in class_names]
    for item in sorted(set(items), key=lambda item: (stable_uniform(seed, item.path), item.path)):
        if item.path not in unreadable:
            ranked[item.label].append(item)
    return ranked


def _name_unreadable(items: Sequence[Item], classes: Collection[str], unreadable: Collection[str]) -> str:
    paths = sorted({item.path for item in items if item.class_name in classes and item.path in unreadable})
    if not paths:
        return ""
    listed = ", ".join(paths[:10]) + (" …" if len(paths) > 10 else "")
    return f"; or restore the images of these classes that cannot be read: {listed}"


def save(choice: FewShot, path: str | Path) -> None:
    """Write a choice as JSON, atomically."""
    write_json(path, asdict(choice))


def load(path: str | Path, class_names: Sequence[str]) -> FewShot:
    """Read a choice that `save` wrote.

    Args:
        path: the file.
        class_names: the class list now. An image has the label of its class's name, wherever the class stood when the
            choice was made.

    Raises:
        CafoError: the file is missing or malformed.
        DatasetError: images of a class that is not in the class list.
    """
    refuse_text(class_names, "class_names")
    content = read_json(path, "give the few-shot file of an earlier run, or a seed")
    label_of = {name: label for label, name in enumerate(class_names)}
    try:
        chosen = [(str(file), str(name)) for file, _, name in content["items"]]
        shots, seed, short = int(content["shots"]), int(content["seed"]), dict(content["short"])
    except (KeyError, TypeError, ValueError) as error:
        raise CafoError(f"{path} is not a few-shot choice ({error!r}); write one with `fewshot.save`") from error
    if strangers := sorted({name for _, name in chosen} - set(label_of)):
        raise DatasetError(
            f"{path} has images of {', '.join(strangers[:5])}, and the class list has no such class; choose again"
        )
    if outside := [file for file, _ in chosen if leads_out(file)]:
        raise CafoError(f"{path}: {outside[0]!r} leads out of the folder of the images; choose again")
    items = sorted((Item(file, label_of[name], name) for file, name in chosen), key=lambda item: item.label)
    return FewShot(shots=shots, seed=seed, items=tuple(items), short=short)
