"""Images of instruction records on their way to a worker: float32 values as bytes, sent beside the tokens.

    StoredFeatures   features from the feature store; the workers need no encoder
    StreamedImages   decoded pixels; the workers hold the encoder, and training may use augmented views

Both run in Ray Data tasks, so modules that take seconds to import are imported where they are used.

Legend: F features of an image, S side of the encoder's images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rayjobs.errors import DataError
from rayjobs.storage.files import read_parquet
from rayjobs.storage.hub import HubPath, hub_copy, is_hub_path
from rayjobs.storage.paths import resolve_path

IMAGES_PER_PART = 64
"""Images in one part of a feature store of plain views."""


class ImageSource(Protocol):
    """A source of the images of records."""

    def read(self, source: int, index: int, epoch: int | None) -> bytes:
        """Return image `index` of the list of a source of records, as float32 values.

        epoch: the epoch of training, which an augmented view depends on; None for the image as it is.
        """


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """Features (F,) from a feature store."""

    folders: Mapping[int, Path]
    """source → store of its images"""
    lists: Path
    """JSON of {source: [path, …]}"""

    def read(self, source: int, index: int, epoch: int | None) -> bytes:
        """Return the features of an image; the epoch does not matter.

        Raises:
            DataError: the image was readable when the records became tokens, but not when it was encoded.
        """
        rows, features = _read_part(self.folders[source] / part_name(index - index % IMAGES_PER_PART))
        if index not in rows:
            path = _read_lists(self.lists)[str(source)][index]
            raise DataError(
                f"{path}: could be read when records became tokens, but not when it was encoded; restore the file"
            )
        return features[rows[index]].tobytes()


@dataclass(frozen=True, kw_only=True)
class StreamedImages:
    """Pixels (3, S, S), decoded when they are read."""

    lists: Path
    """JSON of {source: [path, …]}"""
    roots: Mapping[int, str]
    """source → folder that its paths are relative to"""
    preprocess: Any
    """`cafo.images.Preprocess` of the encoder"""
    seed: int | None
    """seed of the augmented views, one in each epoch; None for the images as they are"""
    min_area: float = 1.0
    flips: bool = False

    def read(self, source: int, index: int, epoch: int | None) -> bytes:
        """Return the pixels of an image, or of the augmented view of an epoch.

        Raises:
            ImageError: the image cannot be read.
        """
        path = _read_lists(self.lists)[str(source)][index]
        image = read_image(self.roots[source], path)
        if self.seed is None or epoch is None:
            return self.preprocess(image).numpy().tobytes()
        view = self.preprocess.view(image, path, epoch, self.seed, min_area=self.min_area, flips=self.flips)
        return view.numpy().tobytes()


def read_image(root: str, path: str) -> Any:
    """Decode an image below a folder, a URL or a data set on the hub to a PIL image.

    Raises:
        ImageError: the image cannot be read.
    """
    from cafo.errors import ImageError
    from cafo.images import load_image

    if not is_hub_path(root):
        return load_image(resolve_path(root) / path, name=path)
    try:
        return load_image(hub_copy(HubPath.parse(f"{root}/{path}")), name=path)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file in {root}") from error


def part_name(first: int) -> str:
    """Return the file name of a feature store's part, from the index of its first image."""
    return f"part-{first:08d}.parquet"


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part of a feature store, or some columns of it, with `views` and `rejected` in the schema's metadata.

    Raises:
        DataError: the file is damaged.
    """
    try:
        return read_parquet(path, columns=columns)
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is no whole feature file ({error}); delete it, and the next run encodes its images again"
        ) from error


@lru_cache(maxsize=128)
def _read_part(path: Path) -> tuple[dict[int, int], np.ndarray]:
    """Read a part of a store of plain views: {image index: row}, and the rows (n, F)."""
    table = read_part(path)
    rows = {index: row for row, index in enumerate(table["row"].to_pylist())}
    return rows, table["features"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)


@lru_cache(maxsize=4)
def _read_lists(path: Path) -> dict[str, list[str]]:
    return json.loads(path.read_text(encoding="utf-8"))
