"""The linear layer of a decoder's block, with one place for a part of an adapter."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from adapter.methods.base import Delta


class Linear(nn.Linear):
    """A linear layer that may hold a delta, which then changes its output (see `adapter.methods.base`)."""

    delta: "Delta | None"

    def __init__(self, n_inputs: int, n_outputs: int, bias: bool = False) -> None:
        super().__init__(n_inputs, n_outputs, bias=bias)
        self.register_module("delta", None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.delta is None else self.delta(x, y)
