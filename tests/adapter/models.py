"""Tiny random decoders, ours and transformers' with the same weights. Sizes are distinct primes where shapes allow."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig as PeerConfig
from transformers import LlamaForCausalLM

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig

MHA: dict[str, Any] = {
    "dim": 42,
    "n_layers": 5,
    "n_heads": 3,
    "n_kv_heads": 3,
    "hidden_dim": 59,
    "vocab_size": 101,
    "max_seq_len": 47,
    "norm_eps": 1e-5,
}
GQA: dict[str, Any] = {**MHA, "dim": 60, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-6}

PEER_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "feed_forward": "mlp",
    **{f"w{letter}": f"{letter}_proj" for letter in "qkvo"},
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights at a scale at which attention, gates and logits are far from flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                if not parameter.requires_grad:
                    continue  # fixed at one
                parameter.normal_(std=0.7, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(mean=1.0, std=0.2, generator=generator)
            elif name.endswith("prompt") or "embeddings" in name:
                parameter.normal_(generator=generator)
            else:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5, generator=generator)


def llama(shape: dict[str, Any], adaption: AdaptionConfig | None = None, seed: int = 0) -> Decoder:
    """A decoder with random weights, its adapter's gates included."""
    model = Decoder(DecoderConfig(**shape))
    if adaption is not None:
        model.add_adapter(adaption)
    randomise(model, seed)
    return model


def tokens(batch: int, length: int, vocab_size: int = 101, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def peer_name(name: str) -> str:
    return ".".join(PEER_NAMES.get(part, part) for part in name.split("."))


def peer(model: Decoder) -> LlamaForCausalLM:
    """transformers' decoder with the weights of ours; an adapter is left behind."""
    config = model.config
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    theirs = LlamaForCausalLM(
        PeerConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.hidden_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            max_position_embeddings=config.max_seq_len,
            tie_word_embeddings=config.tied_head,
        )
    )
    weights = {peer_name(name): weight.detach() for name, weight in model.base_parameters()}
    if config.tied_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()
