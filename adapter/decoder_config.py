"""The shape of a decoder and the switches in which model families differ; the defaults are LLaMA's.

| family     | switches                                                                                           |
|------------|----------------------------------------------------------------------------------------------------|
| Llama 3    | `rope_theta`, `rope_scaling`; the small ones `tied_head`                                           |
| Mistral    | `head_dim`, `sliding_window` on every layer                                                        |
| Qwen 2     | `qkv_bias`, `sliding_window` on the upper layers                                                   |
| Qwen 3     | `head_dim`, `qk_norm`, `sliding_window` on the upper layers                                        |
| SmolLM 3   | `unrotated_layers`                                                                                 |
| Gemma      | `norm_offset`, `scaled_embeddings`, `activation`, `head_dim`, `tied_head`                          |
| Gemma 2    | as Gemma, `post_norms`, `score_dim`, `score_cap`, `logit_cap`, `sliding_window` on every other one |
| Gemma 3    | as Gemma, `post_norms`, `score_dim`, `qk_norm`, `sliding_rope_theta`, `sliding_window` on most     |

`adapter.base` reads it from a checkpoint's `params.json` or `config.json`.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from adapter.errors import AdapterError
from adapter.rope import Llama3Scaling, LongRopeScaling, RopeScaling

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's shape and switches."""

    dim: int
    """C, the model's width."""
    n_layers: int
    n_heads: int
    """H, query heads."""
    n_kv_heads: int
    """G, key/value heads."""
    hidden_dim: int
    """Width of the feed-forward layers."""
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 2048
    """The window: how many tokens a sequence may have."""
    tied_head: bool = False
    """The output head shares the embedding's weights."""

    head_dim: int = 0
    """D, channels of a head; 0 stands for C/H."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias."""
    out_bias: bool = False
    """The attention's output has a bias."""
    ffn_bias: bool = False
    """The feed-forward layers have biases."""
    qk_norm: bool = False
    """Each head's queries and keys are normalised before they are rotated."""
    sliding_window: int | None = None
    """W: in the sliding layers, a token attends to itself and the W - 1 tokens before it."""
    sliding_layers: frozenset[int] = frozenset()
    """Layers that attend within the sliding window, from 0."""
    sliding_rope_theta: float | None = None
    """RoPE's θ in the sliding layers, where it is not scaled; None if they share `rope_theta` and its scaling."""
    unrotated_layers: frozenset[int] = frozenset()
    """Layers without RoPE, from 0."""
    activation: Activation = "silu"
    """Activation of the feed-forward layers."""
    norm_offset: bool = False
    """Norms multiply by 1 + weight, in float32, instead of by weight."""
    post_norms: bool = False
    """The outputs of attention and of feed-forward are normalised too, before they join the residual stream."""
    scaled_embeddings: bool = False
    """Embeddings are multiplied by √C."""
    score_dim: int = 0
    """Attention scores are divided by its square root; 0 stands for D."""
    score_cap: float | None = None
    """Soft cap of the attention scores (see `adapter.attention.soft_cap`)."""
    logit_cap: float | None = None
    """Soft cap of the logits."""

    def __post_init__(self) -> None:
        if (not self.head_dim and self.dim % self.n_heads) or (self.head_dim or self.dim // self.n_heads) % 2:
            width = f"{self.n_heads} heads of even width{f', not {self.head_dim}' if self.head_dim else ''}"
            raise AdapterError(f"dim {self.dim} must divide into {width}")
        if self.n_heads % self.n_kv_heads:
            raise AdapterError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.sliding_layers and self.sliding_window is None:
            raise AdapterError("there are layers with sliding attention, but the window's width is not stated")
        object.__setattr__(self, "head_dim", self.head_dim or self.dim // self.n_heads)
        object.__setattr__(self, "score_dim", self.score_dim or self.head_dim)
        if isinstance(self.rope_scaling, LongRopeScaling):
            for factors in (self.rope_scaling.short_factors, self.rope_scaling.long_factors):
                if len(factors) != self.head_dim // 2:
                    raise AdapterError(f"longrope needs {self.head_dim // 2} factors, got {len(factors)}")

    def sizes(self) -> dict[str, int]:
        """The sizes that an adapter file and a fingerprint state of their base, by name."""
        return {name: getattr(self, name) for name in SIZES}

    def switches(self) -> dict[str, Any]:
        """The settings in which this decoder's function differs from LLaMA's, as JSON values, by name.

        Sizes, and what LLaMA's own releases differ in, are left out.
        """
        switches: dict[str, Any] = {}
        defaults = {field.name: field.default for field in fields(self)}
        defaults |= {"head_dim": self.dim / self.n_heads, "score_dim": self.head_dim}
        for name in _SWITCHES:
            if (value := getattr(self, name)) != defaults[name]:
                switches[name] = sorted(value) if isinstance(value, frozenset) else value
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, Llama3Scaling):
            switches["rope_scaling"] = {"kind": self.rope_scaling.kind, **asdict(self.rope_scaling)}
        return switches


SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
"""The fields of `DecoderConfig.sizes`."""

_SWITCHES = tuple(field.name for field in fields(DecoderConfig))
_SWITCHES = _SWITCHES[_SWITCHES.index("head_dim") :]
"""The fields that LLaMA's own releases leave at their defaults, but for RoPE's scaling."""
