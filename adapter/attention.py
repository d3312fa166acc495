"""Scaled dot-product attention, with grouped queries and, where a family has it, a soft cap on the scores.

B batch, T tokens, S keys, H query heads, G key/value heads, D channels of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Bound x smoothly to ±cap: cap tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


def visible(positions: Tensor, n_places: int, window: int | None = None) -> Tensor:
    """The places (B or 1, 1, T, S) that tokens at these positions (B or 1, T) may attend to, as bool.

    window: tokens that a token sees, itself included; all before it if None.
    """
    distance = positions[:, None, :, None] - torch.arange(n_places, device=positions.device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """softmax(cap(scale q kᵀ)) v, (B, H, T, D), of q (B, H, T, D) over k and v (B, G, S, D), grouped-query if G < H.

    mask: broadcast to (B, H, T, S); bool, True where a token may attend, or added to the scores. causal: in place of a
    mask, and then S = T.
    scale: D^-0.5 if None. cap: soft cap of the scores, which no fused kernel computes.
    """
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attend16.apply(q, k, v, mask, causal, scale, cap)
    long_masked = mask is not None and q.shape[2] > 1
    if cap is not None or (q.is_cuda and long_masked):  # CUDA's fused kernels take a mask or grouped queries, not both
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if cap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    scores = soft_cap(q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale), cap)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


class _Attend16(torch.autograd.Function):
    """`attend` in 16 bits on a CPU, whose gradient is taken in float32: the kernel is several times as fast there."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
        cap: float | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.settings = {"mask": mask, "causal": causal, "scale": scale, "cap": cap}
        with torch.no_grad():
            return attend(q.detach(), k.detach(), v.detach(), **ctx.settings)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        with torch.enable_grad():
            inputs = [x.float().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
            y = attend(*inputs, **ctx.settings)
        grads = iter(torch.autograd.grad(y, [x for x in inputs if x.requires_grad], upstream[0].float()))
        return (*(next(grads).to(upstream[0].dtype) if need else None for need in needed), None, None, None, None)
