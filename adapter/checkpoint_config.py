"""A decoder's shape in a checkpoint's JSON: Meta's `params.json`, Hugging Face's `config.json`."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from adapter.decoder import LlamaConfig, RopeScaling
from adapter.errors import CheckpointError


class DecoderSettings:
    """A JSON object in a file; every complaint names the file and the key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are both ValueErrors
            raise CheckpointError(f"{file}: not readable JSON ({error})") from error
        if not isinstance(self.values, dict):
            raise CheckpointError(f"{file}: holds a {type(self.values).__name__}, not an object")

    def get(self, key: str, default: Any = None) -> Any:
        """The value, `default` where the key is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "must be a whole number")
        if not 1 <= value < 2**31 and value != default:
            raise self.error(key, "must be at least 1 and less than 2**31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, "must be a positive number")
        return float(value)

    def error(self, key: str, complaint: str) -> CheckpointError:
        found = f"is {self.values[key]!r}" if key in self.values else "is missing"
        return CheckpointError(f"{self.file}: {key} {found}; it {complaint}")

    def config(self, **shape: Any) -> LlamaConfig:
        try:
            return LlamaConfig(**shape)
        except ValueError as error:
            raise CheckpointError(f"{self.file}: {error}") from error


def read_meta_config(params: DecoderSettings, *, hidden_dim: int, vocab_rows: int, tied_head: bool) -> LlamaConfig:
    """The shape of Meta's checkpoint.

    The tensors settle what `params.json` leaves open: `vocab_size` -1, and the hidden width, of which `multiple_of` and
    `ffn_dim_multiplier` only say how it was once chosen. The window is not in Meta's files either: LLaMA 1's, unless
    `max_seq_len` says otherwise.
    """
    n_heads = params.whole("n_heads")
    vocab_size = params.whole("vocab_size", -1)
    scaling = RopeScaling(factor=params.number("rope_scaling_factor", 8.0)) if params.get("use_scaled_rope") else None
    return params.config(
        dim=params.whole("dim"),
        n_layers=params.whole("n_layers"),
        n_heads=n_heads,
        n_kv_heads=params.whole("n_kv_heads", n_heads),
        hidden_dim=hidden_dim,
        vocab_size=vocab_rows if vocab_size == -1 else vocab_size,
        norm_eps=params.number("norm_eps", 1e-5),
        rope_theta=params.number("rope_theta", 10_000.0),
        rope_scaling=scaling,
        max_seq_len=params.whole("max_seq_len", 2048),
        tied_head=tied_head,
    )


def read_hf_config(settings: DecoderSettings) -> LlamaConfig:
    """The shape of Hugging Face's checkpoint; raises CheckpointError for whatever this decoder does not compute."""
    if settings.get("model_type") != "llama":
        raise settings.error("model_type", "must be 'llama'")
    if settings.get("hidden_act", "silu") != "silu":
        raise settings.error("hidden_act", "must be 'silu'")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if settings.get(key, False):
            raise settings.error(key, "is not supported")
    dim, n_heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    if settings.whole("head_dim", dim // n_heads) * n_heads != dim:
        raise settings.error("head_dim", f"must be hidden_size / num_attention_heads = {dim} / {n_heads}")
    theta, scaling = _rope(settings)
    return settings.config(
        dim=dim,
        n_layers=settings.whole("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=settings.whole("num_key_value_heads", n_heads),
        hidden_dim=settings.whole("intermediate_size"),
        vocab_size=settings.whole("vocab_size"),
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=settings.whole("max_position_embeddings", 2048),
        tied_head=bool(settings.get("tie_word_embeddings", False)),
    )


def _rope(settings: DecoderSettings) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    key = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    rope = settings.get(key, {})
    if not isinstance(rope, dict):
        raise settings.error(key, "must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if kind not in ("default", "llama3") or partial != 1.0:
        raise settings.error(key, "must be of kind 'default' or 'llama3', over whole heads")
    numbers = {name: rope[name] for name in rope if name not in ("rope_type", "type")}
    numbers.setdefault("rope_theta", settings.get("rope_theta", 10_000.0))
    wanted = ["rope_theta"]
    if kind == "llama3":
        wanted += ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for name in wanted:
        value = numbers.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise settings.error(key, f"must give {name} as a positive number")
    theta = float(numbers["rope_theta"])
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        factor=float(numbers["factor"]),
        low_freq_factor=float(numbers["low_freq_factor"]),
        high_freq_factor=float(numbers["high_freq_factor"]),
        original_length=int(numbers["original_max_position_embeddings"]),
    )


def hf_settings(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a decoder, readable by transformers 4 and 5."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := config.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_length,
        }
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_scaling": rope if config.rope_scaling else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": name,
        "dtype": name,
    }
