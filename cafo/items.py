"""One labelled image of a data set, as every list of images holds it."""

from __future__ import annotations

from typing import NamedTuple


class Item(NamedTuple):
    """One labelled image of a split."""

    path: str
    """relative to the data set's `image_root`, with forward slashes"""
    label: int
    class_name: str


def leads_out(path: str) -> bool:
    """Return whether a path leads out of the folder that it is relative to."""
    return path.startswith(("/", "\\")) or ".." in path.replace("\\", "/").split("/")
