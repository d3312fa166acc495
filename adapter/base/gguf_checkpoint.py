"""A model in a GGUF file: its metadata as the configuration of its family, its tensors under the decoder's names.

llama.cpp stores queries and keys of LLaMA's family as Meta does, for rotating adjacent pairs, and adds 1 to Gemma's
norms; both are undone here.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapter.base.binding import bind
from adapter.base.families import FAMILIES
from adapter.base.gguf_source import GGUFSource, open_sources
from adapter.base.tensor_names import gguf_key
from adapter.base.tensor_source import TensorSource
from adapter.decoder_config import DecoderConfig
from adapter.errors import CheckpointError
from adapter.gguf_file import GGUFFile, read_gguf
from adapter.rope import Llama3Scaling, LongRopeScaling, RopeScaling

_ROPE_DIVISORS = "rope_freqs.weight"
"""Llama 3's scaling of RoPE, as the divisor of each pair's frequency."""


@dataclass(frozen=True)
class _Architecture:
    """A family as llama.cpp stores it."""

    model_type: str
    """transformers' name of the family."""
    paired: bool = False
    """Rows of queries and keys lie in adjacent pairs."""
    norm_offset: float = 0.0
    """A number that is added to the weights of norms."""
    large: int = 0
    """Number of layers of the largest model, whose scores are scaled by the width's share of a head."""


ARCHITECTURES = {
    "llama": _Architecture("llama", paired=True),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "smollm3": _Architecture("smollm3", paired=True),
    "gemma": _Architecture("gemma", norm_offset=1.0),
    "gemma2": _Architecture("gemma2", norm_offset=1.0, large=46),
    "gemma3": _Architecture("gemma3_text", norm_offset=1.0, large=62),
}
"""`general.architecture` → how it is stored. Mistral's models call themselves `llama`."""


def open_gguf(path: Path) -> tuple[DecoderConfig, dict[str, TensorSource]]:
    """The configuration of a GGUF file, and a source of each of the decoder's parameters; no value is read.

    Raises CheckpointError, naming file and key, for a file that is damaged, or whose model, or whose way to store a
    tensor, is not supported.
    """
    file = read_gguf(path, CheckpointError)
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path}: general.architecture is {name!r}; supported are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    family = FAMILIES[architecture.model_type].parse(_hf_values(file, name, architecture), path)
    config = family.decoder_config()
    sources = open_sources(file.tensors)
    if divisors := sources.pop(_ROPE_DIVISORS, None):
        config = replace(config, rope_scaling=_scaling(config, divisors.read()))
    bound = bind(config, dict(sources), gguf_key, path)
    return config, {name: _restored(name, source, config, architecture) for name, source in bound.items()}


def _restored(name: str, source: TensorSource, config: DecoderConfig, architecture: _Architecture) -> TensorSource:
    """A source that gives what the decoder wants, whatever llama.cpp made of it."""
    assert isinstance(source, GGUFSource)
    module = name.split(".")[-2]
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(module, 0)
    if heads and architecture.paired:
        return replace(source, paired_heads=heads)
    return replace(source, offset=architecture.norm_offset) if module.endswith("norm") else source


def _hf_values(file: GGUFFile, name: str, architecture: _Architecture) -> dict[str, Any]:
    """The model's settings as its `config.json` would state them."""

    def optional(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{name}.{key}", default)

    def require(key: str) -> int:
        return file.require(f"{name}.{key}", int)

    if experts := optional("expert_count"):
        raise file.error(f"{file.path}: a mixture of {experts} experts; only dense models are supported")
    if "token_embd.weight" not in file.tensors:
        raise file.error(f"{file.path}: token_embd.weight is missing; the file holds no whole model")
    dim, layers = require("embedding_length"), require("block_count")
    heads = optional("attention.head_count") or require("attention.head_count")
    kv_heads = optional("attention.head_count_kv", heads)
    if isinstance(kv_heads, list) and kv_heads and all(count == kv_heads[0] for count in kv_heads):
        kv_heads = kv_heads[0]
    head_dim = optional("attention.key_length", dim // heads if isinstance(heads, int) and heads > 0 else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if optional(key, head_dim) != head_dim:
            raise file.error(f"{file.path}: {name}.{key} is {optional(key)}; it must be a head's width, {head_dim}")
    values = {
        "hidden_size": dim,
        "intermediate_size": require("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "rms_norm_eps": file.require(f"{name}.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": require("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "rope_scaling": _rope_scaling(file, name),
        "sliding_window": optional("attention.sliding_window"),
        "attn_logit_softcapping": optional("attn_logit_softcapping"),
        "final_logit_softcapping": optional("final_logit_softcapping"),
    }
    if (theta := optional("rope.freq_base")) is not None:
        values["rope_theta"] = theta
    if architecture.large:
        values["query_pre_attn_scalar"] = (
            dim // require("attention.head_count") if layers == architecture.large else head_dim
        )
    return {key: value for key, value in values.items() if value is not None}


def _rope_scaling(file: GGUFFile, name: str) -> dict[str, Any] | None:
    """RoPE's scaling by the metadata, as `config.json` would have it."""
    kind = file.get(f"{name}.rope.scaling.type", str, "none")
    factor = file.get(f"{name}.rope.scaling.factor", float, file.get(f"{name}.rope.scale_linear", float))
    if factor and kind == "none":
        kind = "linear"
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    original = file.get(f"{name}.rope.scaling.original_context_length", float)
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original and float(original)}


def _scaling(config: DecoderConfig, divisors: torch.Tensor) -> RopeScaling:
    """The scaling that divides RoPE's frequencies so: Llama 3's if it is one of its releases', or pair by pair."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    released = Llama3Scaling(factor=round(float(divisors.max()), 3))
    plain = 1.0 / config.rope_theta**exponents
    if torch.allclose(released.frequencies(config.rope_theta, exponents, 0), plain / divisors, rtol=1e-4, atol=0):
        return released
    each = tuple(divisors.tolist())
    return LongRopeScaling(
        short_factors=each, long_factors=each, original_length=config.max_seq_len, attention_factor=1.0
    )
