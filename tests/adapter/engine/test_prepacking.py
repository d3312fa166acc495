"""Prepacked weights against weights in rows."""

from typing import Any

import pytest
import torch

from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adaption import AdaptionConfig
from adapter.base.quantization import Int8Linear
from adapter.engine.prepacking import FewRowsInt8Linear, PrepackedLinear, prepack_weights
from adapter.errors import AdapterError
from adapter.generate import generate
from adapter.merge import merge_adapter
from adapter.methods.ia3 import IA3Config
from adapter.methods.lora import LoraConfig
from tests.adapter.models import GQA, llama, randomise, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "plain": GQA,
    "biases": {**GQA, "qkv_bias": True, "out_bias": True, "ffn_bias": True},
    "tied and capped": {**GQA, "tied_head": True, "logit_cap": 2.5, "score_cap": 1.5},
}


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_prepacked_weights_give_the_same_logits_losses_and_tokens(shape):
    model, ids = llama(SHAPES[shape], AdaptionConfig(n_layers=3, prompt_length=7)), tokens(2, 23)
    logits, loss, names = model(ids), model(ids, ids), [name for name, _ in model.adapter_parameters()]
    answers = generate(model, [[3, 5], [7]], eos_ids=(), temperature=0, max_new_tokens=9)
    assert prepack_weights(model)
    assert sum(isinstance(module, PrepackedLinear) for module in model.modules()) == 7 * 5
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(ids, ids), loss, rtol=1e-5, atol=0)
    assert generate(model, [[3, 5], [7]], eos_ids=(), temperature=0, max_new_tokens=9) == answers
    assert [name for name, _ in model.adapter_parameters()] == names


def test_what_is_trained_is_not_prepacked():
    model = llama(GQA)
    model.requires_grad_(True)
    prepack_weights(model)
    assert not any(isinstance(module, PrepackedLinear) for module in model.modules())


@pytest.mark.parametrize("rows", [1, 5, 8, 9])
@torch.no_grad()
def test_few_rows_by_an_int8_weight_are_closer_than_by_the_expanded_one(rows):
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(59, 128, generator=generator), torch.randn(59, generator=generator).bfloat16()
    layer = Int8Linear(weight.half(), bias)
    x = torch.randn(1, rows, 128, generator=generator).bfloat16()
    exact = x.double() @ layer.dequantize(torch.float32).double().T + bias.double()
    before, after = layer(x), FewRowsInt8Linear(layer)(x)
    assert after.shape == before.shape
    assert after.dtype == before.dtype
    assert (after - exact).square().mean() <= 1.01 * (before - exact).square().mean()
    assert torch.equal(after, before) == (rows > 8)


@torch.no_grad()
def test_adapters_are_exchanged_on_prepacked_weights_but_not_merged():
    model, other = llama(GQA).requires_grad_(False), llama(GQA)
    prepack_weights(model)
    ids = tokens(2, 11)
    for method in (LoraConfig(rank=3), IA3Config(), AdaptionConfig(n_layers=3, prompt_length=7)):
        other.add_adapter(method)
        randomise(torch.nn.ModuleList(other.adapter_modules), seed=1)
        apply_adapter(model, extract_adapter(other))
        torch.testing.assert_close(model(ids), other(ids), rtol=0, atol=1e-4)
    model.add_adapter(LoraConfig(rank=3))
    with pytest.raises(AdapterError, match="prepacked for generation"):
        merge_adapter(model)
