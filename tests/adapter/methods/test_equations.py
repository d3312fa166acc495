"""Each method computes what its paper says: as PEFT does, or as a plain decoder with the weights that follow."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config as PeerIA3
from peft import LoraConfig as PeerLora
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from adapter import AdaptedModel
from adapter.base.checkpoint import load_decoder, save_decoder
from adapter.decoder import Decoder
from adapter.errors import AdapterError
from adapter.merge import merge_adapter
from adapter.methods.base import LINEARS as PATHS
from adapter.methods.base import AdapterMethod
from adapter.methods.bias import BiasConfig
from adapter.methods.ia3 import IA3Config
from adapter.methods.lora import LoraConfig
from adapter.methods.v2 import V2Config
from tests.adapter.methods.samples import LINEARS, METHODS, SMALL, add, base
from tests.adapter.models import peer, peer_name, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's

IDS = tokens(2, 13, SMALL["vocab_size"])
FOLDED = [LoraConfig(rank=3, alpha=7.0, targets=LINEARS), LoraConfig(n_layers=1), IA3Config(), BiasConfig(n_layers=2),
          V2Config(n_layers=0)]  # fmt: skip


def peer_module(model: Any, path: str) -> Any:
    return model.base_model.model.get_submodule(peer_name(path))


def assert_same_loss_and_gradients(ours: Decoder, theirs: Any, pairs: dict[str, Any]) -> None:
    """pairs: names of our parameters → PEFT's."""
    labels = IDS.clone()
    labels[:, :4] = -100
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=2e-5)
    ours(IDS, labels).backward()
    theirs(IDS, labels=labels).loss.backward()
    count = int((labels[:, 1:] >= 0).sum())
    parameters = dict(ours.adapter_parameters())
    assert parameters.keys() == pairs.keys()
    for name, parameter in pairs.items():
        torch.testing.assert_close(parameters[name].grad / count, parameter.grad.view_as(parameters[name]),
                                   rtol=1e-4, atol=1e-6)  # fmt: skip


def test_lora_is_pefts() -> None:
    method = LoraConfig(n_layers=2, rank=3, alpha=5.0, targets=("wq", "wv", "wo", "w2"))
    model = add(base(), method)
    config = PeerLora(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], layers_to_transform=[1, 2]
    )
    theirs, pairs = get_peft_model(peer(model), config), {}
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            path, _, leaf = name.rpartition(".delta.")
            layer = peer_module(theirs, path)
            pairs[name] = (layer.lora_A if leaf == "a" else layer.lora_B)["default"].weight
            pairs[name].copy_(parameter)
    assert len(pairs) == sum(one.requires_grad for one in theirs.parameters())
    assert_same_loss_and_gradients(model, theirs, pairs)


def test_loras_first_values_are_distributed_as_pefts() -> None:
    model = base(dim=96, n_heads=4, n_layers=8)
    model.add_adapter(LoraConfig(rank=16, targets=("w2",)), torch.Generator().manual_seed(0))
    theirs = get_peft_model(peer(model), PeerLora(r=16, target_modules=["down_proj"]))
    for name, parameter in model.adapter_parameters():
        layer = peer_module(theirs, name.rpartition(".delta.")[0])
        expected = (layer.lora_A if name.endswith("a") else layer.lora_B)["default"].weight
        assert parameter.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.05)
        assert parameter.square().mean().item() == pytest.approx(expected.square().mean().item(), rel=0.2)


def test_ia3_is_pefts() -> None:
    model = add(base(), IA3Config())
    config = PeerIA3(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs, pairs = get_peft_model(peer(model), config), {}
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            path = name.rpartition(".delta.")[0]
            pairs[name] = peer_module(theirs, path.replace("w3", "w2")).ia3_l["default"]
            pairs[name].copy_((1 + parameter).view_as(pairs[name]))
    assert_same_loss_and_gradients(model, theirs, pairs)


@pytest.mark.parametrize("shape", [{}, {"qkv_bias": True}], ids=["plain", "base with biases"])
@pytest.mark.parametrize("method", FOLDED, ids=lambda method: method.describe())
def test_a_merged_base_computes_the_same(method: AdapterMethod, shape: dict[str, Any], tmp_path: Path) -> None:
    """And the equations, written out on the weights, are what merging makes of them."""
    model = add(base(**shape), method)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    expected = model(IDS)
    merge_adapter(model)
    assert not list(model.adapter_parameters())
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=2e-5)
    after = dict(model.named_parameters())
    for i in range(3):
        for path in (f"layers.{i}.{path}" for path in PATHS.values()):
            weight, parts = before[f"{path}.weight"], {x: before.get(f"{path}.delta.{x}") for x in "abd"}
            bias = before.get(f"{path}.bias", torch.zeros(len(weight)))
            if isinstance(method, LoraConfig) and parts["a"] is not None:
                weight = weight + method.alpha / method.rank * parts["b"] @ parts["a"]
            elif not isinstance(method, LoraConfig):
                bias = bias + (0 if parts["b"] is None else parts["b"])
                scale = torch.ones(len(weight)) if parts["d"] is None else 1 + parts["d"]
                weight, bias = torch.diag(scale) @ weight, scale * bias
            torch.testing.assert_close(after[f"{path}.weight"], weight, rtol=1e-6, atol=1e-6)
            merged = after.get(f"{path}.bias")
            torch.testing.assert_close(torch.zeros_like(bias) if merged is None else merged, bias)
    if not shape:
        save_decoder(model, tmp_path)
        torch.testing.assert_close(load_decoder(tmp_path)(IDS), expected, rtol=0, atol=2e-5)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=0, atol=5e-5)


def test_norms_of_v2_are_the_bases_and_their_shift() -> None:
    for offset in (False, True):
        model = add(base(norm_offset=offset), V2Config(n_layers=0))
        plain = add(base(norm_offset=offset), V2Config(n_layers=0))
        with torch.no_grad():
            for ours, theirs in zip(model.stream_norms, plain.stream_norms, strict=True):
                theirs.weight += ours.shift.d
                theirs.shift.d.zero_()
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=0, atol=1e-5)
    assert len(list(model.stream_norms)) == 2 * 3 + 1


def test_v2s_prompts_pass_through_the_adapted_projections() -> None:
    """A V2 adapter is V1's prompts on the base that V2's other parts make."""
    model = add(base(), METHODS["v2"])
    expected = model(IDS)
    prompts = {n: p.detach().clone() for n, p in model.adapter_parameters() if ".adaption." in n}
    for block in model.blocks:
        block.attention.adaption = None
    merge_adapter(model)
    model.add_adapter(replace(METHODS["zero_init"]))
    with torch.no_grad():
        for name, parameter in model.adapter_parameters():
            parameter.copy_(prompts[name])
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=2e-5)


def test_what_cannot_be_merged(tiny_base: Path) -> None:
    model = AdaptedModel.from_pretrained(tiny_base)
    with pytest.raises(AdapterError, match="holds no adapter to merge"):
        model.merge_adapter()
    for name in ("zero_init", "v2"):
        model.add_adapter(METHODS[name])
        with pytest.raises(AdapterError, match="cannot be merged: what prompts add depends on the words"):
            model.merge_adapter()
    quantized = AdaptedModel.from_pretrained(tiny_base, quantization="int8")
    quantized.add_adapter(LoraConfig())
    with pytest.raises(AdapterError, match="held in int8, which cannot take an adapter's values"):
        quantized.merge_adapter()
    model.add_adapter(LoraConfig())
    model.merge_adapter()
    assert (model.model.adapter, model.fingerprint) == (None, None)
