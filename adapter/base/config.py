"""Read a decoder's shape from Meta's `params.json` or Hugging Face's `config.json`, and write the latter.

Of each file only the keys declared below are read. Null counts as absent.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from typing_extensions import Self

from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError, CheckpointError
from adapter.file_kind import check_content
from adapter.rope import Llama3Scaling

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class JsonConfig(BaseModel):
    """Base class for a JSON object in a file. Every error names the file and the key."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    _file: Path = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a file. Raises CheckpointError for JSON that is malformed, or a value that is missing or unusable."""
        check_content(file, CheckpointError)
        try:
            values = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:  # malformed JSON and malformed UTF-8 are both ValueErrors
            raise CheckpointError(f"{file}: not readable JSON ({error})") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: holds a {type(values).__name__}, not an object")
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise CheckpointError(f"{file}: {_first_fault(error, values)}") from error
        config._file = file
        return config

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self._file}: {message}")

    def decoder_shape(self, **shape: Any) -> DecoderConfig:
        """A decoder's shape. Raises CheckpointError, naming the file, for an impossible one."""
        try:
            return DecoderConfig(**shape)
        except AdapterError as error:
            raise self.error(str(error)) from error


def _first_fault(error: ValidationError, values: dict[str, Any]) -> str:
    fault = error.errors()[0]
    key = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"{key} is {'None' if key in values else 'missing'}, but required"
    reason = fault["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{key} is {fault['input']!r}; {reason}"


class MetaConfig(JsonConfig):
    """Meta's `params.json`."""

    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: PositiveInt | None = None
    vocab_size: Annotated[int, Field(ge=-1, lt=2**31)] = -1
    """-1 if only the embedding's shape tells."""
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10_000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: PositiveFloat = 8.0
    max_seq_len: PositiveInt = 2048
    """Meta's own files do not state the window; the default is LLaMA 1's."""

    def decoder_config(self, *, hidden_dim: int, vocab_rows: int, tied_head: bool) -> DecoderConfig:
        """The decoder's shape, completed by what only the tensors tell.

        hidden_dim: the feed-forward width; the file has only `multiple_of` and `ffn_dim_multiplier`, from which it was
        once computed. vocab_rows: rows of the embedding. tied_head: whether the checkpoint has no output head.
        """
        return self.decoder_shape(
            dim=self.dim,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            hidden_dim=hidden_dim,
            vocab_size=vocab_rows if self.vocab_size == -1 else self.vocab_size,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            rope_scaling=Llama3Scaling(factor=self.rope_scaling_factor) if self.use_scaled_rope else None,
            max_seq_len=self.max_seq_len,
            tied_head=tied_head,
        )


class RopeConfig(JsonConfig):
    """The rotary embedding in `config.json`: the kinds that this decoder computes."""

    rope_type: Literal["default", "llama3"] = Field(
        default="default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Only whole heads are rotated here."""
    factor: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check_llama3(self) -> Self:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            if self.rope_type == "llama3" and getattr(self, name) is None:
                raise ValueError(f"it must give {name} as a positive number")
        return self

    @property
    def scaling(self) -> Llama3Scaling | None:
        """None for rope_type 'default'."""
        if self.rope_type == "default":
            return None
        assert self.factor is not None  # see _check_llama3
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        assert self.original_max_position_embeddings is not None
        return Llama3Scaling(
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_length=int(self.original_max_position_embeddings),
        )


class HFConfig(JsonConfig):
    """Hugging Face's `config.json`. Whatever this decoder does not compute is refused."""

    model_type: Literal["llama"]
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    quantization_config: None = None
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    vocab_size: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = False
    rope_parameters: RopeConfig | None = None
    """As transformers 5 writes it."""
    rope_scaling: RopeConfig | None = None
    """As transformers 4 writes it, beside `rope_theta`."""
    rope_theta: PositiveFloat = 10_000.0
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0

    def decoder_config(self) -> DecoderConfig:
        """The decoder's shape. Raises CheckpointError for an impossible one."""
        dim, n_heads = self.hidden_size, self.num_attention_heads
        if self.head_dim is not None and self.head_dim * n_heads != dim:
            raise self.error(
                f"head_dim is {self.head_dim}; it must be hidden_size / num_attention_heads = {dim} / {n_heads}"
            )
        rope = self.rope_parameters or self.rope_scaling or RopeConfig()
        return self.decoder_shape(
            dim=dim,
            n_layers=self.num_hidden_layers,
            n_heads=n_heads,
            n_kv_heads=self.num_key_value_heads or n_heads,
            hidden_dim=self.intermediate_size,
            vocab_size=self.vocab_size,
            norm_eps=self.rms_norm_eps,
            rope_theta=rope.rope_theta or self.rope_theta,
            rope_scaling=rope.scaling,
            max_seq_len=self.max_position_embeddings,
            tied_head=self.tie_word_embeddings,
        )


class HFIndex(JsonConfig):
    """Hugging Face's index of a checkpoint in several files."""

    weight_map: dict[str, str]
    """Key of each tensor → name of its file."""


def hf_config(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of `config.json` for a decoder, which transformers 4 and 5 can read."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling := config.rope_scaling, Llama3Scaling):
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
