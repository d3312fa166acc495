"""Write small files atomically, and read JSON with errors that name the file and the remedy."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cafo.errors import CafoError


def as_path(path: str | Path) -> Path:
    """Return text as a `Path`; return any other object, such as a path in a bucket, unchanged."""
    return Path(path) if isinstance(path, str) else path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if the block fails.

    So a reader sees the whole file or none. Missing folders are created. The file gets the mode that the umask gives
    any new file, whoever wrote it: the safetensors library alone would make it readable for its owner only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every writer, so that two runs cannot mix their bytes; the dot hides it from listings.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically, with keys in the order given."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of a Git LFS pointer: the few lines that a clone without Git LFS has in place of a file's content."""


def is_lfs_pointer(path: str | Path) -> bool:
    """Return whether a file is a Git LFS pointer in place of its content."""
    file = as_path(path)
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def describe_content(path: str | Path) -> str:
    """Name the kind of a file that is taken for weights, such as "a GGUF file" or "JSON"; empty for any other kind."""
    with as_path(path).open("rb") as stream:
        head = stream.read(200)
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if not head or not all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return ""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return "JSON" if text.startswith((b"{", b"[")) else "text"


def read_json(path: str | Path, hint: str) -> Any:
    """Read a JSON file.

    Args:
        hint: what the user can do if the file is missing or malformed; it ends the error message.

    Raises:
        CafoError: the file is missing or is not JSON.
    """
    try:
        return json.loads(as_path(path).read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CafoError(f"no file {path}; {hint}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        if is_lfs_pointer(path):
            raise CafoError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`") from error
        raise CafoError(f"{path} is not JSON: {error}; {hint}") from error
