"""Find the images that a job is to predict: in folders, patterns, URLs, Parquet files, WebDataset tars and lists.

An image is named by its source (the folder, list, Parquet file or tar that it is in) and its path in that source. What
is listed here is cheap: names of files, the paths of lists, and the number of rows of Parquet files. Images that lie
inside of Parquet files and tars are found where they are read (`rayjobs.data.image_reading`).
"""

from __future__ import annotations

import csv
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from cafo.class_folders import is_image_name, is_utf8, readable
from rayjobs.config import config
from rayjobs.data.record_files import is_pattern
from rayjobs.errors import ConfigError, DataError, is_user_error
from rayjobs.storage.download import cached_path
from rayjobs.storage.hub import is_hub_path
from rayjobs.storage.paths import AnyPath, is_url, resolve_path

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Kind = Literal["image", "list", "parquet", "tar"]

LISTS, TARS = {".csv": ",", ".tsv": "\t"}, (".tar", ".tar.gz", ".tgz")
"""endings of lists with their separators, and of WebDataset's files"""
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "url", "image_url")
_SHOWN = 5


class ImageFile(NamedTuple):
    """An image in a file of its own."""

    source: str
    """the folder, or the list that names it"""
    path: str
    """path below the folder, or as the list has it"""
    location: str
    """local path or URL of the file"""


class Container(NamedTuple):
    """A part of a file that holds images: a tar, or a row group of a Parquet file."""

    kind: Kind
    """`parquet` or `tar`"""
    file: str
    """local path or URL"""
    group: int = 0
    """number of the row group"""
    first: int = 0
    """row of the file at which the row group begins"""
    images: int | None = None
    """rows of the row group; None for a tar, whose images nobody has counted"""
    image_column: str = ""
    """column of the bytes, or of structs with `bytes`"""
    path_column: str = ""
    """column that names the images; empty for the number of the row"""


class RejectedImage(NamedTuple):
    """An image that cannot be predicted."""

    source: str
    path: str
    reason: str


@dataclass
class Collection:
    """Images that a job is to predict."""

    images: list[ImageFile] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    rejected: list[RejectedImage] = field(default_factory=list)
    """lines of lists that name no image"""
    ignored: Counter[str] = field(default_factory=Counter)
    """ending → files of folders that are no images"""

    def describe(self) -> str:
        """Describe how much was found, and what was ignored, in a line."""
        rows, tars = (
            [c.images for c in self.containers if c.images is not None],
            sum(c.kind == "tar" for c in self.containers),
        )
        counts = [(len(self.images), "images"), (sum(rows), "rows of Parquet files"), (tars, "tars")]
        text = ", ".join(f"{count:,} {name}" for count, name in counts if count) or "no image"
        if self.ignored:
            ranked = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
            kinds = ", ".join(f"{ending}: {count}" for ending, count in ranked[:_SHOWN])
            text += f"; {self.ignored.total():,} other files are ignored ({kinds})"
        return text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


