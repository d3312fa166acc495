"""Cross-entropy over the labelled positions only, in chunks.

In instruction data about half of all positions carry a label, and with a vocabulary of 32,000 the head is a large part
of a training step, so the head computes the labelled rows only. While the head is frozen, the gradient with respect to
the hidden states is known as soon as the logits are: (softmax - one_hot) W, whose first factor is multiplied by
1 - (logit / cap)² under a soft cap. The forward pass computes it chunk by chunk, so at most `CHUNK_ROWS` rows of
float32 logits exist at a time, and the backward pass needs neither the logits nor the head.

B batch, T tokens, C width, V vocabulary, n labelled rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter.attention import soft_cap

IGNORE = -100
"""The label of a position that is not to be predicted. It is outside every vocabulary, so it cannot be a real id."""

CHUNK_ROWS = 512
"""Labelled rows whose logits are computed at a time."""


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that computes its gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        need_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(rows) if need_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            logits = _logits(rows[part], weight, cap)
            log_p = logits.log_softmax(-1)
            target = targets[part, None]
            loss -= log_p.gather(1, target).sum()
            if grad is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                if cap is not None:
                    p *= 1 - (logits / cap).square()
                grad[part] = p.to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream[0].to(grad.dtype), None, None, None


def summed_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Summed float32 cross-entropy of the targets (n,), each predicted by a row of the hidden states (n, C).

    weight: the head (V, C). cap: soft cap of the logits.

    It is the sum, not the mean: the caller divides by the label count of the whole global batch, so that the loss does
    not depend on how examples are split over micro-batches and workers. Without any target it is 0, and `rows` still
    get a gradient (of 0).
    """
    if weight.requires_grad:
        return F.cross_entropy(_logits(rows, weight, cap), targets, reduction="sum")
    return _FrozenHeadCrossEntropy.apply(rows, weight, targets, cap)


def _logits(rows: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    logits = F.linear(rows, weight).float()
    return logits if cap is None else soft_cap(logits, cap)
