"""Features of images on disk: encoded once by Ray Data, shared by all runs and trials.

A store is a folder for each (list of images, encoder). Its name is a fingerprint of all that the features depend on:
the path and content of each file, the encoder's identity (weights, preprocessing, precision), the views and their seed.
It consists of parts (`rayjobs.data.feature_part`) that begin at fixed positions of the list and whose files are written
atomically, the index last. So a restart encodes only the missing parts, and two runs that fill one store at once write
the same bytes.

Legend: n images, V views, C width of an encoder's features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cafo.errors import EncoderError
from rayjobs.data.config import FeaturesConfig
from rayjobs.data.feature_decoding import PartTask
from rayjobs.data.feature_encoding import encode_parts
from rayjobs.data.feature_part import FeaturePart, part_name, read_part
from rayjobs.data.image_list import ImageList
from rayjobs.data.image_source import IMAGES_PER_PART
from rayjobs.errors import DataError
from rayjobs.models.encoder import EncoderInfo, VisionEncoderConfig, load_vision_encoder, unprojected_source
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.fingerprint import file_fingerprints, fingerprint
from rayjobs.storage.paths import resolve_path

if TYPE_CHECKING:
    from cafo.encoders import ImageEncoder
    from cafo.methods.base import Projection

VIEWS_PER_PART = IMAGES_PER_PART
"""Views that are encoded and written together; at 224 pixels, 39 MB are sent from a decoding task to the encoder."""


Contents = Mapping[Path, Mapping[str, str | None]]
"""folder → path below it → fingerprint of the file"""


class RejectedImage(NamedTuple):
    """An image that could not be read."""

    role: str
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Features:
    """The features of an image list."""

    rows: tuple[int, ...]
    """positions in the list of the n images that could be read"""
    values: Mapping[str, np.ndarray]
    """encoder → (V, n, C) float32, of unit norm unless they come before an encoder's last projection"""
    rejected: tuple[RejectedImage, ...]
    stores: Mapping[str, str]
    """encoder → name of its store, which identifies everything that the features depend on"""
    contents: tuple[str | None, ...]
    """fingerprint of the file of each image of the list; None for a file that cannot be read"""


def open_encoders(
    encoders: Mapping[str, VisionEncoderConfig], unprojected: Collection[str] = ()
) -> dict[str, EncoderInfo]:
    """Return the identity and preprocessing of each encoder, by loading each once.

    Args:
        encoders: the encoders by name.
        unprojected: those whose features before the last projection are wanted too; they follow under the name that
            `unprojected_source` gives them.

    Raises:
        EncoderError: an encoder that cannot be loaded, or that has no features before a projection.
    """
    from cafo.encoders import ClipEncoder  # takes seconds, which tasks without an encoder need not spend

    infos = {}
    for name, encoder in encoders.items():
        loaded = load_vision_encoder(encoder)
        infos[name] = EncoderInfo(encoder, loaded.identity, loaded.preprocess, isinstance(loaded, ClipEncoder))
        if name in unprojected:
            _read_projection(name, loaded)
            identity = f"{loaded.identity}-unprojected"
            infos[unprojected_source(name)] = infos[name]._replace(identity=identity, unprojected=True)
    return infos


def open_projection(name: str, info: EncoderInfo) -> Projection:
    """Return the last layer of an encoder, by loading it.

    Args:
        name: the encoder's name, for the message.
        info: the encoder.

    Raises:
        EncoderError: it cannot be loaded, or does not end with one linear layer.
    """
    return _read_projection(name, load_vision_encoder(info.spec))


