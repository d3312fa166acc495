"""Read images that are to be predicted, in tasks of Ray Data: from files, URLs, Parquet files and tars to pixels.

A task reads one unit: some image files, a row group of a Parquet file, or a tar. It yields shards, each of at most so
many images, as it reads, so that no tar lies in memory as a whole. One unreadable image is rejected with its reason;
the rest of a file that is cut short is rejected as one.

Legend: n images of a shard, S side of an encoder's images.
"""

import json
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from typing_extensions import Self

from cafo.class_folders import is_image_name
from cafo.errors import ImageError
from cafo.images import Preprocess, load_image
from rayjobs.data.image_collection import Container, ImageFile, RejectedImage, open_parquet
from rayjobs.errors import StorageError, is_user_error
from rayjobs.storage.credentials import mask_credentials, mask_url
from rayjobs.storage.files import write_json
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.storage.paths import is_url, read_bytes, resolve_path

_REQUESTS_AT_ONCE = 16
"""images that a task fetches from URLs at the same time"""
_ATTEMPTS, _FIRST_PAUSE_S = 3, 0.5
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, pa.ArrowException)
"""errors that tell of a file's content"""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Images that one task reads: some files, a row group of a Parquet file, or a tar."""

    images: tuple[ImageFile, ...] = ()
    container: Container | None = None
    state: str = ""
    """digest of the container's size, beginning and end"""
    done: tuple[int, ...] = ()
    """numbers of the container's shards that are written"""

    @property
    def name(self) -> str:
        """The beginning of its shards' names: a digest of what it reads, so that it does not depend on other units."""
        if self.container is None:
            return f"images-{fingerprint(self.images)[:16]}"
        return f"{self.container.kind}-{fingerprint([self.container, self.state])[:16]}"

    def shard(self, number: int) -> str:
        """Return the name of a shard, without its ending."""
        return self.name if self.container is None else f"{self.name}-{number:05d}"

    def to_json(self) -> str:
        """Return the unit as text, in which Ray Data sends it: a row of it has one type for all kinds."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Unit":
        """Read what `to_json` returned."""
        values = json.loads(text)
        container = values["container"] and Container(*values["container"])
        images = tuple(ImageFile(*image) for image in values["images"])
        return cls(images=images, container=container, state=values["state"], done=tuple(values["done"]))


class Entry(NamedTuple):
    """An image that was found, on its way to be decoded."""

    source: str
    path: str
    content: bytes | str | RejectedImage
    """bytes of its file, its location, or why there is none"""


class _Shard(NamedTuple):
    """Images whose predictions are written together."""

    name: str
    entries: list[Entry]


def read_pixels(table: pa.Table, preprocess: Sequence[Preprocess], per_shard: int, counts: str) -> Iterator[pa.Table]:
    """Read a unit, and yield its shards that are not written.

    Args:
        table: one row with a `Unit` in column `unit`, as JSON.
        preprocess: each distinct preprocessing of the encoders.
        per_shard: images of a shard.
        counts: folder to which the number of a tar's images is written, as `UNIT.json`.

    Yields:
        One row for each shard: its name; `sources` and `paths` of the n images that could be read; `rejected`, the
        others, as JSON; and for each preprocessing `pixels<i>`, the bytes of (n, S, S, 3) uint8.
    """
    unit = Unit.from_json(table["unit"][0].as_py())
    for shard in _read_shards(unit, per_shard, Path(counts) if not is_url(counts) else resolve_path(counts)):
        yield _decode(shard, preprocess)


def _read_shards(unit: Unit, per_shard: int, counts: Path) -> Iterator[_Shard]:
    if unit.container is None:
        yield _Shard(unit.name, [Entry(image.source, image.path, image.location) for image in unit.images])
        return
    read = _read_tar if unit.container.kind == "tar" else _read_row_group
    images = read(unit.container, lambda number: number // per_shard in unit.done)
    entries: list[Entry] = []
    number = -1
    for number, entry in enumerate(images):
        if entry is not None:
            entries.append(entry)
        if (number + 1) % per_shard == 0:
            if entries:
                yield _Shard(unit.shard(number // per_shard), entries)
            entries = []
    if entries:
        yield _Shard(unit.shard(number // per_shard), entries)
    if unit.container.kind == "tar":
        write_json(counts / f"{unit.name}.json", {"images": number + 1})


def _read_row_group(container: Container, is_done: Callable[[int], bool]) -> Iterator[Entry | None]:
    """Yield the rows of a row group; None for those of shards that are written."""
    columns = [name for name in (container.image_column, container.path_column) if name]
    number = 0
    try:
        with _as_storage_error(container.file), open_parquet(container.file) as parquet:
            for batch in parquet.iter_batches(64, row_groups=[container.group], columns=columns):
                for row in batch.to_pylist():
                    yield None if is_done(number) else _row_entry(container, row, container.first + number)
                    number += 1
    except pa.ArrowException as error:
        reason = f"the row group is damaged ({' '.join(str(error).split())})"
        for row_number in range(number, container.images or 0):
            path = f"row {container.first + row_number}"
            rejected = RejectedImage(container.file, path, reason)
            yield None if is_done(row_number) else Entry(container.file, path, rejected)


def _row_entry(container: Container, row: dict[str, Any], number: int) -> Entry:
    value, path = row[container.image_column], row.get(container.path_column)
    path = path or f"row {number}"
    content = value["bytes"] if isinstance(value, dict) else value
    return Entry(container.file, path, content or RejectedImage(container.file, path, "its row has no bytes"))


def _read_tar(container: Container, is_done: Callable[[int], bool]) -> Iterator[Entry | None]:
    """Yield the images of a tar; None for those of shards that are written."""
    path: Any = resolve_path(container.file)
    number = 0
    try:
        with (
            _as_storage_error(container.file),
            path.open("rb") as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar,
        ):
            for member in tar:
                if not member.isfile() or not is_image_name(member.name.rpartition("/")[2]):
                    continue
                content = None if is_done(number) else tar.extractfile(member)
                yield None if content is None else Entry(container.file, member.name, content.read())
                number += 1
    except _DAMAGED as error:
        place, reason = f"after image {number}", f"the tar is cut short or damaged ({' '.join(str(error).split())})"
        if not is_done(number):
            yield Entry(container.file, place, RejectedImage(container.file, place, reason))


class _StrictTarInfo(tarfile.TarInfo):
    """A member of a tar, whose header must be whole: `tarfile` takes a damaged header for the end of the file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


