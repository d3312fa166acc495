"""Parts of a feature store on disk, in which the features of single images can be read.

A part is two files. `NAME.parquet` is its index, with a row for each image that could be read, and the shape of the
features and the images that could not be read in the metadata of its schema. `NAME.bin` holds the features, float32 of
least byte first: those of all views of an image, one image after the other.

Legend: n images of a part, V views, C width of an encoder's features.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from adapter.json_object import parse_json
from rayjobs.errors import DataError
from rayjobs.storage.counted_reader import CountedReader
from rayjobs.storage.files import parse_index, values_path, whole_index, write_bytes, write_index

VALUE = np.dtype("<f4")


@dataclass(frozen=True, kw_only=True)
class FeaturePart:
    """The index of a part."""

    path: str
    """path of the index"""
    images: tuple[int, ...]
    """positions in the image list of the n images that could be read"""
    views: int
    """V"""
    width: int
    """C"""
    rejected: tuple[tuple[str, str], ...]
    """(path, reason) of each image that could not be read"""

    @property
    def bytes_per_image(self) -> int:
        """Size of an image's features."""
        return self.views * self.width * VALUE.itemsize

    def read_rows(self, rows: Sequence[int], reader: CountedReader) -> list[bytes]:
        """Return the features of single images, (V, C) float32 as bytes, by their rows in the index.

        Raises:
            StorageError: the file cannot be read.
            DataError: the file was cut short.
        """
        size = self.bytes_per_image
        return reader.read_ranges(values_path(self.path), [(row * size, (row + 1) * size) for row in rows])

    def read(self, reader: CountedReader) -> np.ndarray:
        """Return the features of all images, (n, V, C) float32.

        Raises:
            StorageError: the file cannot be read.
            DataError: the file is damaged.
        """
        path = values_path(self.path)
        content = reader.read(path)
        if len(content) != len(self.images) * self.bytes_per_image:
            raise DataError(
                f"{path} is no whole feature file (of {len(content):,} bytes, not of "
                f"{len(self.images) * self.bytes_per_image:,}); delete the folder {path.rpartition('/')[0]}, and the "
                "next run encodes its images again"
            )
        return np.frombuffer(content, VALUE).reshape(len(self.images), self.views, self.width)


def part_name(first: int) -> str:
    """Return the file name of a part's index, from the position of its first image in the list."""
    return f"part-{first:08d}.parquet"


def write_part(
    path: str, images: Sequence[int], features: np.ndarray, views: int, rejected: Sequence[tuple[str, str]]
) -> None:
    """Write the two files of a part, the index last.

    Args:
        path: path of the index.
        images: positions in the list of the n images that could be read.
        features: their features, (n * V, C) float32.
        views: V.
        rejected: (path, reason) of each image that could not be read.
    """
    write_bytes(values_path(path), features.astype(VALUE, copy=False).tobytes())
    metadata = {"views": str(views), "width": str(features.shape[1]), "rejected": json.dumps(list(rejected))}
    write_index(path, pa.table({"row": pa.array(images, pa.int64())}).replace_schema_metadata(metadata))


def read_part(path: str, reader: CountedReader) -> FeaturePart:
    """Read the index of a part.

    Raises:
        StorageError: the file cannot be read.
        DataError: the file is damaged.
    """
    table = parse_index(reader.read(path), path)
    with whole_index(path):
        metadata = table.schema.metadata
        return FeaturePart(
            path=path,
            images=tuple(table["row"].to_pylist()),
            views=int(metadata[b"views"]),
            width=int(metadata[b"width"]),
            rejected=tuple((name, reason) for name, reason in parse_json(metadata[b"rejected"])),
        )
