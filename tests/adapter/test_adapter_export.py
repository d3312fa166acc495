"""What is exported computes the same in the code that it is meant for; what that code would get wrong is refused."""

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor

from adapter.adapter_export import Format, export_adapter
from adapter.adapter_file import AdapterFile, apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig, Gate
from adapter.decoder import Decoder
from adapter.errors import AdapterError, CheckpointError
from adapter.image_projection import ImageProjection, ImageProjectionConfig
from tests.adapter import reference
from tests.adapter.models import GQA, MHA, llama, peer

L, K = 3, 7
IDS = [1, 7, 30, 2, 19, 11, 4]


def adapted(shape: dict[str, Any], gate: Gate = "tanh", *, per_head: bool = True) -> Decoder:
    """A tiny model with an adapter whose gates are open, in the range that tanh can give."""
    model = llama(shape, AdaptionConfig(n_layers=L, prompt_length=K, gate=gate)).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    if gate in ("tanh", "identity"):
        for adaption in model.adaptions:
            gates = torch.rand(adaption.gate.shape, generator=generator) * 1.6 - 0.8
            adaption.gate.copy_(gates if per_head else gates[:1])
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out = model(torch.tensor([IDS]))
    return (out if isinstance(out, Tensor) else out.logits)[0]


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-4, check_dtype=False)


def check_read_again(path: Path, model: Decoder, gate: Gate | None = None) -> None:
    """Our own reader gets the same model back."""
    fresh = Decoder(model.config)
    fresh.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "adaption" not in name})
    bare = logits(fresh)
    apply_adapter(fresh, read_adapter(path, gate=gate))
    close(logits(fresh), logits(model))
    assert (logits(fresh) - bare).abs().max() > 0.1


@pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("target", ["tanh", "identity"])
@pytest.mark.parametrize("gate", ["tanh", "identity"])
def test_official_v1(gate: Gate, target: Gate, shape: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(shape, gate)
    export_adapter(extract_adapter(model), tmp_path / "v1.pth", "v1", model.config, gate=target)
    state = torch.load(tmp_path / "v1.pth", weights_only=True)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {
        "adapter_query.weight": (L * K, model.config.dim),
        **{f"layers.{i}.attention.gate": (1, model.config.n_heads, 1, 1) for i in (2, 3, 4)},
    }
    prompts = state.pop("adapter_query.weight").reshape(L, K, -1)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "adaption" not in name}
    weights |= {f"layers.{i}.attention.adaption.prompt": prompt for i, prompt in enumerate(prompts, 2)}
    weights |= {key.replace("gate", "adaption.gate"): tensor.flatten() for key, tensor in state.items()}
    naive = reference.decoder(weights, model.config, IDS, AdaptionConfig(n_layers=L, prompt_length=K, gate=target))
    close(logits(model), naive)
    check_read_again(tmp_path / "v1.pth", model, gate=target)


