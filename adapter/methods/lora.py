"""LoRA (arXiv 2106.09685, eq. 3): a product of two thin matrices is added to a linear layer.

    y = W x + (α / r) B A x        A ∈ R^{r×I}, B ∈ R^{O×r}

A starts as PEFT and the authors' code start it, uniform on ±1/√I (He's initialisation with a slope of √5); B starts
at 0. As in PEFT, α is the same number whatever r is, and there is no dropout. Folded: W' = W + (α / r) B A.

r rank, I inputs, O outputs of the layer.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.errors import AdapterError
from adapter.methods.base import LINEARS, AdapterMethod, Delta, check_layers, install_deltas

if TYPE_CHECKING:
    from adapter.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterMethod):
    """LoRA's settings; the defaults adapt the projections of queries and values, as the paper does."""

    n_layers: int | None = None
    """Number of adapted layers, counted from the top; None for all."""
    rank: int = 8
    """r."""
    alpha: float = 16.0
    """α; the product is scaled by α / r."""
    targets: tuple[str, ...] = ("wq", "wv")
    """The adapted linear layers of a block, of `adapter.methods.base.LINEARS`."""

    def __post_init__(self) -> None:
        check_layers(self.n_layers)
        object.__setattr__(self, "targets", tuple(name for name in LINEARS if name in self.targets))
        if self.rank < 1 or not self.alpha > 0 or not self.targets:
            raise AdapterError(f"LoRA needs rank >= 1, alpha > 0 and targets of {', '.join(LINEARS)}, got {self}")

    @property
    def method(self) -> str:
        """`lora`."""
        return "lora"

    @property
    def usual_lr(self) -> float:
        """Alpaca-LoRA's 3e-4 at 128 records."""
        return 6e-4

    def install(self, model: "Decoder") -> None:
        """See `AdapterMethod.install`."""
        make = lambda n_in, n_out: LoraDelta(n_in, n_out, self.rank, self.alpha / self.rank)  # noqa: E731
        install_deltas(model, self.n_layers, self.targets, make)

    def describe(self) -> str:
        """See `AdapterMethod.describe`."""
        return f"rank {self.rank} on {', '.join(self.targets)}: {super().describe()}"


class LoraDelta(Delta):
    """One layer's A (r, I) and B (O, r), which compute in the layer's dtype."""

    def __init__(self, n_inputs: int, n_outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(rank, n_inputs))
        self.b = nn.Parameter(torch.empty(n_outputs, rank))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set A to uniform values on ±1/√I, B to 0."""
        bound = self.a.shape[1] ** -0.5
        nn.init.uniform_(self.a, -bound, bound, generator=generator)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (self.b @ self.a), bias
