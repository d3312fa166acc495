"""Small files, whole or not at all: written under a temporary name, then renamed; read with errors that help."""

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
    """Text as a path; what has a path's methods already, such as an object in a bucket, as it is."""
    return Path(path) if isinstance(path, str) else path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: it takes its place if the block ends well, and disappears otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # unique per writer, so that two runs on one file cannot mix; a dot keeps it out of listings and globs
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, keys in the order given."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, way_out: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is missing (with the way out) or is no JSON (with the place).
    """
    try:
        return json.loads(as_path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CafoError(f"no file {path}; {way_out}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CafoError(f"{path} is not JSON: {error}; {way_out}") from error
