"""Hold the linear layers of a frozen decoder's blocks in 8 or 4 bits, through the library bitsandbytes.

    int8   W ≈ diag(s) Q,  Q ∈ int8,  s_o = max_i |W_oi| / 127                                  (arXiv 2208.07339)
    nf4    W ≈ s_b c[Q],   Q ∈ 4 bits, c the 16 quantiles of a normal distribution, one s_b for
           each block b of 64 weights; the s_b are themselves held in 8 bits                    (arXiv 2305.14314)

Only weights are quantized: a layer computes in the dtype of its input, the same in training, evaluation and generation.
(The int8 layer of bitsandbytes rounds its input too, but only outside training.) Embedding, head and norms stay as they
are; they are few, and the loss reads the head's weight.

O outputs, I inputs of a linear layer.
"""

import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.base.tensor_files import trim_heap
from adapter.errors import AdapterError

if TYPE_CHECKING:
    from adapter.methods.base import Delta

Quantization = Literal["int8", "nf4"]


class Precision(NamedTuple):
    """The precision of a frozen base in memory."""

    dtype: torch.dtype
    """Dtype that the base computes in, and of all weights that are not quantized."""
    quantization: Quantization | None = None


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "bf16": Precision(torch.bfloat16),
    "int8": Precision(torch.bfloat16, "int8"),
    "nf4": Precision(torch.bfloat16, "nf4"),
}
"""Precisions by the names that settings, headers and results use."""

_BLOCK, _SCALE_BLOCK = 64, 256
"""Weights that share a scale under nf4, and scales that share a scale of their own."""


class Int8Linear(nn.Module):
    """A frozen linear layer with its weight in int8, one scale per output.

    The quantized weight is held as buffers, so that optimizers, checkpoints and DeepSpeed, which look at parameters,
    do not see it.
    """

    delta: "Delta | None"
    QUANTIZED_FROM = torch.float16
    """The only dtype that the CUDA kernel reads."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: (O, I) in `QUANTIZED_FROM`, on the device where the layer shall be. bias: (O,), taken as it is."""
        super().__init__()
        values, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(weight)
        self.register_buffer("values", values)  # (O, I) int8
        self.register_buffer("scales", scales)  # (O,) float32, 127 times the s above
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.register_module("delta", None)

    @staticmethod
    def n_bytes(n_outputs: int, n_inputs: int) -> int:
        """Bytes of the weight's buffers."""
        return n_outputs * n_inputs + 4 * n_outputs

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that the layer computes with."""
        return bitsandbytes().functional.int8_vectorwise_dequant(self.values, self.scales).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _Int8Product.apply(x, self)
        y = y if self.bias is None else y + self.bias
        return y if self.delta is None else self.delta(x, y)


class _Int8Product(torch.autograd.Function):
    """x W' for a frozen W, which is dequantized again for the backward pass instead of being kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] @ ctx.layer.dequantize(upstream[0].dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in 4-bit NormalFloat, its scales in 8 bits; buffers, as in `Int8Linear`."""

    delta: "Delta | None"
    QUANTIZED_FROM = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: (O, I) in `QUANTIZED_FROM`, on the device where the layer shall be. bias: (O,), taken as it is."""
        super().__init__()
        packed, state = bitsandbytes().functional.quantize_4bit(
            weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        self.shape = weight.shape
        self.out_features, self.in_features = weight.shape
        self.register_buffer("packed", packed)  # two weights per byte
        self.register_buffer("scales", state.absmax)  # uint8, one per block
        self.register_buffer("scale_offset", state.offset)  # float32, their mean
        self.register_buffer("scale_scales", state.state2.absmax)  # float32, one per block of scales
        self.register_buffer("scale_code", state.state2.code)  # (256,) float32, what the 8 bits stand for
        self.bias = bias
        self.register_module("delta", None)

    @staticmethod
    def n_bytes(n_outputs: int, n_inputs: int) -> int:
        """Bytes of the weight's buffers."""
        weights = n_outputs * n_inputs
        scales = -(-weights // _BLOCK)
        return -(-weights // 2) + scales + 4 * (-(-scales // _SCALE_BLOCK) + 1 + 256)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) that the layer computes with."""
        return bitsandbytes().functional.dequantize_4bit(self.packed, self._state(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = bitsandbytes().matmul_4bit(x, self.packed, quant_state=self._state(x.dtype), bias=self.bias)
        return y if self.delta is None else self.delta(x, y)

    def _state(self, dtype: torch.dtype) -> Any:
        """The buffers as bitsandbytes takes them. Its object is made anew, because moving the layer moves buffers."""
        state = bitsandbytes().functional.QuantState
        return state(
            self.scales,
            shape=self.shape,
            dtype=dtype,
            blocksize=_BLOCK,
            quant_type="nf4",
            offset=self.scale_offset,
            state2=state(self.scale_scales, code=self.scale_code, dtype=torch.float32, blocksize=_SCALE_BLOCK),
        )


_LAYERS: dict[str, type[Int8Linear] | type[NF4Linear]] = {"int8": Int8Linear, "nf4": NF4Linear}


def bitsandbytes() -> ModuleType:
    """The library, imported on first use: it takes seconds.

    Raises AdapterError, saying how to install it, where it is missing.
    """
    if "bitsandbytes" not in sys.modules:
        # On import it warns of an optional kernel for CPUs, which none of the functions used here calls.
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise AdapterError(
            f"a base in int8 or nf4 needs the package bitsandbytes, which cannot be imported ({error}): "
            "pip install 'rayjobs[quantization]'"
        ) from error
    return bitsandbytes


def is_quantizable(model: nn.Module, name: str) -> bool:
    """True for the name of a weight that can be held in 8 or 4 bits: that of a block's linear layer."""
    owner, _, leaf = name.rpartition(".")
    return name.startswith("layers.") and leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear)


def reading_dtype(model: nn.Module, name: str, precision: Precision) -> torch.dtype:
    """The dtype that `set_weight` takes the tensor of this name in."""
    if precision.quantization and is_quantizable(model, name):
        return _LAYERS[precision.quantization].QUANTIZED_FROM
    return precision.dtype


def set_weight(model: nn.Module, name: str, value: Tensor, precision: Precision) -> None:
    """Make a tensor, in its `reading_dtype`, the frozen parameter of this name.

    Under a quantization, the linear layer of a block is replaced by a quantized one, on the tensor's device.
    """
    owner, _, leaf = name.rpartition(".")
    if precision.quantization and is_quantizable(model, name):
        linear = model.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(owner, _LAYERS[precision.quantization](value, linear.bias))
        trim_heap()  # quantizing makes some tensors of the weight's size
    else:
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def quantized_bytes(shape: Sequence[int], quantization: Quantization) -> int:
    """Bytes that a quantized weight of this shape (O, I) takes."""
    return _LAYERS[quantization].n_bytes(*shape)


def precision_of(model: nn.Module) -> str:
    """The name in `PRECISIONS` of how a decoder's base is held; the dtype's own name for another dtype."""
    for module in model.modules():
        for name, layer in _LAYERS.items():
            if isinstance(module, layer):
                return name
    dtype = next(model.parameters()).dtype
    named = (name for name, precision in PRECISIONS.items() if precision == Precision(dtype))
    return next(named, str(dtype).removeprefix("torch."))
