"""Biases alone (BitFit, arXiv 2106.10199): a trained bias is added to every linear layer of the adapted blocks.

    y = W x + b

BitFit trains the biases that a model has. LLaMA has none, so that these are new, 0 at first; where a family has its
own (Qwen 2), they stay frozen and b is added to them. Folded: b' = b_base + b.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapter.methods.base import LINEARS, AdapterMethod, Delta, check_layers, install_deltas

if TYPE_CHECKING:
    from adapter.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class BiasConfig(AdapterMethod):
    """The settings of training biases alone."""

    n_layers: int | None = None
    """Number of adapted layers, counted from the top; None for all."""

    def __post_init__(self) -> None:
        check_layers(self.n_layers)

    @property
    def method(self) -> str:
        """`bias`."""
        return "bias"

    def install(self, model: "Decoder") -> None:
        """See `AdapterMethod.install`."""
        install_deltas(model, self.n_layers, tuple(LINEARS), lambda _, n_out: BiasDelta(n_out))


class BiasDelta(Delta):
    """One layer's added bias b (O,)."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.empty(n_outputs))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set b to 0."""
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.b.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.b if bias is None else self.b + bias