@pytest.mark.parametrize("gate", ["tanh", "identity", "one"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_peft(family: str, gate: Gate, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(GQA, gate, per_head=False)
    export_adapter(extract_adapter(model), tmp_path / "out", "peft", model.config, base_name="a/base")
    theirs: Any = peer(model)
    if family == "mistral":
        values = {**theirs.config.to_dict(), "sliding_window": None}
        config = transformers.MistralConfig(**{k: v for k, v in values.items() if k not in ("model_type", "dtype")})
        mistral = transformers.MistralForCausalLM(config).eval()
        mistral.load_state_dict(theirs.state_dict())
        theirs = mistral
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers is renaming
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "out")
    close(logits(model), logits(theirs))
    check_read_again(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "a/base"


@pytest.mark.parametrize("gate", ["tanh", "identity", "one"])
def test_litgpt_in_naive_loops(gate: Gate, tmp_path: Path) -> None:
    model = adapted(GQA, gate)
    export_adapter(extract_adapter(model), tmp_path / "lit_model.pth.adapter", "litgpt", model.config)
    state = torch.load(tmp_path / "lit_model.pth.adapter", weights_only=True)["model"]
    weights = {name: tensor for name, tensor in model.state_dict().items() if "adaption" not in name}
    for i in (2, 3, 4):
        assert state[f"transformer.h.{i}.attn.gating_factor"].shape == (1, 1, model.config.n_heads, 1)
        weights[f"layers.{i}.attention.adaption.gate"] = state.pop(f"transformer.h.{i}.attn.gating_factor").flatten()
        weights[f"layers.{i}.attention.adaption.prompt"] = state.pop(f"transformer.h.{i}.attn.adapter_wte.weight")
    assert not state
    config = AdaptionConfig(n_layers=L, prompt_length=K, gate="identity")
    close(logits(model), reference.decoder(weights, model.config, IDS, config))
    check_read_again(tmp_path / "lit_model.pth.adapter", model)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.filterwarnings("default")
def test_litgpt_itself(kv_heads: int, tmp_path: Path) -> None:
    """Where litgpt is installed: it needs other versions than this project. Its own fault is held too."""
    lit = pytest.importorskip("litgpt.adapter")
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    shape = {**GQA, "n_kv_heads": kv_heads}
    model = adapted(shape)
    config = model.config
    theirs = lit.GPT(lit.Config(
        n_layer=config.n_layers, n_head=config.n_heads, n_query_groups=config.n_kv_heads, n_embd=config.dim,
        intermediate_size=config.hidden_dim, padded_vocab_size=config.vocab_size, vocab_size=config.vocab_size,
        block_size=config.max_seq_len, norm_eps=config.norm_eps, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0, parallel_residual=False, bias=False,
        adapter_prompt_length=K, adapter_start_layer=config.n_layers - L,
    ))  # fmt: skip
    state: dict[str, Tensor] = {}
    copy_weights_hf_llama(theirs.config, {}, state, dict(peer(model).state_dict()))
    export_adapter(extract_adapter(model), tmp_path / "lit_model.pth.adapter", "litgpt", config)
    state |= torch.load(tmp_path / "lit_model.pth.adapter", weights_only=True)["model"]
    theirs.load_state_dict(state, strict=True)
    wrong_rows = Version(metadata.version("litgpt")) >= Version("0.5.5") and kv_heads > 1
    assert torch.allclose(logits(model), logits(theirs.eval()), rtol=0, atol=1e-4) != wrong_rows


VISION = ImageProjectionConfig(widths=(5,), bottleneck=3)
Change = dict[str, Any]


def with_projection(tensors: Mapping[str, Tensor], vision: ImageProjectionConfig | None = None, **_: Any) -> Any:
    """The tensors of a file, with those of an image projection if it has one."""
    if vision is None:
        return tensors
    projection = ImageProjection(vision, tensors["prompt"].shape[2]).state_dict()
    return {**tensors, **{f"vision.{name}": tensor for name, tensor in projection.items()}}


@pytest.mark.parametrize(("format", "file", "base", "message"), [
    ("v1", {"vision": VISION}, {}, "the official v1 format cannot hold an adapter that reads images"),
    ("litgpt", {"vision": VISION}, {}, "litgpt's format cannot hold an adapter that reads images"),
    ("peft", {"gate": "prefix"}, {}, "PEFT's format cannot hold an adapter with the gate 'prefix'"),
    ("v1", {"gate": "prefix"}, {}, "with the gate 'prefix'"),
    ("peft", {}, {}, "PEFT's format has one gate per layer; the heads of layer 2 have different ones"),
    ("litgpt", {}, {"qk_norm": True}, "litgpt's format is for bases without a norm of keys"),
    ("peft", {}, {"qk_norm": True}, "PEFT's format is for bases without a norm of keys"),
    ("peft", {}, {"head_dim": 8, "qkv_bias": True}, "this base differs in head_dim 8, qkv_bias True"),
    ("peft", {}, {"out_bias": True}, "differs in out_bias True"),
    ("peft", {}, {"unrotated_layers": frozenset({3})}, r"differs in unrotated_layers \[3\]"),
])  # fmt: skip
def test_what_a_format_cannot_express(format: Format, file: Change, base: Change, message: str, tmp_path: Path) -> None:
    model = adapted(GQA)
    config = replace(model.config, **base)
    made = extract_adapter(model)
    if file:
        made = replace(made, config=replace(made.config, **file), tensors=with_projection(made.tensors, **file))
    made = replace(made, base_switches=config.switches())
    with pytest.raises(AdapterError, match=message):
        export_adapter(made, tmp_path / "x", format, config)
    assert not os.listdir(tmp_path)


def test_gates_that_have_no_counterpart(tmp_path: Path) -> None:
    for gate in ("identity", "one"):
        model = adapted(GQA, gate)
        file = extract_adapter(model)
        file = replace(file, tensors={**file.tensors, "gate": torch.ones(L, 1)})
        with pytest.raises(AdapterError, match="no counterpart under tanh; export with gate='identity'"):
            export_adapter(file, tmp_path / "x", "v1", model.config, gate="tanh")
    with pytest.raises(AdapterError, match="litgpt's format has no gates for 'tanh'"):
        export_adapter(file, tmp_path / "x", "litgpt", model.config, gate="tanh")


def test_files_and_bases_that_do_not_fit(tmp_path: Path) -> None:
    model = adapted(GQA)
    file: AdapterFile = extract_adapter(model)
    with pytest.raises(AdapterError, match=r"x\.safetensors: the official v1 format is PyTorch's own"):
        export_adapter(file, tmp_path / "x.safetensors", "v1", model.config)
    with pytest.raises(CheckpointError, match="wants hidden_dim 59, this base has 61"):
        export_adapter(file, tmp_path / "x", "v1", replace(model.config, hidden_dim=61))
    assert not os.listdir(tmp_path)
