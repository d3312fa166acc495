"""Identify values, files and URLs by their content."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayjobs.storage.paths import is_url, resolve_path


def hash_file(path: str | Path) -> str:
    digest = hashlib.sha256()
    with resolve_path(path).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_hashes(folder: str | Path) -> Callable[[str], str | None]:
    """A function from a file's path below the folder to what tells its content: SHA-256, or None if it cannot be read.

    A URL is listed here, once, and what the store says of a file, ETag and size, stands for its content.
    """
    root: Any = resolve_path(folder)
    if is_url(root):
        listed = root.fs.find(root.path, detail=True)
        told = {file: f"{about.get('ETag') or about['etag']} {about['size']}" for file, about in listed.items()}
        return lambda path: told.get(f"{root.path.rstrip('/')}/{path}")

    def digest(path: str) -> str | None:
        try:
            return hash_file(root / path)
        except OSError:
            return None

    return digest
