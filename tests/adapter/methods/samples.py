"""One small configuration of every adapter method, and a decoder whose adapter is not the identity."""

from typing import Any

import torch

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.methods.base import AdapterMethod
from adapter.methods.bias import BiasConfig
from adapter.methods.full import FullConfig
from adapter.methods.ia3 import IA3Config
from adapter.methods.lora import LoraConfig
from adapter.methods.v2 import V2Config
from tests.adapter.models import randomise

LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
SMALL: dict[str, Any] = {
    "dim": 24, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 37, "vocab_size": 67, "max_seq_len": 47
}  # fmt: skip
METHODS: dict[str, AdapterMethod] = {
    "zero_init": AdaptionConfig(n_layers=2, prompt_length=5),
    "rand_init": AdaptionConfig(n_layers=2, prompt_length=5, gate="one"),
    "prefix": AdaptionConfig(n_layers=2, prompt_length=5, gate="prefix"),
    "v2": V2Config(n_layers=2, prompt_length=5),
    "lora": LoraConfig(rank=3, alpha=5.0, targets=LINEARS),
    "ia3": IA3Config(),
    "bias": BiasConfig(),
    "full": FullConfig(),
}
SMALLER: dict[str, AdapterMethod] = {
    "lora": LoraConfig(n_layers=2, rank=3),
    "ia3": IA3Config(n_layers=2),
    "bias": BiasConfig(n_layers=1),
    "v2 without prompts": V2Config(n_layers=0),
}
"""Variants that leave layers, or prompts, out."""


def base(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A frozen decoder with random weights."""
    model = Decoder(DecoderConfig(**{**SMALL, **changes}))
    randomise(model)
    return model.to(dtype).requires_grad_(False)


def add(model: Decoder, method: AdapterMethod, *, trained: bool = True) -> Decoder:
    """Put the adapter on the model, with values as if it had been trained."""
    model.add_adapter(method, torch.Generator().manual_seed(1))
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, parameter in model.adapter_parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
