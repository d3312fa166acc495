"""Write models of transformers as GGUF files, as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

PERMUTED = ("llama", "smollm3")
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def write_gguf(path: Path, model: PreTrainedModel, kind: Kind = Kind.F32, *, shards: int = 0, **extra: Any) -> Path:
    """Write a model, its matrices stored as `kind`, and give the model the values that the file then has.

    shards: tensors per file; 0 for one file. extra: metadata; `rope_freqs` becomes a tensor.
    """
    config = model.config
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=shards)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (alignment := extra.pop("general.alignment", None)) is not None:
        writer.add_custom_alignment(alignment)
    if (divisors := extra.pop("rope_freqs", None)) is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
    for key, value in extra.items():
        add_value(writer, key.replace("ARCH", architecture), value)
    post_norms = "gemma2" in config.model_type or "gemma3" in config.model_type
    names = {**NAMES, **GEMMA_NAMES} if post_norms else NAMES
    for key, parameter in model.named_parameters():
        add_parameter(writer, gguf_name(key, names), parameter, architecture, config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-*.gguf"))


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def gguf_name(key: str, names: dict[str, str]) -> str:
    module, _, parameter = key.rpartition(".")
    if module in names:
        return f"{names[module]}.{parameter}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{names[module]}.{parameter}"


@torch.no_grad()
def add_parameter(writer, name: str, parameter: torch.Tensor, architecture: str, config, kind: Kind) -> None:
    values = parameter.numpy()
    heads = 0
    if architecture in PERMUTED and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        values = in_pairs(values, heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        values = values + 1
    if values.ndim == 1:
        writer.add_tensor(name, values)
        return
    stored = random_blocks(values.shape, kind) if kind in (Kind.Q4_K, Kind.Q6_K) else gguf.quantize(values, kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
    values = gguf.dequantize(stored, kind)
    parameter.copy_(torch.from_numpy(in_halves(values, heads) if heads else values))


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head 0, 1, ..., D-1 as 0, D/2, 1, D/2 + 1, ...: for rotating adjacent ones."""
    half = len(rows) // heads // 2
    order = [head * 2 * half + place + part * half for head in range(heads) for place in range(half) for part in (0, 1)]
    return rows[order]


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `in_pairs`."""
    order = in_pairs(np.arange(len(rows)), heads)
    return rows[np.argsort(order)]


def random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray:
    """Blocks of any bits, but with scales that are small numbers: the package cannot quantise to these types."""
    rng = np.random.default_rng(shape)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    places = (0, 2) if kind == Kind.Q4_K else (size - 2,)
    for place in places:
        scale = (rng.random(blocks.shape[:2]) * 0.002).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)
