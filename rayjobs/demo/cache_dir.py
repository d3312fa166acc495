"""What the demo makes once: folders in the cache, named after all that their content follows from."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rayjobs.storage.fingerprint import fingerprint

FORMAT = 3
"""Of all that is made here: a change that changes its outcome counts it up, so that nothing older is taken for new."""


def kept(cache: Path, kind: str, *identity: Any) -> Path:
    """The folder of this kind and identity, which is there whole or not at all."""
    return cache / "demo" / f"{kind}-{digest(kind, *identity)}"


def digest(*identity: Any) -> str:
    return fingerprint([FORMAT, *identity])[:16]


def link(path: Path, target: Path) -> None:
    """Lets `path` lead to `target`, whatever it led to before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.symlink_to(target)
    temporary.replace(path)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch on so many threads: at this size more are slower, and sums would depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
