"""Read files and byte ranges of files, local or at a URL, and count the bytes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayjobs.errors import DataError
from rayjobs.storage.paths import as_storage_error, is_url, read_bytes, resolve_path


class CountedReader:
    """Reads files, whole or in parts, and counts the bytes that it asks storage for.

    A disk may read more, since it reads whole pages, and less, since the system keeps pages in memory.
    """

    def __init__(self) -> None:
        self.bytes = 0
        """bytes read so far"""

    def read(self, path: str | Path) -> bytes:
        """Return the content of a file.

        Raises:
            StorageError: the file cannot be read.
        """
        with as_storage_error(path, "read"):
            content = read_bytes(path)
        self.bytes += len(content)
        return content

    def read_ranges(self, path: str | Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of each range [start, stop) of a file, in the given order.

        Ranges that touch or overlap are read as one. At a URL each one that is left is a request, and all are sent at
        the same time where the backend can.

        Raises:
            StorageError: the file cannot be read.
            DataError: the file ends before a range does.
        """
        joined = _join(ranges)
        with as_storage_error(path, "read"):
            contents = _read_remote(path, joined) if is_url(path) else _read_local(path, joined)
        self.bytes += sum(map(len, contents))
        for (start, stop), content in zip(joined, contents, strict=True):
            if len(content) != stop - start:
                raise DataError(
                    f"{path} was cut short: it ends at byte {start + len(content):,}, where {stop:,} are expected; "
                    f"delete the folder {str(path).rpartition('/')[0]}, and the next run makes it again"
                )
        found: dict[tuple[int, int], bytes] = {}
        number = 0
        for start, stop in sorted(ranges):
            while stop > joined[number][1]:
                number += 1
            first = joined[number][0]
            found[start, stop] = contents[number][start - first : stop - first]
        return [found[start, stop] for start, stop in ranges]


def _join(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges in rising order, with those that touch or overlap joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def _read_local(path: str | Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    file = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # otherwise the system would read on behind each range
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return [os.pread(file, stop - start, start) for start, stop in ranges]
    finally:
        os.close(file)


def _read_remote(path: str | Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    remote: Any = resolve_path(path)
    starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
    contents: list[bytes] = remote.fs.cat_ranges([remote.path] * len(ranges), starts, stops, on_error="raise")
    return contents
