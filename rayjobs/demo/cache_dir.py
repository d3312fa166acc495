"""Folders in the cache for what the demo makes once, named after everything that their content depends on."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rayjobs.storage.fingerprint import fingerprint

FORMAT = 4
"""Version of everything that the demo makes. Increase it with a change that changes any of its content, so that older
content is not taken for new."""


def cache_folder(cache: Path, kind: str, *identity: Any) -> Path:
    """The folder of this kind and identity. It exists completely or not at all."""
    return cache / "demo" / f"{kind}-{demo_fingerprint(kind, *identity)}"


def demo_fingerprint(*identity: Any) -> str:
    return fingerprint([FORMAT, *identity])[:16]


def link_folder(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`; replace an earlier link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.symlink_to(target)
    temporary.replace(path)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run PyTorch with this number of threads.

    Models of this size are slower with more threads, and the last bits of sums depend on their number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
