"""Tensors that are kept in memory up to a limit, and in a temporary file beyond it.

The file has no name, and its space is free again when the last tensor is gone. Its tensors are mapped into memory: the
operating system reads their pages when they are used, and drops them when it needs the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from threading import Lock
from typing import IO

import numpy as np
import torch
from torch import Tensor

from cafo.errors import CafoError

_BYTES_IN_MEMORY = 256 << 20


class Spill:
    """Keeps float32 tensors, from several threads. They outlive the end of its `with` block, which takes no more."""

    def __init__(self) -> None:
        self._bytes, self._lock = 0, Lock()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()  # what is mapped stays mapped

    def keep_one(self, tensor: Tensor) -> Tensor:
        """Return an equal tensor, as `keep` does."""
        return self.keep([tensor])[0]

    def keep(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return equal tensors, in the file if those in memory are many already.

        Tensors in the memory of a GPU stay there.

        Args:
            tensors: some float32 tensors, which are mapped together.

        Raises:
            CafoError: the file cannot be written.
        """
        size = sum(tensor.nbytes for tensor in tensors)
        with self._lock:
            self._bytes += size
            if self._bytes <= _BYTES_IN_MEMORY or not size or tensors[0].device.type != "cpu":
                return list(tensors)
            try:
                flat = [tensor.flatten() for tensor in tensors]
                mapped = self._write(torch.cat(flat) if len(flat) > 1 else flat[0])  # of one there is no copy
            except OSError as error:
                raise CafoError(
                    f"the search keeps what it needs of its images in {tempfile.gettempdir()}, which cannot be written "
                    f"({error.strerror or error}); set TMPDIR to a folder with more space"
                ) from error
        parts = mapped.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def _write(self, flat: Tensor) -> Tensor:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        start = self._file.seek(0, 2)
        self._file.write(flat.numpy().data)
        self._file.flush()
        return torch.from_numpy(np.memmap(self._file, np.float32, "r+", offset=start, shape=(flat.numel(),)))
