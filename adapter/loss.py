"""Cross-entropy over the labelled positions only.

In instruction data about half of all positions carry a label, and at a vocabulary of 32,000 the head is a large part of
a step, so the head sees labelled rows only. While the head is frozen, the gradient with respect to the hidden states is
known as soon as the logits are: (softmax - one_hot) W. It is taken chunk by chunk in the forward pass, so no more than
`CHUNK_ROWS` rows of float32 logits ever exist, and the backward pass needs neither logits nor head.

B batch, T tokens, C width, V vocabulary, n labelled rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label of a position without one; outside every vocabulary, so never mistaken for padding or `<unk>`."""

CHUNK_ROWS = 512


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(rows) if need_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            log_p = F.linear(rows[part], weight).float().log_softmax(-1)
            target = targets[part, None]
            loss -= log_p.gather(1, target).sum()
            if grad is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                grad[part] = p.to(weight.dtype) @ weight
        if grad is not None:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * upstream[0].to(grad.dtype), None, None


def labelled_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The summed float32 cross-entropy of next-token prediction at labelled positions.

    hidden (B, T, C), weight (V, C), labels (B, T) aligned with the input tokens: row t - 1 predicts labels[:, t]. The
    sum, not the mean: the caller divides by the label count of the whole global batch, so that the loss does not depend
    on how examples are split over micro-batches and workers. Without a label it is 0, still attached to `hidden`.
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORE
    rows, targets = hidden[:, :-1][wanted], targets[wanted]
    if weight.requires_grad:
        return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="sum")
    return _FrozenHeadCrossEntropy.apply(rows, weight, targets)
