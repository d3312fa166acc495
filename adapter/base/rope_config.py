"""RoPE in a Hugging Face `config.json`: `rope_parameters` as transformers 5 writes it, `rope_scaling` as 4 did."""

import math
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, model_validator
from typing_extensions import Self

from adapter.base.json_config import JsonConfig, PositiveFloat
from adapter.rope import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling

_LENGTH = "original_max_position_embeddings"
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
    "longrope": ("short_factor", "long_factor"),
}
_KEYS = {"original_length": _LENGTH, "short_factors": "short_factor", "long_factors": "long_factor"}
"""Fields of a scaling → their keys, where they differ."""


class RopeConfig(JsonConfig):
    """The rotary embedding of a model, or of its layers of one type."""

    rope_type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = Field(
        default="default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: PositiveFloat | None = None
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0
    """Only whole heads are rotated here."""
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: list[PositiveFloat] | None = None
    long_factor: list[PositiveFloat] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_flat(cls, values: Any) -> Any:
        if isinstance(values, dict) and (nested := [key for key, value in values.items() if isinstance(value, dict)]):
            raise ValueError(f"{nested[0]}: this family has one RoPE for all layers")
        return values

    @model_validator(mode="after")
    def _check_required(self) -> Self:
        for name in _REQUIRED.get(self.rope_type, ()):
            if getattr(self, name) is None:
                what = "numbers" if self.rope_type == "longrope" else "a positive number"
                raise ValueError(f"it must give {name} as {what}")
        return self

    def scaling(self, max_positions: int, original: int | None = None) -> RopeScaling | None:
        """The scaling of the frequencies, completed as transformers does; None for rope_type 'default'.

        max_positions: `max_position_embeddings`. original: the length of the first training, if the file states it
        outside the rotary embedding, which then counts.
        """
        original = original or int(self.original_max_position_embeddings or max_positions)
        factor = self.factor or max_positions / original
        match self.rope_type:
            case "linear":
                return LinearScaling(factor=factor)
            case "dynamic":
                return DynamicScaling(factor=factor, original_length=max_positions)
            case "llama3":
                return Llama3Scaling(
                    factor=factor,
                    low_freq_factor=self.low_freq_factor or 1.0,
                    high_freq_factor=self.high_freq_factor or 4.0,
                    original_length=original,
                )
            case "yarn":
                return YarnScaling(
                    factor=factor,
                    original_length=original,
                    attention_factor=self.attention_factor or self._yarn_attention(factor),
                    beta_fast=self.beta_fast,
                    beta_slow=self.beta_slow,
                    truncate=self.truncate,
                )
            case "longrope":
                stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
                return LongRopeScaling(
                    short_factors=tuple(self.short_factor or ()),
                    long_factors=tuple(self.long_factor or ()),
                    original_length=original,
                    attention_factor=self.attention_factor or stretched,
                )
        return None

    def window(self, max_positions: int, original: int | None = None) -> int:
        """The longest sequence, in tokens. With dynamic and YaRN scaling a file may state the trained length alone.

        max_positions, original: as in `scaling`.
        """
        scaling = self.scaling(max_positions, original)
        if isinstance(scaling, DynamicScaling | YarnScaling):
            return max(max_positions, int(scaling.factor * scaling.original_length))
        return max_positions

    def _yarn_attention(self, factor: float) -> float:
        def magnitude(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude(1)


def rope_values(scaling: RopeScaling | None) -> dict[str, Any]:
    """The content of `rope_parameters` for a scaling, without θ."""
    if scaling is None:
        return {"rope_type": "default"}
    values = {_KEYS.get(name, name): value for name, value in asdict(scaling).items()}
    if isinstance(scaling, DynamicScaling):
        del values[_LENGTH]  # it is the model's `max_position_embeddings`
    lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
    return {"rope_type": scaling.kind, **values, **lists}