@config
class ImageCollectionConfig:
    """Images without labels."""

    path: Annotated[list[AnyPath], BeforeValidator(_as_list)] = Field(min_length=1)
    """Images, folders of images, patterns such as `photos/**/*.jpg`, lists (.csv, .tsv with a header), Parquet files
    with bytes or paths, WebDataset tars (.tar, .tar.gz, .tgz), and folders of such Parquet files and tars; local or at
    URLs."""
    columns: dict[Literal["image", "path"], str] = Field(default_factory=dict)
    """{column: its name}, where it is not found by its name: `path` of a list or a Parquet file, which may hold URLs;
    `image` of a Parquet file, with bytes or with structs of `bytes`."""
    root: AnyPath | None = None
    """Folder that relative paths of lists and Parquet files start from; null for the folder of the file."""

    def find(self) -> Collection:
        """Find the images, each file once.

        Raises:
            ConfigError: a path of a kind that cannot be read.
            DataError: a path with no image, or a list or Parquet file that cannot be read.
        """
        found = Collection()
        for path in self.path:
            before = len(found.images) + len(found.containers) + len(found.rejected)
            self._add(path, found)
            if before == len(found.images) + len(found.containers) + len(found.rejected):
                raise DataError(f"data.path: {path} has no image, list, Parquet file or tar")
        found.images = list({(image.source, image.location): image for image in found.images}.values())
        found.containers = list(dict.fromkeys(found.containers))
        return found

    def _add(self, path: str, found: Collection) -> None:
        if is_hub_path(path):
            raise ConfigError(f"data.path: {path}: data sets on the hub cannot be predicted; download it first")
        if is_pattern(path):
            fixed = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
            for file in _match(path):
                self._add_file(fixed, file, found, named=False)
            return
        if kind_of(path) is None and (files := _list_folder(path)) is not None:
            for file in files:
                self._add_file(path.rstrip("/"), file, found, named=False)
            return
        if not is_url(path) and not os.path.exists(path):
            raise DataError(f"data.path: {path}: no such file or folder")
        self._add_file(path.rpartition("/")[0], path, found, named=True)

    def _add_file(self, source: str, file: str, found: Collection, *, named: bool) -> None:
        """Add a file of a folder or pattern, or one that the user named.

        A list in a folder of images is often about the images, so lists are read only where they are named.
        """
        kind = kind_of(file)
        if not is_utf8(file):
            found.rejected.append(RejectedImage(source, readable(file), "its name is not UTF-8: rename it"))
            return
        if kind is None and named and file.startswith(("http://", "https://")):
            kind = "image"  # addresses of images often have no ending
        if kind == "image":
            found.images.append(ImageFile(source, file.removeprefix(source).lstrip("/"), file))
        elif kind == "tar":
            found.containers.append(Container("tar", file))
        elif kind == "parquet":
            self._add_parquet(file, found)
        elif kind == "list" and named:
            self._add_list(file, found)
        elif named:
            raise ConfigError(
                f"data.path: {file} is no image, folder, list (.csv, .tsv), Parquet file (.parquet) or tar, by its name"
            )
        else:
            found.ignored[_ending(file)] += 1

    def _add_list(self, file: str, found: Collection) -> None:
        try:
            with cached_path(file).open(newline="", encoding="utf-8-sig") as lines:
                rows = csv.DictReader(lines, delimiter=LISTS[_ending(file)])
                column = self._choose("path", rows.fieldnames or [], _PATH_COLUMNS + _IMAGE_COLUMNS, file)
                for number, row in enumerate(rows, 2):
                    self._add_path(file, row[column], f"line {number}", found)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file} is no list in UTF-8 ({error}); save it as CSV in UTF-8") from error

    def _add_parquet(self, file: str, found: Collection) -> None:
        with open_parquet(file) as parquet:
            schema = parquet.schema_arrow
            holders = {one.name for one in schema if _holds_bytes(one.type)}
            texts = [one.name for one in schema if str(one.type) in ("string", "large_string")]
            image = self.columns.get("image") or next((name for name in _IMAGE_COLUMNS if name in holders), "")
            if not image and len(holders) == 1:
                (image,) = holders
            if image:
                if image not in holders:
                    raise ConfigError(
                        f"data.columns.image is {image!r}, which is no column of bytes of {file}; it has "
                        f"{', '.join(sorted(holders)) or 'none'}"
                    )
                path = self.columns.get("path") or next((name for name in _PATH_COLUMNS if name in texts), "")
                first = 0
                for group in range(parquet.metadata.num_row_groups):
                    rows = parquet.metadata.row_group(group).num_rows
                    found.containers.append(Container("parquet", file, group, first, rows, image, path))
                    first += rows
                return
            column, row = self._choose("path", texts, _PATH_COLUMNS + _IMAGE_COLUMNS, file), 0
            for batch in parquet.iter_batches(columns=[column]):
                for text in batch.column(0).to_pylist():
                    self._add_path(file, text, f"row {row}", found)
                    row += 1

    def _add_path(self, source: str, path: str | None, place: str, found: Collection) -> None:
        if not path or not path.strip():
            found.rejected.append(RejectedImage(source, place, "it names no image"))
            return
        root = self.root or source.rpartition("/")[0]
        whole = is_url(path) or os.path.isabs(path)
        found.images.append(ImageFile(source, path, path if whole else f"{root.rstrip('/')}/{path}"))

    def _choose(self, column: Literal["image", "path"], names: Sequence[str], usual: Sequence[str], file: str) -> str:
        """Return the name of a column: the one that is set, or one that is usual."""
        if given := self.columns.get(column):
            if given not in names:
                raise ConfigError(f"data.columns.{column} is {given!r}; {file} has {', '.join(names) or 'none'}")
            return given
        if (chosen := next((name for name in usual if name in names), None)) is None:
            raise ConfigError(
                f"{file} has no column called path, image, url or the like; set data.columns.path to one of "
                f"{', '.join(names) or 'its columns, of which it has none'}"
            )
        return chosen


def kind_of(path: str) -> Kind | None:
    """Return the kind of a file by the ending of its name; None for a folder, or a file of another kind."""
    name = _name(path).lower()
    if name.endswith(TARS):
        return "tar"
    if _ending(path) in LISTS:
        return "list"
    if name.endswith(".parquet"):
        return "parquet"
    return "image" if is_image_name(name) else None


def open_parquet(file: str) -> pq.ParquetFile:
    """Open a Parquet file, local or at a URL, of which only the footer is read.

    Raises:
        DataError: it is no whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path: Any = resolve_path(file)
    try:
        return pq.ParquetFile(path.fs.open(path.path) if is_url(file) else path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a damaged footer is one of the last two
        if is_user_error(error):
            raise
        raise DataError(f"{file} is no whole Parquet file ({' '.join(str(error).split())}); copy it again") from error


def _holds_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):  # as `datasets` stores images
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _name(path: str) -> str:
    """Return the name of a file, for a URL without its query."""
    return (path.partition("?")[0] if is_url(path) else path).rpartition("/")[2]


def _ending(path: str) -> str:
    return Path(_name(path)).suffix.lower() or "none"


def _match(pattern: str) -> list[str]:
    """Return the files that a pattern matches, in order."""
    if is_url(pattern):
        remote: Any = resolve_path(pattern)
        details = remote.fs.glob(remote.path, detail=True)
        return [remote.fs.unstrip_protocol(name) for name in sorted(details) if details[name]["type"] == "file"]
    return sorted(name for name in glob.iglob(pattern, recursive=True) if os.path.isfile(name))


def _list_folder(path: str) -> Iterator[str] | None:
    """Return all files below a folder, in order, without hidden ones; None if it is no folder."""
    if not is_url(path):
        return _walk(path) if os.path.isdir(path) else None
    if path.startswith(("http://", "https://")):
        return None
    remote: Any = resolve_path(path)
    files = remote.fs.find(remote.path)
    if files == [remote.path.rstrip("/")]:
        return None
    return (remote.fs.unstrip_protocol(name) for name in sorted(files) if "/." not in name)


def _walk(folder: str) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (f"{place}/{name}" for name in sorted(files) if not name.startswith("."))
