"""A record's image on its way to a worker, as the bytes of float32 numbers beside its tokens.

    StoredFeatures   what the feature store holds of it: workers hold no encoder
    StreamedImages   its decoded pixels: workers hold the encoder, and training may see augmented views

Runs in Ray Data's tasks, so what takes seconds to import is imported where it is used.

F features of an image, S side of the encoder's images.
"""

from rayjobs.errors import UserError
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
import numpy as np
from rayjobs.storage.paths import resolve_path as place_of
from rayjobs.storage.files import read_parquet


STORE_IMAGES = 64
"""Images in one part of a feature store of plain views."""


class ImageSource(Protocol):
    """Where a stream of records takes its images from."""

    def read(self, source: int, place: int, epoch: int | None) -> bytes:
        """The image at a place of a source's list, in an epoch of training or, with None, as it is."""


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """Features (F,) of a store."""

    folders: Mapping[int, Path]
    """source → the store of its images"""
    lists: Path
    """JSON of {source: [path, …]}"""

    def read(self, source: int, place: int, epoch: int | None) -> bytes:
        rows, features = _part(self.folders[source] / part_name(place - place % STORE_IMAGES))
        if place not in rows:
            path = _lists(self.lists)[str(source)][place]
            raise UserError(f"{path}: could be read when records became tokens, and cannot be any more")
        return features[rows[place]].tobytes()


@dataclass(frozen=True, kw_only=True)
class StreamedImages:
    """Pixels (3, S, S), decoded when they are read."""

    lists: Path
    """JSON of {source: [path, …]}"""
    roots: Mapping[int, str]
    """source → the folder that its paths start from"""
    preprocess: Any
    """`cafo.images.Preprocess` of the encoder"""
    seed: int | None
    """Of augmented views, one to an epoch; None shows every image as it is."""
    min_area: float = 1.0
    flips: bool = False

    def read(self, source: int, place: int, epoch: int | None) -> bytes:
        path = _lists(self.lists)[str(source)][place]
        image = read_image(self.roots[source], path)
        if self.seed is None or epoch is None:
            return self.preprocess(image).numpy().tobytes()
        view = self.preprocess.view(image, path, epoch, self.seed, min_area=self.min_area, flips=self.flips)
        return view.numpy().tobytes()


def read_image(root: str, path: str) -> Any:
    """An image of a folder or URL. Raises `cafo.images.ImageError` for one that cannot be used."""
    from cafo.images import load_image

    return load_image(place_of(root) / path, name=path)


def part_name(first: int) -> str:
    """The file of a feature store's part, by the place of its first image."""
    return f"part-{first:08d}.parquet"


@lru_cache(maxsize=128)
def _part(path: Path) -> tuple[dict[int, int], np.ndarray]:
    table = read_parquet(path)
    rows = {place: row for row, place in enumerate(table["row"].to_pylist())}
    return rows, table["features"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)


@lru_cache(maxsize=4)
def _lists(path: Path) -> dict[str, list[str]]:
    return json.loads(path.read_text(encoding="utf-8"))