def _read_projection(name: str, encoder: ImageEncoder) -> Projection:
    from cafo.encoders import ClipEncoder

    if not isinstance(encoder, ClipEncoder):
        raise EncoderError(f"encoders.{name} is {encoder.name}, which is no CLIP and has no last projection to train")
    return encoder.projection


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """The stores of a set of encoders under a cache folder, and the worker pool that fills them."""

    encoders: Mapping[str, EncoderInfo]
    settings: FeaturesConfig
    cache: Path
    workers: int
    """number of actors that hold the encoders"""
    resources: Mapping[str, float]
    """resources that each actor reserves"""

    def load(self, lists: Sequence[ImageList], *, max_rejected_fraction: float | None = None) -> dict[str, Features]:
        """Return the features of each list by its role, after encoding what the stores lack.

        Args:
            lists: the images.
            max_rejected_fraction: takes the place of the setting of this name.

        Raises:
            DataError: more than `max_rejected_fraction` of the images of a list cannot be read, or a file of a store
                is damaged.
        """
        contents = _fingerprints(lists)
        folders = self._fill(lists, contents)
        features = {
            images.role: _read_features(
                images, folders[images.role], tuple(contents[images.root][item.path] for item in images.items)
            )
            for images in lists
        }
        limit = self.settings.max_rejected_fraction if max_rejected_fraction is None else max_rejected_fraction
        for images in lists:
            rejected = features[images.role].rejected
            if len(rejected) > limit * len(images.items):
                raise DataError(
                    f"{len(rejected)} of {len(images.items)} {images.role} images cannot be read, over "
                    f"features.max_rejected_fraction={limit}; restore or remove them, or raise the limit. The first: "
                    f"{rejected[0].reason}"
                )
        return features

    def fill(self, lists: Sequence[ImageList]) -> dict[str, dict[str, Path]]:
        """Encode what the stores lack, and return the folders: {role: {encoder: folder}}."""
        return self._fill(lists, _fingerprints(lists))

    def _fill(self, lists: Sequence[ImageList], contents: Contents) -> dict[str, dict[str, Path]]:
        folders = self._folders(lists, contents)
        tasks = [task for images in lists for task in self._missing_parts(images, folders[images.role])]
        if tasks:
            for folder in {folder for by_encoder in folders.values() for folder in by_encoder.values()}:
                folder.mkdir(parents=True, exist_ok=True)
            encode_parts(tasks, self.encoders, self.settings.batch, self.workers, self.resources)
        return folders

    def _folders(self, lists: Sequence[ImageList], contents: Contents) -> dict[str, dict[str, Path]]:
        """Return the folder of each list's and encoder's store, named by what the features depend on."""
        augmentation = [self.settings.seed, self.settings.min_area, self.settings.flips]
        folders = {}
        for images in lists:
            files = [[item.path, contents[images.root][item.path]] for item in images.items]
            views = [images.views, augmentation if images.views else None, VIEWS_PER_PART]
            folders[images.role] = {
                name: self.cache / "features" / fingerprint(["features", 3, encoder.identity, views, files])[:20]
                for name, encoder in self.encoders.items()
            }
        return folders

    def _missing_parts(self, images: ImageList, folders: Mapping[str, Path]) -> list[PartTask]:
        """Return a task for each part that some encoder lacks."""
        present = {name: {file.name for file in folder.glob("*.parquet")} for name, folder in folders.items()}
        starts = _part_starts(images)
        tasks = []
        for start, stop in zip(starts, [*starts[1:], len(images.items)], strict=True):
            part = part_name(start)
            outputs = {name: str(folder / part) for name, folder in folders.items() if part not in present[name]}
            if outputs:
                task = PartTask(
                    root=str(resolve_path(images.root)),
                    first=start,
                    paths=[item.path for item in images.items[start:stop]],
                    views=images.views,
                    seed=self.settings.seed,
                    min_area=self.settings.min_area,
                    flips=self.settings.flips,
                    outputs=outputs,
                )
                tasks.append(task)
        return tasks


def _fingerprints(lists: Sequence[ImageList]) -> Contents:
    """Return the fingerprint of each image's file, each file read once."""
    paths: dict[Path, list[str]] = {}
    for images in lists:
        paths.setdefault(images.root, []).extend(item.path for item in images.items)
    return {root: file_fingerprints(root, names) for root, names in paths.items()}


def _part_starts(images: ImageList) -> range:
    """Return the positions in the list at which parts begin."""
    return range(0, len(images.items), max(1, VIEWS_PER_PART // max(images.views, 1)))


def _read_features(images: ImageList, folders: Mapping[str, Path], contents: tuple[str | None, ...]) -> Features:
    """Read the features of the images that every encoder could read."""
    names, reader = [part_name(start) for start in _part_starts(images)], CountedReader()
    parts = {encoder: [read_part(str(folder / name), reader) for name in names] for encoder, folder in folders.items()}
    rejected: dict[str, RejectedImage] = {}
    for path, reason in chain.from_iterable(part.rejected for of_encoder in parts.values() for part in of_encoder):
        rejected.setdefault(path, RejectedImage(images.role, path, reason))
    readable = [{image for part in of_encoder for image in part.images} for of_encoder in parts.values()]
    common = sorted(set.intersection(*readable))
    return Features(
        rows=tuple(common),
        values={encoder: _read_values(of_encoder, common, reader) for encoder, of_encoder in parts.items()},
        rejected=tuple(rejected.values()),
        stores={encoder: folder.name for encoder, folder in folders.items()},
        contents=contents,
    )


def _read_values(parts: Sequence[FeaturePart], images: Sequence[int], reader: CountedReader) -> np.ndarray:
    """Read the features of some images from the parts of a store: (V, n, C) float32, allocated once."""
    values, position = np.empty((0, 0, 0), np.float32), 0
    for part in parts:
        if not values.size:
            values = np.empty((part.views, len(images), part.width), np.float32)
        features = part.read(reader)[np.isin(part.images, images)]  # (n of the part, V, C)
        values[:, position : position + len(features)] = features.swapaxes(0, 1)
        position += len(features)
    return values
