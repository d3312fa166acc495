"""Lay out a frozen decoder's weights for generation on a CPU.

oneDNN multiplies by a weight in blocks of its own about twice as fast as torch multiplies by one in rows, from one
token to hundreds. An int8 weight is multiplied as it is where there are few tokens, instead of being expanded for every
product.

The products are the same up to rounding: sums of float32 run in another order, and an int8 weight is no longer rounded
to bfloat16. Prepacking is in place: the weights in rows are given up, so such a decoder neither trains nor is saved.
"""

import torch
from torch import Tensor, nn

from adapter.attention import soft_cap
from adapter.base.quantization import Int8Linear
from adapter.base.tensor_files import trim_heap
from adapter.decoder import Decoder, Head
from adapter.errors import AdapterError
from adapter.linear import Linear
from adapter.loss import summed_cross_entropy
from adapter.methods.base import Delta

TYPICAL_ROWS = 16
"""The number of tokens that oneDNN chooses blocks for; they serve others as well."""
INT8_ROWS = 8
"""Up to as many tokens are multiplied by the int8 weight as it is; more are faster on the expanded weight."""


class PrepackedLinear(nn.Module):
    """A frozen linear layer with its weight in oneDNN's blocks. It may hold a delta, as `adapter.linear.Linear`."""

    delta: Delta | None

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_module("delta", linear.delta)
        self._packed = _pack(linear.weight)

    @property
    def weight(self) -> Tensor:
        """Raises AdapterError: who asks for the weight wants to change or save it."""
        raise AdapterError("the base's weights are prepacked for generation: load it anew, to merge or save it")

    def forward(self, x: Tensor) -> Tensor:
        y = _multiply(x, self._packed, self.bias)
        return y if self.delta is None else self.delta(x, y)


class PrepackedHead(nn.Module):
    """The decoder's head with a second copy of its weight in oneDNN's blocks; losses read the first."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.weight, self.cap = head.weight, head.cap
        self._packed = _pack(head.weight)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is not None:
            return summed_cross_entropy(hidden, self.weight, targets, self.cap)
        logits = _multiply(hidden, self._packed, None)
        return logits if self.cap is None else soft_cap(logits, self.cap)


class FewRowsInt8Linear(Int8Linear):
    """An int8 layer that expands its weight for many tokens only."""

    values: Tensor
    ones: Tensor
    row_scales: Tensor

    def __init__(self, layer: Int8Linear) -> None:
        nn.Module.__init__(self)
        for name in ("values", "scales"):
            self.register_buffer(name, layer.get_buffer(name))
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.bias = layer.bias
        self.register_module("delta", layer.delta)
        self.register_buffer("ones", torch.ones(layer.out_features, dtype=torch.bfloat16))
        self.register_buffer("row_scales", layer.get_buffer("scales") / 127)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > INT8_ROWS * self.in_features or x.dtype != torch.bfloat16:
            return super().forward(x)
        # The kernel would round its scales to bfloat16, so it gets ones.
        y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.values, self.ones)
        y = y.mul_(self.row_scales).view(*x.shape[:-1], -1)
        y = y if self.bias is None else y + self.bias
        return y if self.delta is None else self.delta(x, y)


def can_prepack(model: Decoder) -> bool:
    """True for a decoder on a CPU whose oneDNN computes in the decoder's dtype."""
    weight = model.tok_embeddings.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.no_grad()
def prepack_weights(model: Decoder) -> bool:
    """Prepack the weights of a frozen decoder in place. Returns False, and changes nothing, where that is not possible.

    Layers that are trained, and those in nf4, stay as they are. Memory grows by the head's weight.
    """
    if not can_prepack(model):
        return False
    for name, module in list(model.named_modules()):
        if type(module) is Linear and not module.weight.requires_grad:
            model.set_submodule(name, PrepackedLinear(module))
        elif type(module) is Int8Linear:
            model.set_submodule(name, FewRowsInt8Linear(module))
    if isinstance(model.output, Head) and not model.output.weight.requires_grad:
        model.set_submodule("output", PrepackedHead(model.output))
    trim_heap()
    return True


def _pack(weight: Tensor) -> Tensor:
    """A weight (O, I) in oneDNN's blocks."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I) times a prepacked weight (O, I), plus a bias (O,): (..., O)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
