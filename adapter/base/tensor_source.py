"""A tensor of a checkpoint, mapped but not yet read: where its parts are, and how they become the decoder's tensor."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapter.base.tensor_files import drop_pages
from adapter.errors import CheckpointError

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class TensorSource:
    """One of the decoder's tensors, in one file or in parts over several shards."""

    parts: tuple[Tensor, ...]
    """Mapped parts of the tensor, one per shard."""
    files: tuple[Path, ...]
    """The file of each part."""
    dim: int = 0
    """The dimension along which the parts are joined."""
    paired_heads: int = 0
    """Number of heads whose rows are in Meta's order, as adjacent pairs; 0 if no permutation is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self) -> Tensor:
        """The whole tensor; the mapped one itself if nothing has to be joined or permuted."""
        if len(self.parts) == 1 and not self.paired_heads:
            return self.parts[0]
        whole = torch.empty(self.shape, dtype=self.parts[0].dtype)
        self.copy_to(whole)
        return whole

    def copy_to(self, whole: Tensor) -> None:
        """Copy the tensor to `whole`, of any dtype and device, part by part; each part's memory is then returned."""
        slices = whole.split([part.shape[self.dim] for part in self.parts], self.dim)
        for part, target in zip(self.parts, slices, strict=True):
            if self.paired_heads:
                heads, width = self.paired_heads // len(self.parts), part.shape[1]
                target.view(heads, 2, -1, width).copy_(part.view(heads, -1, 2, width).transpose(1, 2))
            else:
                target.copy_(part)
            drop_pages(part)

    def equals(self, other: "TensorSource") -> bool:
        """True if both tensors have the same dtype, shape and values; both are read."""
        one, two = self.read(), other.read()
        same = one.dtype == two.dtype and torch.equal(one, two)
        for part in (*self.parts, *other.parts):
            drop_pages(part)
        return same

    def check_dtype(self, key: str) -> None:
        """Raise CheckpointError, naming file and key, for values that are no floating-point numbers."""
        for file, part in zip(self.files, self.parts, strict=True):
            if part.dtype not in _FLOATS:
                raise CheckpointError(f"{file}: {key} is {part.dtype}; quantized weights are not supported")

    def check_finite(self, value: Tensor, name: str) -> None:
        """Raise CheckpointError, naming the files, if the tensor, as read, holds NaN or infinity."""
        low, high = value.aminmax()  # both are NaN if any value is; takes no memory, and as long as copying the tensor
        if not (low.isfinite() & high.isfinite()):
            files = ", ".join(str(file) for file in self.files)
            what = "NaN" if low.isnan() else f"infinity (in {str(value.dtype).removeprefix('torch.')})"
            raise CheckpointError(f"{files}: {name} holds {what}; the file is damaged, download or convert it again")

    def row(self, index: int) -> Tensor:
        """One row of the whole tensor; no other row is read."""
        index = self._stored_row(index)
        if self.dim == 1:
            return torch.cat([part[index] for part in self.parts])
        part, index = divmod(index, self.parts[0].shape[0])
        return self.parts[part][index]

    def _stored_row(self, index: int) -> int:
        """The place in the file of a row of the whole tensor."""
        if not self.paired_heads:
            return index
        half = self.shape[0] // self.paired_heads // 2
        head, offset = divmod(index, 2 * half)
        return head * 2 * half + 2 * (offset % half) + offset // half
