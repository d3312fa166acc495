"""Adaption prompts and zero-init attention (LLaMA-Adapter, arXiv 2303.16199, eq. 1-8).

In each of the top L layers, l:

    P_l ∈ R^{K×C}   trainable prompt, drawn N(0, 1)
    g_l ∈ R^H       trainable gate, one per head, zeros

    attention(x) = wo( SDPA(rope(q), rope(k), v, causal) + gate(g_l) ⊙ SDPA(rope(q), wk P_l, wv P_l) )

The two softmaxes are separate, so at g = 0 the adapted model is the base model, bit for bit. The prompts' keys are not
rotated: they have no position. `wk` and `wv` are the frozen layer's own. An image's token I (see `adapter.vision`) is
added to the prompt; the projections have no bias, so wk (P + I) = wk P + wk I costs a row with an image one token more,
and a row without one nothing.

The paper's ablations are two more gates: `one`, fixed at 1 (rand-init attention), and `prefix`, no gate at all but an
ordinary prefix, whose keys stand beside the words' in one softmax.

B batch, T tokens, S keys, C width, H query heads, G key/value heads, D = C/H, K prompt length, n images.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.errors import AdapterError
from adapter.image_projection import ImageProjectionConfig, Images

Gate = Literal["tanh", "identity", "one", "prefix"]


@dataclass(frozen=True, kw_only=True)
class AdaptionConfig:
    """The shape of an adapter."""

    n_layers: int = 30
    """L, how many layers are adapted, counted from the top."""
    prompt_length: int = 10
    """K, prompt tokens in each adapted layer."""
    gate: Gate = "tanh"
    """What is done to g: tanh (the official training code) or nothing (official v1 inference, litgpt, PEFT); `one` and
    `prefix` have no trainable g."""
    vision: ImageProjectionConfig | None = None
    """How images are read; None for text alone."""

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.prompt_length < 1:
            raise AdapterError(f"an adapter needs n_layers >= 1 and prompt_length >= 1, got {self}")
        if self.gate not in get_args(Gate):
            raise AdapterError(f"gate must be one of {', '.join(get_args(Gate))}, got {self.gate!r}")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, grouped-query where k and v (B, G, S, D) have fewer heads than q (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


class Adaption(nn.Module):
    """One adapted layer's prompt (K, C) and gate (H,), and its attention with them."""

    def __init__(self, config: AdaptionConfig, dim: int, n_heads: int) -> None:
        super().__init__()
        self.gate_convention = config.gate
        self.head_dim = dim // n_heads
        self.prompt = nn.Parameter(torch.empty(config.prompt_length, dim))
        self.gate = nn.Parameter(torch.empty(n_heads), requires_grad=config.gate in ("tanh", "identity"))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Prompts N(0, 1); gates zero, or one where that is what they stay."""
        nn.init.normal_(self.prompt, generator=generator)
        nn.init.constant_(self.gate, float(not self.gate.requires_grad))

    def keys_values(self, wk: nn.Linear, wv: nn.Linear, batch: int, images: Images | None) -> list[Tensor]:
        """The prompt's keys and values, each (1 or B, G, K, D): the same for all rows unless some have an image."""
        found = []
        for projection in (wk, wv):
            shared = self._heads(projection, self.prompt)[None].transpose(1, 2)  # (1, G, K, D)
            if images is not None:
                tokens, rows = images
                own = self._heads(projection, tokens)[:, :, None]  # (n, G, 1, D)
                shared = shared.expand(batch, -1, -1, -1).index_add(0, rows, own.expand(-1, -1, shared.shape[2], -1))
            found.append(shared)
        return found

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """x (n, C) projected, (n, G, D)."""
        return projection(x.to(projection.weight.dtype)).unflatten(-1, (-1, self.head_dim))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        projections: tuple[nn.Linear, nn.Linear],
        known: list[Tensor] | None = None,
        images: Images | None = None,
    ) -> Tensor:
        """Attention to words and prompt, (B, H, T, D): eq. 6-8.

        q (B, H, T, D) rotated queries; k, v (B, G, S, D) of the words under `mask` (None is causal); projections: the
        layer's frozen wk and wv; images: the batch's tokens (n, C) and their rows. The prompt's keys and values depend
        on no word, so generation hands in the list `known`: empty at first, it is filled here and read from then on.
        """
        keys, values = known or self.keys_values(*projections, len(q), images)
        if known is not None and not known:
            known.extend((keys, values))
        keys, values = (x.expand(q.shape[0], -1, -1, -1) for x in (keys, values))
        if self.gate_convention == "prefix":
            if mask is None:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = F.pad(mask, (keys.shape[2], 0), value=True)  # every word sees all of the prompt
            return attend(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), mask)
        gate = torch.tanh(self.gate) if self.gate_convention == "tanh" else self.gate
        words = attend(q, k, v, mask, causal=mask is None)
        return words + gate.to(q.dtype).view(1, -1, 1, 1) * attend(q, keys, values)
