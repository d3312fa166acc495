"""Adaption prompts and zero-init attention (LLaMA-Adapter, arXiv 2303.16199, eq. 1-8).

In each of the top L layers, l:

    P_l ∈ R^{K×C}   trainable prompt, drawn N(0, 1)
    g_l ∈ R^H       trainable gate, one per head, zeros

    attention(x) = wo( SDPA(rope(q), rope(k), v, causal) + gate(g_l) ⊙ SDPA(rope(q), wk P_l, wv P_l) )

The two softmaxes are separate, so at g = 0 the adapted model is the base model, bit for bit. The prompts' keys are not
rotated: they have no position. `wk` and `wv` are the frozen layer's own.

B batch, T tokens, C width, H query heads, G key/value heads, D = C/H, K prompt length.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gate = Literal["tanh", "identity"]


@dataclass(frozen=True, kw_only=True)
class AdaptionConfig:
    """The shape of an adapter."""

    n_layers: int = 30
    """L, how many layers are adapted, counted from the top."""
    prompt_length: int = 10
    """K, prompt tokens in each adapted layer."""
    gate: Gate = "tanh"
    """What is done to g: tanh (the official training code) or nothing (official v1 inference, litgpt, PEFT)."""

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.prompt_length < 1:
            raise ValueError(f"an adapter needs n_layers >= 1 and prompt_length >= 1, got {self}")
        if self.gate not in ("tanh", "identity"):
            raise ValueError(f"gate must be 'tanh' or 'identity', got {self.gate!r}")


class Adaption(nn.Module):
    """The trainable part of one adapted layer: prompt (K, C) and gate (H,)."""

    def __init__(self, config: AdaptionConfig, dim: int, n_heads: int) -> None:
        super().__init__()
        self.gate_convention = config.gate
        self.head_dim = dim // n_heads
        self.prompt = nn.Parameter(torch.empty(config.prompt_length, dim))
        self.gate = nn.Parameter(torch.empty(n_heads))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Prompts N(0, 1), gates zero."""
        nn.init.normal_(self.prompt, generator=generator)
        nn.init.zeros_(self.gate)

    def keys_values(self, wk: nn.Linear, wv: nn.Linear) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values, each (1, G, K, D)."""
        prompt = self.prompt.to(wk.weight.dtype)
        heads = (1, self.prompt.shape[0], -1, self.head_dim)
        return wk(prompt).view(heads).transpose(1, 2), wv(prompt).view(heads).transpose(1, 2)

    def forward(self, q: Tensor, wk: nn.Linear, wv: nn.Linear, known: list[Tensor] | None = None) -> Tensor:
        """The gated attention term of eq. 6-8, (B, H, T, D).

        q (B, H, T, D) rotated queries; wk, wv the layer's frozen projections. The prompt's keys and values depend on no
        token, so generation hands in the list `known`: empty at first, it is filled here and read from then on.
        """
        keys, values = known or self.keys_values(wk, wv)
        if known is not None and not known:
            known.extend((keys, values))
        keys, values = (x.expand(q.shape[0], -1, -1, -1) for x in (keys, values))
        gate = torch.tanh(self.gate) if self.gate_convention == "tanh" else self.gate
        attended = F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != keys.shape[1])
        return gate.to(q.dtype).view(1, -1, 1, 1) * attended
