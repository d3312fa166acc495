"""Every family equals transformers' model of it: logits, generation, and what an adapter in it learns."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from adapter.adapter_file import apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder, open_checkpoint, save_decoder
from adapter.decoder import Decoder
from adapter.errors import CheckpointError
from adapter.generate import generate
from adapter.image_projection import ImageProjectionConfig
from tests.adapter.models import tokens

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 60, "intermediate_size": 59, "num_hidden_layers": 7, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 97, "initializer_range": 0.15, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 3}
ROPE = {"rope_theta": 500.0, "factor": 4.0}
EARLY = {**ROPE, "original_max_position_embeddings": 23}
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7, 1.9], "long_factor": [2.0, 2.3, 2.9, 3.1, 3.7]}


def scaled(kind: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
    return "llama", {"rope_parameters": {"rope_type": kind, **parameters}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 14}),
    "mistral": ("mistral", {"sliding_window": 11, "head_dim": 14}),
    "qwen2": ("qwen2", WINDOW),
    "qwen3": ("qwen3", {**WINDOW, "head_dim": 14}),
    "qwen3 with biases": ("qwen3", {"head_dim": 14, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {**WINDOW, "mlp_bias": True}),
    "gemma": ("gemma", {"head_dim": 14}),
    "gemma2": ("gemma2", {"head_dim": 14, "query_pre_attn_scalar": 31, "sliding_window": 11,
                          "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}),
    "gemma3": ("gemma3_text", {"head_dim": 14, "query_pre_attn_scalar": 31, "sliding_window": 11,
                               "final_logit_softcapping": 2.5}),
    "gemma3 scaled": ("gemma3_text", {"head_dim": 14, "sliding_window": 11, "rope_parameters": {
        "full_attention": {"rope_type": "linear", **ROPE},
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}}),
}  # fmt: skip
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": scaled("linear", **ROPE),
    "dynamic": scaled("dynamic", **ROPE),
    "yarn": scaled("yarn", **EARLY),
    "yarn, not truncated": scaled("yarn", **EARLY, truncate=False, beta_fast=1.5, beta_slow=0.3, mscale=0.7,
                                  mscale_all_dim=1.3),
    "longrope": scaled("longrope", **EARLY, **FACTORS),
    "longrope without a factor": scaled("longrope", **{**EARLY, "factor": None}, **FACTORS),
    "llama3": scaled("llama3", **EARLY, low_freq_factor=1.0, high_freq_factor=4.0),
}  # fmt: skip
families = pytest.mark.parametrize("name", FAMILIES)


def theirs(name: str, seed: int = 0) -> PreTrainedModel:
    """transformers' model of a family, with random weights."""
    model_type, changes = {**FAMILIES, **ROPES}[name]
    if name == "dynamic":
        changes = {**changes, "max_position_embeddings": 23}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes})).eval()
    centre = float("gemma" not in model_type)
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, centre if "norm" in key else 0.0, 0.3)
    return model


def pair(name: str, folder: Path) -> tuple[Decoder, PreTrainedModel]:
    """Our decoder and transformers' of the same checkpoint."""
    peer = theirs(name)
    peer.save_pretrained(folder)
    return load_decoder(folder), peer


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
@torch.no_grad()
def test_logits_equal_transformers_to_the_bit(name: str, tmp_path: Path) -> None:
    ours, peer = pair(name, tmp_path)
    for length in (43, 7, 19):  # longer than the window and the first training, then within both
        ids = tokens(3, length)
        assert torch.equal(ours(ids), peer(ids).logits)


