"""GGUF files, as llama.cpp has them: what they say of themselves, and where their tensors lie.

A file begins with metadata, key by key, and a table of tensors; the values follow. The package `gguf` has a reader
too, but it takes 4 seconds for the metadata of a small model, and a damaged file leads it astray.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from adapter.errors import AdapterError

MAGIC = b"GGUF"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>(?!0{5})\d{5})\.gguf")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_HEADER = 1 << 30

T = TypeVar("T")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor that was not read yet."""

    file: Path
    start: int
    """Offset of its first byte within the file."""
    shape: tuple[int, ...]
    """As PyTorch counts: the last dimension lies together."""
    type_id: int
    """The type that its values are stored in, in ggml's numbers."""


@dataclass(frozen=True)
class GGUFFile:
    """The metadata and the tensors of a model, which may be split over several files."""

    path: Path
    error: type[AdapterError]
    """The class of errors about the file."""
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T | None:
        """The value of a key of the metadata, or the default. Raises `error` for a value of another type."""
        value = self.metadata.get(key, default)
        if value is not default and not _is_of(value, kind):
            raise self.error(
                f"{self.path}: {key} is {value!r:.60}, not of the type {kind.__name__}; the file is damaged"
            )
        return value

    def get_list(self, key: str, items: type[T]) -> list[T] | None:
        """The list under a key, or None if it is missing. Raises `error` if it is none, or holds another type."""
        values = self.get(key, list)
        if wrong := [value for value in values or () if not _is_of(value, items)]:
            raise self.error(
                f"{self.path}: {key} holds {wrong[0]!r:.60}, not {items.__name__} alone; the file is damaged"
            )
        return values

    def require(self, key: str, kind: type[T]) -> T:
        """The value of a key of the metadata. Raises `error` if it is missing, or of another type."""
        value = self.get(key, kind)
        if value is None:
            raise self.missing(key)
        return value

    def require_list(self, key: str, items: type[T]) -> list[T]:
        """The list under a key. Raises `error` if it is missing, or holds another type."""
        values = self.get_list(key, items)
        if values is None:
            raise self.missing(key)
        return values

    def missing(self, key: str) -> AdapterError:
        """An error that a key is missing."""
        return self.error(f"{self.path}: its metadata lacks {key}; the file is damaged, or of another kind")


def _is_of(value: Any, kind: type) -> bool:
    """True for a value of this type: a whole number is a float too, and a truth value, unlike in Python, no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (float, int) if kind is float else kind)


def is_gguf(path: Path) -> bool:
    """True for a file in GGUF's format."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def find_gguf(folder: Path) -> list[Path]:
    """The models in a folder, each by its first file."""
    files = sorted(folder.glob("*.gguf"))
    return [file for file in files if not (shard := _SHARD.fullmatch(file.name)) or int(shard["number"]) == 1]


def read_gguf(path: Path, error: type[AdapterError]) -> GGUFFile:
    """Read the metadata and the table of tensors of a file, and of the files that it is split into.

    Raises `error` for a file that is damaged, of an unknown version or truncated, and for one that misses its others.
    """
    shard = _SHARD.fullmatch(path.name)
    files = [path]
    if shard:
        names = [f"{shard['stem']}-{i + 1:05d}-of-{shard['count']}.gguf" for i in range(int(shard["count"]))]
        if path.name != names[0]:
            raise error(f"{path}: a later part of a model; give the first, {names[0]}")
        files = [path.with_name(name) for name in names]
    metadata, tensors = _read_one(path, error)
    parts = GGUFFile(path, error, metadata, tensors).get("split.count", int) or 1
    if parts > 1 and parts != len(files):
        raise error(f"{path}: one of {parts} parts, whose names must end in -00001-of-{parts:05d}.gguf and so on")
    for file in files[1:]:
        if not file.is_file():
            raise error(f"{file}: missing; the model is split into {len(files)} files, which must lie together")
        tensors |= _read_one(file, error)[1]
    return GGUFFile(path, error, metadata, tensors)


def _read_one(path: Path, error: type[AdapterError]) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    try:
        with path.open("rb") as file:
            header = _Header(file.read)
            return header.read_all(path)
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror})") from fault
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError, RecursionError) as fault:
        raise error(f"{path}: not a readable GGUF file, truncated or corrupt ({fault})") from fault


class _Header:
    """The beginning of a file, read from front to back."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._place = 0

    def read_all(self, path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """The metadata and the tensors of the file at `path`."""
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._scalar("I")) not in (2, 3):
            raise ValueError(f"version {version}; versions 2 and 3 can be read, of little-endian machines")
        n_tensors, n_keys = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(n_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        table = []
        for _ in range(n_tensors):
            name, rank = self._string(), self._scalar("I")
            shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
            table.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"its tensors are aligned to {alignment!r:.60} bytes, not to a multiple of 8")
        if unaligned := next((name for name, _, _, offset in table if offset % alignment), None):
            raise ValueError(f"{unaligned} does not begin at a multiple of {alignment} bytes")
        start = -(-self._place // alignment) * alignment
        tensors = {name: GGUFTensor(path, start + offset, shape, kind) for name, shape, kind, offset in table}
        if len(tensors) < len(table) or any(prod(tensor.shape) < 1 for tensor in tensors.values()):
            raise ValueError("a tensor is listed twice or is empty")
        return metadata, tensors

    def _take(self, size: int) -> bytes:
        self._place += size
        if self._place > _LONGEST_HEADER:
            raise ValueError("it has a header of more than a gigabyte")
        data = self._read(size)
        if len(data) < size:
            raise ValueError("it ends within its header")
        return data

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            code = f"{length}{_SCALARS[kind]}"
            return list(struct.unpack("<" + code, self._take(struct.calcsize("<" + code))))
        return [self._value(kind) for _ in range(length)]
