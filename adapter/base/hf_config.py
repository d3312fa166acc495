"""Read a decoder's shape from Hugging Face's `config.json`, and write one."""

from pathlib import Path
from typing import Any

import torch

from adapter.base.families import FAMILIES, Family
from adapter.base.rope_config import rope_values
from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.json_object import read_object
from adapter.rope import DynamicScaling

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of which a mixture of experts has one."""


def read_hf_config(file: Path) -> Family:
    """Read a `config.json`.

    Raises CheckpointError, naming file and key, for a model that the decoder does not compute.
    """
    values = read_object(file, CheckpointError)
    model_type, supported = values.get("model_type"), ", ".join(FAMILIES)
    if isinstance(text := values.get("text_config"), dict):
        raise CheckpointError(
            f"{file}: model_type is {model_type!r}, a multimodal model around a text model of type "
            f"{text.get('model_type')!r}: give a folder that holds a text model alone ({supported})"
        )
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{file}: quantization_config: the weights are quantized (quant_method {method!r}): give the checkpoint in "
            "16 or 32 bits; it can be quantized while it is loaded"
        )
    if experts := next((key for key in _EXPERTS if values.get(key)), None):
        raise CheckpointError(
            f"{file}: model_type is {model_type!r}, a mixture of experts ({experts} is {values[experts]!r}): only "
            f"dense models are supported ({supported})"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{file}: model_type is {model_type!r}; supported are {supported}")
    return FAMILIES[model_type].parse(values, file)


def hf_config(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json` for a decoder, which transformers 4 and 5 can read.

    The family is the plainest one whose reading of the file is this decoder. Raises AdapterError if there is none.
    """
    for family in FAMILIES.values():
        values = {**_common_values(config, dtype), **family.own_values(config)}
        values |= {"model_type": family.model_type, "architectures": [family.architecture]}
        try:
            if family.parse(values, Path("config.json")).decoder_config() == config:
                return values
        except CheckpointError:
            continue
    raise AdapterError(f"no model of transformers has these switches at once: {config.switches()}")


def _common_values(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    scaling, name = config.rope_scaling, str(dtype).removeprefix("torch.")
    rope = rope_values(scaling)
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "max_position_embeddings": scaling.original_length
        if isinstance(scaling, DynamicScaling)
        else config.max_seq_len,
        "tie_word_embeddings": config.tied_head,
        "pad_token_id": None,  # a family's default may lie outside the vocabulary
        "torch_dtype": name,
        "dtype": name,
    }
