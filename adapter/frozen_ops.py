"""Operations of a frozen decoder that keep less for the backward pass than autograd, and pass over memory less often.

Each computes what the plain operations compute, to the bit, and its gradient in closed form. What can be computed again
from an operation's inputs is not kept.

C width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up; only the two inputs are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = upstream[0]
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors of one shape."""
    needs_grad = gate.requires_grad or up.requires_grad
    return _GatedSilu.apply(gate, up) if needs_grad else F.silu(gate).mul_(up)


class _FrozenRMSNorm(torch.autograd.Function):
    """RMSNorm with a weight that is not trained; keeps its input and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        grad, x32 = (upstream[0] * weight).float(), x.float()
        inner = (grad * x32).sum(-1, keepdim=True)
        return torch.addcmul(grad.mul_(scale), x32, inner * scale.pow(3) / -x.shape[-1]).to(x.dtype), None, None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x, and 1 / rms(x)."""
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * scale).to(x.dtype) * weight, scale


def frozen_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (C); the first factor is computed in float32, in x's dtype then."""
    return _FrozenRMSNorm.apply(x, weight, eps) if x.requires_grad else _rms_norm(x, weight, eps)[0]
