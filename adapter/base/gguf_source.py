"""A tensor of a GGUF file, as a source of one of the decoder's: dequantised a few rows at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapter.base.tensor_files import drop_pages
from adapter.base.tensor_source import TensorSource
from adapter.errors import CheckpointError
from adapter.gguf_file import GGUFTensor

_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""ggml's number of a type → the dtype whose values are stored as they are."""
_CHUNK = 1 << 22
"""Number of values that are dequantised at a time."""


@dataclass(frozen=True)
class GGUFSource(TensorSource):
    """A tensor whose rows are stored in blocks of a few bits per value. Its part (R, bytes of a row) is of bytes.

    A tensor of one dimension has rows of one value.
    """

    type_id: int = 0
    """The type that the values are stored in, in ggml's numbers."""
    row_shape: tuple[int, ...] = ()
    """The shape of a row: of one value, or of as many as the tensor is wide."""
    offset: float = 0.0
    """Subtracted from all values: llama.cpp adds 1 to the norms of Gemma."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return (len(self.parts[0]), *self.row_shape)

    def check_dtype(self, key: str) -> None:
        """Nothing to check: `open_sources` accepts no type that cannot be dequantised."""

    def read(self) -> Tensor:
        """The whole tensor, in float32."""
        whole = torch.empty(self.shape, dtype=torch.float32)
        self.copy_to(whole)
        return whole

    def copy_to(self, whole: Tensor) -> None:
        """Dequantise the tensor into `whole`, of any dtype and device, a few rows at a time."""
        (stored,) = self.parts
        if self.paired_heads:
            targets = whole.view(self.paired_heads, 2, -1, *self.row_shape)
            for target, head in zip(targets, stored.chunk(self.paired_heads), strict=True):
                target.copy_(self._values(head).view(-1, 2, *self.row_shape).transpose(0, 1))
        else:
            step = max(1, _CHUNK // prod(self.row_shape))
            for start in range(0, len(whole), step):
                whole[start : start + step].copy_(self._values(stored[start : start + step]))
        drop_pages(stored)

    def row(self, index: int) -> Tensor:
        """One row of the whole tensor, in float32."""
        index = self._stored_row(index)
        return self._values(self.parts[0][index : index + 1])[0]

    def _values(self, stored: Tensor) -> Tensor:
        """The values (R, *row_shape) of stored rows."""
        if self.type_id in _FLOATS:
            values = stored.view(_FLOATS[self.type_id]).float()
        else:
            import gguf

            values = torch.from_numpy(gguf.dequantize(stored.numpy(), gguf.GGMLQuantizationType(self.type_id)))
        return (values - self.offset if self.offset else values).view(-1, *self.row_shape)


def open_sources(tensors: Mapping[str, GGUFTensor]) -> dict[str, GGUFSource]:
    """Map the tensors of a model; no value is read.

    Raises CheckpointError, naming file and tensor, for values that lie past the file's end, or whose type cannot be
    dequantised.
    """
    files: dict[Path, Tensor] = {}
    sources = {}
    for name, tensor in tensors.items():
        if tensor.file not in files:
            size = tensor.file.stat().st_size
            files[tensor.file] = torch.from_file(str(tensor.file), shared=False, size=size, dtype=torch.uint8)
        *rows, width = tensor.shape if len(tensor.shape) > 1 else (*tensor.shape, 1)
        block, block_bytes = _block(tensor, name)
        if width % block or len(rows) != 1:
            raise CheckpointError(f"{tensor.file}: {name} has shape {tensor.shape}, in blocks of {block} values")
        size = rows[0] * width // block * block_bytes
        stored = files[tensor.file][tensor.start : tensor.start + size]
        if len(stored) < size:
            raise CheckpointError(f"{tensor.file}: truncated: {name} lies past its end; download it again")
        sources[name] = GGUFSource(
            parts=(stored.view(rows[0], -1),),
            files=(tensor.file,),
            type_id=tensor.type_id,
            row_shape=tensor.shape[1:],
        )
    return sources


def _block(tensor: GGUFTensor, name: str) -> tuple[int, int]:
    """The number of values that are stored together, and the number of their bytes."""
    if dtype := _FLOATS.get(tensor.type_id):
        return 1, dtype.itemsize
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{tensor.file}: {name} is quantised, which takes the package gguf: pip install 'rayjobs[gguf]'"
        ) from error
    try:
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{tensor.file}: {name} is stored in ggml's type {tensor.type_id}, which the installed gguf cannot "
            f"dequantise ({error})"
        ) from error
    return block, block_bytes
