"""Fold an adapter into its base's own weights, where the method allows it.

LoRA, (IA)³, biases, and LLaMA-Adapter V2 without prompts are linear in a layer's input, so that a plain layer computes
the same (the `fold` of each part has its equation). Prompts are not: what they add depends on the words.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from adapter.base.quantization import precision_of
from adapter.decoder import Decoder
from adapter.errors import AdapterError
from adapter.methods.base import deltas


@torch.no_grad()
def merge_adapter(model: Decoder) -> None:
    """Fold the adapter into the base, which is then a plain decoder that computes the same, up to rounding.

    Sums are made in float32 and rounded once to the precision of the base. Where a layer gets a bias, all layers of its
    kind get one, and the decoder's configuration says so. After full fine-tuning the adapter is the base already.

    Raises AdapterError, and leaves the model as it was, without an adapter, with prompts, and on a quantized base.
    """
    if model.adapter is None:
        raise AdapterError("the model holds no adapter to merge; add or load one first")
    if model.adaptions or model.image_adaptions:
        raise AdapterError(
            f"the adapter ({model.adapter.describe()}) cannot be merged: what prompts add depends on the words, and no "
            "weights of the base express it"
        )
    if (precision := precision_of(model)) in ("int8", "nf4"):
        raise AdapterError(
            f"the base is held in {precision}, which cannot take an adapter's values: load it in fp32 or bf16"
        )
    biased = False
    for _, linear, delta in list(deltas(model)):
        bias = None if linear.bias is None else linear.bias.float()
        weight, bias = delta.fold(linear.weight.float(), bias)
        linear.weight.copy_(weight)
        if bias is not None:
            biased = biased or linear.bias is None
            linear.bias = _frozen(bias, linear.weight)
    for norm in model.stream_norms:
        if norm.shift is not None:
            norm.weight.copy_(norm.shift(norm.weight))
    model.take_parts_off()
    model.requires_grad_(False)
    if biased:
        _give_all_biases(model)


def _give_all_biases(model: Decoder) -> None:
    """Give every linear layer of a block a bias, of zeros where it has none, as the configuration then states."""
    model.config = replace(model.config, qkv_bias=True, out_bias=True, ffn_bias=True)
    for block in model.blocks:
        block.attention.has_bias = True
        for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
            if linear.bias is None:
                linear.bias = _frozen(torch.zeros(linear.out_features), linear.weight)


def _frozen(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.device, like.dtype), requires_grad=False)