@pytest.mark.parametrize("name", [*FAMILIES, *ROPES])
@torch.no_grad()
def test_what_is_saved_is_the_same_model_of_the_same_family(name: str, tmp_path: Path) -> None:
    ours, peer = pair(name, tmp_path / "theirs")
    save_decoder(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(peer)
    ids = tokens(2, 43)
    assert torch.equal(again(ids).logits, peer(ids).logits)
    one, two = open_checkpoint(tmp_path / "theirs"), open_checkpoint(tmp_path / "ours")
    assert two.config == one.config
    assert two.fingerprint() == one.fingerprint()


SPELLINGS: dict[str, dict[str, Any]] = {
    "mistral without a window": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "mistral's window by default": {"model_type": "mistral"},
    "qwen2 with its window off": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 11,
                                  "max_window_layers": 3, "rope_theta": 1e6},
    "qwen2 stretched": {"model_type": "qwen2", "rope_theta": 1e3,
                        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 23}},
    "qwen3": {"model_type": "qwen3", "head_dim": 14, "rope_scaling": None, "sliding_window": None},
    "llama with a length beside its scaling": {"model_type": "llama", "original_max_position_embeddings": 23,
                                               "rope_scaling": {"type": "longrope", **FACTORS}},
    "llama with two scalings": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0},
                                "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1, 0, 1, 1, 1], "rope_theta": 5e6},
    "smollm3 by interval": {"model_type": "smollm3", "no_rope_layer_interval": 3},
    "gemma's first name of its activation": {"model_type": "gemma", "head_dim": 14, "hidden_act": "gelu"},
    "gemma2": {"model_type": "gemma2", "head_dim": 14, "query_pre_attn_scalar": 31, "sliding_window": 11,
               "hidden_act": "gelu", "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    "gemma2 without caps": {"model_type": "gemma2", "head_dim": 14, "attn_logit_softcapping": None,
                            "final_logit_softcapping": None},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 14, "sliding_window": 11, "sliding_window_pattern": 3,
               "rope_theta": 1e4, "rope_local_base_freq": 77.0,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3 by default": {"model_type": "gemma3_text", "head_dim": 14},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_configs_as_older_releases_wrote_them_are_read_as_transformers_reads_them(
    spelling: str, tmp_path: Path
) -> None:
    """Keys that are absent or null mean the family's default or none, as the family has it."""
    values = {**SIZES, **SPELLINGS[spelling]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    peer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids = tokens(3, 43)
    torch.testing.assert_close(load_decoder(tmp_path)(ids), peer(ids).logits, rtol=0, atol=1e-5)


@families
@torch.no_grad()
def test_bf16_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    _, peer = pair(name, tmp_path)
    ours, ids = load_decoder(tmp_path, dtype=torch.bfloat16), tokens(3, 43)
    half, exact = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), peer(ids).logits
    assert torch.equal(ours(ids), half(ids).logits)
    assert (ours(ids).float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", [*FAMILIES, "yarn"])
def test_greedy_generation_equals_transformers(name: str, tmp_path: Path) -> None:
    """A ragged batch through one cache, past the window, against one prompt at a time."""
    ours, peer = pair(name, tmp_path)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 29, 13)]
    answers = generate(ours, prompts, eos_ids={2}, temperature=0, max_new_tokens=13)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = peer.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=13, eos_token_id=2, pad_token_id=0
        )
        expected = expected[0, len(prompt) :].tolist()
        assert answer == (expected[:-1] if expected[-1] == 2 else expected)
    assert max(map(len, answers)) == 13


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_generation_past_the_first_training_equals_transformers(name: str, tmp_path: Path) -> None:
    """Frequencies change with the length, while the cache keeps the keys as they were."""
    ours, peer = pair(name, tmp_path)
    prompt = tokens(1, 13)
    (answer,) = generate(ours, prompt.tolist(), eos_ids=(), temperature=0, max_new_tokens=37)
    expected = peer.generate(prompt, do_sample=False, max_new_tokens=37, eos_token_id=None, pad_token_id=0)
    assert answer == expected[0, 13:].tolist()


class Prompted(nn.Module):
    """An adapter for a model of transformers, from the paper's equations: prompts (L, n, K, C) per row, or n = 1."""

    def __init__(self, peer: PreTrainedModel, ours: Decoder) -> None:
        super().__init__()
        self.prompts = nn.ParameterList(a.prompt.detach().clone() for a in ours.adaptions)
        self.gates = nn.ParameterList(a.gate.detach().clone() for a in ours.adaptions)
        self.images: Tensor | None = None
        self.first = len(peer.model.layers) - len(self.prompts)
        for layer in peer.model.layers:
            object.__setattr__(layer.self_attn, "prompted", self)
        base = peer.config._attn_implementation
        attention = eager_attention_forward if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
        AttentionInterface.register("prompted", prompted_attention(attention))
        AttentionMaskInterface.register("prompted", ALL_MASK_ATTENTION_FUNCTIONS[base])
        peer.set_attn_implementation("prompted")