@contextmanager
def _as_storage_error(file: str) -> Iterator[None]:
    """Turn an error of a disk or a network into a StorageError: the file is whole, and a later start reads it."""
    try:
        yield
    except _DAMAGED:
        raise
    except Exception as error:
        if is_user_error(error) or not (is_url(file) or isinstance(error, OSError)):
            raise
        raise StorageError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _decode(shard: _Shard, preprocess: Sequence[Preprocess]) -> pa.Table:
    """Decode a shard's images and crop them for each preprocessing."""
    read: list[tuple[str, str]] = []
    rejected: list[RejectedImage] = []
    pixels = [bytearray() for _ in preprocess]
    for entry in _fetch_all(shard.entries):
        source, path = mask_url(entry.source), mask_url(entry.path)
        if isinstance(entry.content, RejectedImage):
            rejected.append(RejectedImage(source, path, mask_credentials(entry.content.reason)))
            continue
        try:
            image = load_image(Path(entry.content) if isinstance(entry.content, str) else entry.content, name=path)
            crops = [np.asarray(kind.crop(image)).tobytes() for kind in preprocess]
        except (ImageError, OSError, MemoryError) as error:
            rejected.append(RejectedImage(source, path, str(error).removeprefix(f"{path}: ") or type(error).__name__))
            continue
        read.append((source, path))
        for buffer, crop in zip(pixels, crops, strict=True):
            buffer += crop
    columns = {f"pixels{i}": pa.array([bytes(buffer)], pa.large_binary()) for i, buffer in enumerate(pixels)}
    return pa.table(
        {
            "name": [shard.name],
            "sources": pa.array([[source for source, _ in read]], pa.list_(pa.string())),
            "paths": pa.array([[path for _, path in read]], pa.list_(pa.string())),
            "rejected": [json.dumps(rejected)],
            **columns,
        }
    )


def _fetch_all(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield the entries in order, those at URLs with their bytes, of which some are fetched ahead."""
    if not any(isinstance(entry.content, str) and is_url(entry.content) for entry in entries):
        yield from entries
        return
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        yield from pool.map(_fetch, entries)


def _fetch(entry: Entry) -> Entry:
    """Return an entry with the bytes of its URL, or with the reason why they cannot be had after several attempts."""
    if not isinstance(entry.content, str) or not is_url(entry.content):
        return entry
    for attempt in range(_ATTEMPTS):
        try:
            return entry._replace(content=read_bytes(entry.content))
        except (FileNotFoundError, PermissionError) as error:
            reason = f"cannot be fetched ({type(error).__name__})"
            break
        except Exception as error:  # every kind of storage has its own
            reason = f"cannot be fetched ({type(error).__name__}: {' '.join(str(error).split())})"
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_FIRST_PAUSE_S * 2**attempt)
    return entry._replace(content=RejectedImage(entry.source, entry.path, reason))
