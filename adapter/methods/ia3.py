"""(IA)³ (arXiv 2205.05638, section 3.3): keys, values and the inner activations of the feed-forward layer are rescaled.

    k = l_k ⊙ (wk x),    v = l_v ⊙ (wv x),    h = w2 (l_ff ⊙ act(w1 x) ⊙ (w3 x))

l_ff scales the output of w3, which is the same. A scale is held as l = 1 + d with d trained and 0 at first, so that
weight decay pulls to the base; the gradient of d is that of l. Folded: W' = diag(l) W, b' = l ⊙ b.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapter.methods.base import AdapterMethod, Delta, check_layers, install_deltas

if TYPE_CHECKING:
    from adapter.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterMethod):
    """(IA)³'s settings."""

    n_layers: int | None = None
    """Number of adapted layers, counted from the top; None for all."""

    def __post_init__(self) -> None:
        check_layers(self.n_layers)

    @property
    def method(self) -> str:
        """`ia3`."""
        return "ia3"

    def install(self, model: "Decoder") -> None:
        """See `AdapterMethod.install`."""
        install_deltas(model, self.n_layers, ("wk", "wv", "w3"), lambda _, n_out: ScaleDelta(n_out))


class ScaleDelta(Delta):
    """One layer's scale of outputs, as its difference d (O,) to 1."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.empty(n_outputs))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set d to 0."""
        nn.init.zeros_(self.d)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y * (1 + self.d).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = 1 + self.d
        return scale[:, None] * weight, None if bias is None else scale * bias
