"""The K-shot choice: seeded, independent of file order, saved with the run.

CaFo (arXiv 2303.02151), section 4.1: K = 1, 2, 4, 8, 16 training images per class. Images are ranked within their class
by a hash of seed and path, and the first K are taken. So the order of a listing does not matter, the same seed gives
the same images on every machine, and the choices nest: K = 4 is part of K = 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cafo.datasets import Item, stable_uniform
from cafo.errors import CafoError
from cafo.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """A choice, and the classes that could not give K images."""

    shots: int
    seed: int
    items: tuple[Item, ...]
    """by label, then by rank"""
    short: dict[str, int]
    """{class name: images it has} where that is fewer than K; they are in `items` once each, never repeated"""


def choose(
    items: Sequence[Item],
    class_names: Sequence[str],
    *,
    shots: int,
    seed: int,
    short: Literal["error", "report"] = "error",
) -> FewShot:
    """K images of every class of the class list.

    Args:
        short: what to do with a class that has fewer than K images: `error`, or `report` it in the result.

    Raises:
        ValueError: a negative K, or a class with too few images under `error`.
    """
    if shots < 0:
        raise CafoError(f"shots must be at least 0, got {shots}")
    ranked: list[list[Item]] = [[] for _ in class_names]
    for item in sorted(set(items), key=lambda item: (stable_uniform(seed, item.path), item.path)):
        ranked[item.label].append(item)
    lacking = {name: len(found) for name, found in zip(class_names, ranked, strict=True) if len(found) < shots}
    if lacking and short == "error":
        listed = ", ".join(f"{name} ({count})" for name, count in list(lacking.items())[:10])
        raise CafoError(
            f"{len(lacking)} of {len(class_names)} classes have fewer than {shots} training images: {listed}; "
            "take fewer shots, or allow short classes"
        )
    chosen = tuple(item for found in ranked for item in found[:shots])
    return FewShot(shots=shots, seed=seed, items=chosen, short=lacking)


def save(choice: FewShot, path: str | Path) -> None:
    """Write the choice as JSON, whole or not at all."""
    write_json(path, asdict(choice))


def load(path: str | Path) -> FewShot:
    """Read a saved choice.

    Raises:
        ValueError: a missing or malformed file.
    """
    content = read_json(path, "give the few-shot file of an earlier run, or a seed")
    try:
        items = tuple(Item(str(file), int(label), str(name)) for file, label, name in content["items"])
        return FewShot(
            shots=int(content["shots"]), seed=int(content["seed"]), items=items, short=dict(content["short"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CafoError(f"{path} is not a few-shot choice ({error!r}); write one with `fewshot.save`") from error