def prompted_attention(base: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        words, _ = base(module, query, key, value, mask, **kwargs)
        adapter, index = module.prompted, module.layer_idx - module.prompted.first
        if index < 0:
            return words, None
        prompt = adapter.prompts[index].expand(len(query), -1, -1)  # (B, K, C)
        if adapter.images is not None:
            prompt = prompt + adapter.images[:, None]
        shape = (*prompt.shape[:2], -1, module.head_dim)
        keys, values = module.k_proj(prompt).view(shape), module.v_proj(prompt).view(shape)
        keys = module.k_norm(keys) if hasattr(module, "k_norm") else keys
        rows = []
        for head in range(query.shape[1]):
            group = head // module.num_key_value_groups
            scores = query[:, head] @ keys[:, :, group].transpose(1, 2) * kwargs["scaling"]
            if (cap := kwargs.get("softcap")) is not None:
                scores = cap * torch.tanh(scores / cap)
            rows.append(torch.tanh(adapter.gates[index][head]) * (scores.softmax(-1) @ values[:, :, group]))
        return words + torch.stack(rows, dim=2), None

    return attention


def adapted(name: str, folder: Path, vision: ImageProjectionConfig | None = None) -> tuple[Decoder, Any, Prompted]:
    ours, peer = pair(name, folder)
    ours.add_adapter(AdaptionConfig(n_layers=3, prompt_length=5, vision=vision), torch.Generator().manual_seed(3))
    for adaption in ours.adaptions:
        nn.init.normal_(adaption.gate, std=0.7)
    peer.requires_grad_(False)
    return ours, peer, Prompted(peer, ours)


def their_loss(peer: Any, ids: Tensor) -> Tensor:
    logits = peer(ids).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")


@families
def test_an_adapter_learns_in_a_family_what_the_equations_say(name: str, tmp_path: Path) -> None:
    """Prompts take the layer's bias, key norm, scale and cap, but neither RoPE nor its window; the loss its cap."""
    ours, peer, prompted = adapted(name, tmp_path)
    ids = tokens(2, 31)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), peer(ids).logits, rtol=0, atol=2e-5)
    loss, expected = ours(ids, ids), their_loss(peer, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for adaption, prompt, gate in zip(ours.adaptions, prompted.prompts, prompted.gates, strict=True):
        torch.testing.assert_close(adaption.prompt.grad, prompt.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(adaption.gate.grad, gate.grad, rtol=1e-3, atol=1e-4)
        assert prompt.grad is not None
        assert prompt.grad.abs().max() > 1e-2


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3 with biases", "gemma2", "gemma3"])
def test_a_prompt_and_an_image_share_one_bias_and_one_norm(name: str, tmp_path: Path) -> None:
    """In training and through a cache, for rows with and without an image."""
    ours, peer, prompted = adapted(name, tmp_path, ImageProjectionConfig(widths=(5, 3), bottleneck=4))
    assert ours.vision is not None
    features, ids = torch.randn(2, 8), tokens(3, 17)
    images = ours.batch_images([features[0], None, features[1]])
    with torch.no_grad():
        prompted.images = torch.zeros(3, 60).index_copy(0, torch.tensor([0, 2]), ours.vision(features))
        torch.testing.assert_close(ours(ids, images=images), peer(ids).logits, rtol=0, atol=2e-5)
    prompts = [row.tolist() for row in ids]
    answers = generate(
        ours, prompts, eos_ids={2}, temperature=0, max_new_tokens=7, images=[features[0], None, features[1]]
    )
    for row, answer in enumerate(answers):
        prompted.images = torch.zeros(1, 60) if row == 1 else ours.vision(features[[0, None, 1][row] or 0][None])
        for place, token in enumerate(answer):
            seen = torch.tensor([prompts[row] + answer[:place]])
            assert int(peer(seen).logits[0, -1].argmax()) == token
    assert any(answers)


def test_an_adapter_is_refused_on_a_base_of_equal_shape_with_other_switches(tmp_path: Path) -> None:
    qwen, _, _ = adapted("qwen3", tmp_path / "qwen3")
    extract_adapter(qwen).save(tmp_path / "adapter.safetensors")
    file = read_adapter(tmp_path / "adapter.safetensors")
    apply_adapter(load_decoder(tmp_path / "qwen3"), file)
    mistral, _ = pair("mistral", tmp_path / "mistral")
    with pytest.raises(CheckpointError, match=r'the switches .*"qk_norm": true.*, this base has {"head_dim": 14'):
        apply_adapter(mistral, file)
    plain, _, _ = adapted("llama", tmp_path / "llama")
    extract_adapter(plain).save(tmp_path / "llama.safetensors")
    with safe_open(tmp_path / "llama.safetensors", "pt") as stored:
        assert "base_switches" not in stored.metadata(), "files for LLaMA are as they were"
    with pytest.raises(CheckpointError, match=r'base with the switches {}, this base has {"head_dim": 14'):
        apply_adapter(mistral, read_adapter(tmp_path / "llama.safetensors"))


def test_fingerprints_tell_switches_apart(tmp_path: Path) -> None:
    """Models with the same tensors are other bases if they compute otherwise."""
    prints = set()
    for name, changes in {
        "plain": {"sliding_window": None},
        "window": {"sliding_window": 11},
        "wider": {"sliding_window": 13},
        "yarn": {"sliding_window": None, "rope_parameters": {"rope_type": "yarn", **EARLY}},
    }.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model("mistral", **{**SIZES, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        prints.add(open_checkpoint(tmp_path / name).fingerprint())
    assert len(prints) == 4
