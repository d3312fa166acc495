"""Write files atomically: a reader sees the whole file or none."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, remove it if the block fails.

    Missing folders are created. The file gets the mode that the umask gives any new file, whoever wrote it: the
    safetensors library alone would make it readable for its owner only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every writer, so that two cannot mix their bytes; the dot hides it from listings.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
