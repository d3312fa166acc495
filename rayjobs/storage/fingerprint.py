"""Identify values, files and URLs by their content, never by their path or time."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayjobs.storage.paths import is_url, resolve_path

SETTLED_AFTER_S = 2.0
"""Age from which a file's times tell whether it was changed: file systems count time in steps of up to 2 s."""


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal: equal values have equal fingerprints on every machine.

    The order of a mapping's keys does not count; a tuple equals a list. Raises TypeError for what JSON cannot hold.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def file_fingerprint(path: str | Path) -> str:
    """SHA-256 of a local file's content; for a URL, what its store says of the content, so nothing is downloaded.

    Raises OSError if the file is missing or cannot be read.
    """
    path = resolve_path(path)
    if is_url(path):
        remote: Any = path
        return remote_fingerprint(remote.fs.info(remote.path))
    state = path.stat()
    if time.time() - state.st_ctime < SETTLED_AFTER_S:
        return _local_fingerprint.__wrapped__(path)
    return _local_fingerprint(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)


@lru_cache(maxsize=1 << 20)
def _local_fingerprint(path: Path, *state: int) -> str:
    """SHA-256 of a file's content, read once by each process as long as `state`, the file's size and times, stays."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_fingerprints(folder: str | Path, names: Iterable[str]) -> dict[str, str | None]:
    """The fingerprint of each named file of a folder, in the order given; None for a file that cannot be read.

    A folder at a URL is listed once, whatever the number of files.
    """
    root: Any = resolve_path(folder)
    if is_url(root):
        listed, prefix = root.fs.find(root.path, detail=True), root.path.rstrip("/")
        infos = {name: listed.get(f"{prefix}/{name}") for name in names}
        return {name: info and remote_fingerprint(info) for name, info in infos.items()}
    return {name: _readable_fingerprint(root / name) for name in names}


def remote_fingerprint(info: Mapping[str, Any]) -> str:
    """The fingerprint of a remote file, from what fsspec's `info` or `find` reports of it: its ETag and size.

    Where a store has no ETag, all that it reports counts, as in fsspec's own `ukey`. That includes the time of writing,
    so the same content written again then counts as another.
    """
    etag = info.get("ETag") or info.get("etag")
    return fingerprint([etag, info["size"]] if etag else str(info))


def _readable_fingerprint(path: Path) -> str | None:
    try:
        return file_fingerprint(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def content_fingerprint(path: Path) -> str:
    """The beginning of a fingerprint of a local file, or of all files of a folder; of nothing, if nothing is there."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return fingerprint([file_fingerprint(file) for file in files])[:16]
