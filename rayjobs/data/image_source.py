"""Images of instruction records on their way to a worker: float32 values as bytes, sent beside the tokens.

    StoredFeatures   features from the feature store; the workers need no encoder
    StreamedImages   decoded pixels; the workers hold the encoder, and training may use augmented views

A worker reads the features, or the file, of each image that it trains on, and nothing of the others. Both run in Ray
Data tasks, so modules that take seconds to import are imported where they are used.

Legend: F features of an image, S side of the encoder's images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from rayjobs.data.feature_part import FeaturePart, part_name, read_part
from rayjobs.errors import DataError
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.hub import HubPath, hub_copy, is_hub_path
from rayjobs.storage.paths import is_url, read_bytes, resolve_path

IMAGES_PER_PART = 64
"""Images in one part of a feature store of plain views."""


class ImageReader(Protocol):
    """Reads images of records."""

    def read(self, images: Sequence[tuple[int, int]], epoch: int | None) -> list[bytes]:
        """Return images as float32 values.

        images: (source of records, index in its list) of each. epoch: the epoch of training, which an augmented view
        depends on; None for the images as they are.
        """


class ImageSource(Protocol):
    """A source of the images of records."""

    def open(self, reader: CountedReader) -> ImageReader:
        """Return a reader of the images that counts in `reader` the bytes that it reads."""


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """Features (F,) from a feature store."""

    folders: Mapping[int, Path]
    """source → store of its images"""
    lists: Path
    """JSON of {source: [path, …]}"""

    def open(self, reader: CountedReader) -> ImageReader:
        """Return a reader of the features."""
        return StoredFeatureReader(self, reader)


class StoredFeatureReader:
    """Reads features from a feature store, and the index of each part once."""

    def __init__(self, source: StoredFeatures, reader: CountedReader) -> None:
        self.source, self.reader = source, reader
        self._parts: dict[Path, tuple[FeaturePart, dict[int, int]]] = {}

    def read(self, images: Sequence[tuple[int, int]], epoch: int | None) -> list[bytes]:
        """Return the features of images; the epoch does not matter.

        Raises:
            StorageError: a file of the store cannot be read.
            DataError: an image was readable when the records became tokens, but not when it was encoded; or a file of
                the store is damaged.
        """
        paths, rows = [], dict[Path, list[int]]()
        for source, index in images:
            path = self.source.folders[source] / part_name(index - index % IMAGES_PER_PART)
            part_rows = self._open(path)[1]
            if index not in part_rows:
                name = _read_lists(self.source.lists)[str(source)][index]
                raise DataError(
                    f"{name}: could be read when records became tokens, but not when it was encoded; restore the file"
                )
            rows.setdefault(path, []).append(part_rows[index])
            paths.append(path)
        features = {path: iter(self._open(path)[0].read_rows(of_part, self.reader)) for path, of_part in rows.items()}
        return [next(features[path]) for path in paths]

    def _open(self, path: Path) -> tuple[FeaturePart, dict[int, int]]:
        """Return a part and {index of an image: its row}."""
        if path not in self._parts:
            part = read_part(str(path), self.reader)
            self._parts[path] = part, {index: row for row, index in enumerate(part.images)}
        return self._parts[path]


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

    def open(self, reader: CountedReader) -> ImageReader:
        """Return a reader of the pixels."""
        return StreamedImageReader(self, reader)


class StreamedImageReader:
    """Decodes images."""

    def __init__(self, source: StreamedImages, reader: CountedReader) -> None:
        self.source, self.reader = source, reader

    def read(self, images: Sequence[tuple[int, int]], epoch: int | None) -> list[bytes]:
        """Return the pixels of images, or of the augmented views of an epoch.

        Raises:
            ImageError: an image cannot be read.
        """
        lists = _read_lists(self.source.lists)
        return [self._read(source, lists[str(source)][index], epoch) for source, index in images]

    def _read(self, source: int, path: str, epoch: int | None) -> bytes:
        settings = self.source
        image = read_image(settings.roots[source], path, self.reader)
        if settings.seed is None or epoch is None:
            return settings.preprocess(image).numpy().tobytes()
        view = settings.preprocess.view(
            image, path, epoch, settings.seed, min_area=settings.min_area, flips=settings.flips
        )
        return view.numpy().tobytes()


def read_image(root: str, path: str, reader: CountedReader) -> Any:
    """Decode an image below a folder, a URL or a data set on the hub to a PIL image.

    Args:
        root: the folder, URL or data set.
        path: path of the image below it.
        reader: counts the bytes of the file.

    Raises:
        ImageError: the image cannot be read.
    """
    from cafo.errors import ImageError
    from cafo.images import load_image

    try:
        file = hub_copy(HubPath.parse(f"{root}/{path}")) if is_hub_path(root) else resolve_path(root) / path
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file in {root}") from error
    if is_url(file):
        remote: Any = _RemoteFile(file, reader)
        return load_image(remote, name=path)
    image = load_image(file, name=path)
    reader.bytes += file.stat().st_size
    return image


@dataclass(frozen=True)
class _RemoteFile:
    """A file at a URL, as `load_image` reads it."""

    path: Path
    reader: CountedReader

    def read_bytes(self) -> bytes:
        """Return the whole file, and count its bytes."""
        content = read_bytes(self.path)
        self.reader.bytes += len(content)
        return content


@lru_cache(maxsize=4)
def _read_lists(path: Path) -> dict[str, list[str]]:
    return json.loads(path.read_text(encoding="utf-8"))
