"""Hugging Face's `config.json`, by family: its keys, their defaults, and the decoder's switches that they stand for.

A family is a `model_type` of transformers, whose reading of the file this follows.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from adapter.base.json_config import JsonConfig, LayerCount, PositiveFloat, PositiveInt
from adapter.base.rope_config import RopeConfig, rope_values
from adapter.decoder_config import DecoderConfig

LayerType = Literal["full_attention", "sliding_attention"]


class Family(JsonConfig):
    """The keys that all families have, with LLaMA's defaults."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    """Class of transformers that holds the model with its head."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: LayerCount
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    vocab_size: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    max_position_embeddings: PositiveInt = 2048
    original_max_position_embeddings: PositiveInt | None = None
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    rope_parameters: RopeConfig | None = None
    """As transformers 5 writes it."""
    rope_scaling: RopeConfig | None = None
    """As transformers 4 writes it, beside `rope_theta`; it counts where both are given."""
    rope_theta: PositiveFloat = 10_000.0
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1.0

    def decoder_config(self) -> DecoderConfig:
        """The decoder's shape and switches. Raises CheckpointError for impossible ones."""
        rope = self._rope()
        return self.decoder_shape(
            dim=self.hidden_size,
            n_layers=self.num_hidden_layers,
            n_heads=self.num_attention_heads,
            n_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            head_dim=self.head_dim or 0,
            hidden_dim=self.intermediate_size,
            vocab_size=self.vocab_size,
            norm_eps=self.rms_norm_eps,
            rope_theta=rope.rope_theta or self.rope_theta,
            rope_scaling=rope.scaling(self.max_position_embeddings, self.original_max_position_embeddings),
            max_seq_len=rope.window(self.max_position_embeddings, self.original_max_position_embeddings),
            tied_head=self.tie_word_embeddings,
            **self._switches(),
        )

    def _rope(self) -> RopeConfig:
        """RoPE of the layers with full attention."""
        return self.rope_scaling or self.rope_parameters or RopeConfig()

    def _switches(self) -> dict[str, Any]:
        """The decoder's switches in which the family differs from LLaMA."""
        return {}

    def _layer_types(self, slides: Callable[[int], Any]) -> list[LayerType]:
        return ["sliding_attention" if slides(layer) else "full_attention" for layer in range(self.num_hidden_layers)]

    def _sliding(self, window: int | None, types: Sequence[LayerType]) -> dict[str, Any]:
        if len(types) != self.num_hidden_layers:
            raise self.error(f"layer_types has {len(types)} entries for {self.num_hidden_layers} layers")
        layers = frozenset(layer for layer, kind in enumerate(types) if kind == "sliding_attention")
        return {"sliding_window": window if layers else None, "sliding_layers": layers}

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        """The family's own keys for a decoder."""
        return {}


class Llama(Family):
    """LLaMA 1 to 3.3, and what others trained in its shape, such as SmolLM 2."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    attention_bias: bool = False
    mlp_bias: bool = False

    def _switches(self) -> dict[str, Any]:
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias, "ffn_bias": self.mlp_bias}

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        return {"attention_bias": config.out_bias, "mlp_bias": config.ffn_bias}


class Mistral(Family):
    """Mistral: LLaMA with a sliding window on every layer, or none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    num_key_value_heads: PositiveInt | None = 8
    max_position_embeddings: PositiveInt = 131_072
    sliding_window: PositiveInt | None = 4096

    def _switches(self) -> dict[str, Any]:
        kind: LayerType = "sliding_attention" if self.sliding_window else "full_attention"
        return self._sliding(self.sliding_window, [kind] * self.num_hidden_layers)

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        return {"sliding_window": config.sliding_window}


class Qwen2(Family):
    """Qwen 2 and 2.5."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    num_key_value_heads: PositiveInt | None = 32
    max_position_embeddings: PositiveInt = 32_768
    use_sliding_window: bool = False
    sliding_window: PositiveInt | None = 4096
    max_window_layers: Annotated[int, Field(ge=0)] = 28
    layer_types: list[LayerType] | None = None

    def _switches(self) -> dict[str, Any]:
        window = self.sliding_window if self.use_sliding_window else None
        types = self.layer_types or self._layer_types(lambda layer: window and layer >= self.max_window_layers)
        return {"qkv_bias": True, **self._sliding(window, types)}

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        return {
            "use_sliding_window": config.sliding_window is not None,
            "max_window_layers": min(config.sliding_layers, default=config.n_layers),
            **_layer_values(config),
        }


class Qwen3(Qwen2):
    """Qwen 3, without its mixtures of experts."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    head_dim: PositiveInt | None = 128
    attention_bias: bool = False

    def _switches(self) -> dict[str, Any]:
        biases = {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias}
        return {**super()._switches(), **biases, "qk_norm": True}

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        return {**super().own_values(config), "attention_bias": config.out_bias}


class SmolLM3(Qwen2):
    """SmolLM 3: every fourth layer is without RoPE; if there is a sliding window, it is on those."""

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    num_key_value_heads: PositiveInt | None = 4
    sliding_window: PositiveInt | None = None
    tie_word_embeddings: bool = True
    rope_theta: PositiveFloat = 2_000_000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    no_rope_layers: list[int] | None = None
    """1 where a layer uses RoPE, 0 where it does not."""
    no_rope_layer_interval: PositiveInt = 4

    def _switches(self) -> dict[str, Any]:
        every, layers = self.no_rope_layer_interval, range(self.num_hidden_layers)
        rotated = self.no_rope_layers or [(layer + 1) % every for layer in layers]
        if len(rotated) < self.num_hidden_layers:
            raise self.error(f"no_rope_layers has {len(rotated)} entries for {self.num_hidden_layers} layers")
        window = self.sliding_window if self.use_sliding_window else None
        types = self.layer_types or self._layer_types(lambda layer: window and not rotated[layer])
        return {
            "qkv_bias": self.attention_bias,
            "out_bias": self.attention_bias,
            "ffn_bias": self.mlp_bias,
            "unrotated_layers": frozenset(layer for layer in layers if not rotated[layer]),
            **self._sliding(window, types),
        }

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        return {
            **super().own_values(config),
            "attention_bias": config.out_bias,
            "mlp_bias": config.ffn_bias,
            "no_rope_layers": [int(layer not in config.unrotated_layers) for layer in range(config.n_layers)],
        }


class Gemma(Family):
    """Gemma 1."""

    model_type = "gemma"
    architecture = "GemmaForCausalLM"
    num_key_value_heads: PositiveInt | None = 16
    head_dim: PositiveInt | None = 256
    max_position_embeddings: PositiveInt = 8192
    tie_word_embeddings: bool = True
    hidden_act: Literal["gelu", "gelu_pytorch_tanh"] = "gelu_pytorch_tanh"  # type: ignore[assignment]
    """Both are the approximation by tanh: the first releases said `gelu` and meant it."""
    attention_bias: bool = False
    use_bidirectional_attention: Literal[False] = False

    def _switches(self) -> dict[str, Any]:
        return {
            "qkv_bias": self.attention_bias,
            "out_bias": self.attention_bias,
            "activation": "gelu_tanh",
            "norm_offset": True,
            "scaled_embeddings": True,
        }

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        activation = dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
        return {**activation, "attention_bias": config.out_bias}


class Gemma2(Gemma):
    """Gemma 2: every other layer, from the lowest, has a sliding window."""

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    num_key_value_heads: PositiveInt | None = 4
    hidden_act: Any = None
    """Not read: some files hold another one than they were trained with."""
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    query_pre_attn_scalar: PositiveInt = 256
    sliding_window: PositiveInt | None = 4096
    layer_types: list[LayerType] | None = None
    attn_logit_softcapping: PositiveFloat | None = 50.0
    final_logit_softcapping: PositiveFloat | None = 30.0

    def _switches(self) -> dict[str, Any]:
        types = self.layer_types or self._layer_types(lambda layer: (layer + 1) % self._period())
        return {
            **super()._switches(),
            "post_norms": True,
            "score_dim": self.query_pre_attn_scalar,
            "score_cap": self.attn_logit_softcapping,
            "logit_cap": self.final_logit_softcapping,
            **self._sliding(self.sliding_window, types),
        }

    def _period(self) -> int:
        """One layer in so many has full attention."""
        return 2

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        return {
            **super().own_values(config),
            "query_pre_attn_scalar": config.score_dim,
            "attn_logit_softcapping": config.score_cap,
            "final_logit_softcapping": config.logit_cap,
            **_layer_values(config),
        }


class LayerRopes(JsonConfig):
    """Gemma 3's `rope_parameters`, one for each type of layer."""

    full_attention: RopeConfig = RopeConfig()
    sliding_attention: RopeConfig = RopeConfig()


class Gemma3(Gemma2):
    """Gemma 3's text model: every sixth layer has full attention, the others a sliding window and another RoPE."""

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    max_position_embeddings: PositiveInt = 131_072
    rope_theta: PositiveFloat = 1_000_000.0
    rope_local_base_freq: PositiveFloat = 10_000.0
    rope_parameters: LayerRopes | None = None  # type: ignore[assignment]
    sliding_window_pattern: PositiveInt = 6
    attn_logit_softcapping: None = None
    final_logit_softcapping: PositiveFloat | None = None

    def _period(self) -> int:
        return self.sliding_window_pattern

    def _rope(self) -> RopeConfig:
        return self.rope_scaling or (self.rope_parameters or LayerRopes()).full_attention

    def _switches(self) -> dict[str, Any]:
        local = (self.rope_parameters or LayerRopes()).sliding_attention
        if local.rope_type != "default":
            raise self.error(
                f"rope_parameters.sliding_attention.rope_type is {local.rope_type!r}; only full attention may be scaled"
            )
        theta = local.rope_theta or self.rope_local_base_freq
        return {**super()._switches(), "qk_norm": True, "sliding_rope_theta": theta}

    @classmethod
    def own_values(cls, config: DecoderConfig) -> dict[str, Any]:
        """The family's own keys for a decoder."""
        full = {"rope_theta": config.rope_theta, **rope_values(config.rope_scaling)}
        local = config.sliding_rope_theta
        return {
            **super().own_values(config),
            "rope_local_base_freq": local,
            "rope_parameters": {
                "full_attention": full,
                "sliding_attention": {"rope_theta": local, "rope_type": "default"},
            },
        }


FAMILIES: dict[str, type[Family]] = {
    family.model_type: family for family in (Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma, Gemma2, Gemma3)
}
"""`model_type` → its family, the plainest first."""


def _layer_values(config: DecoderConfig) -> dict[str, Any]:
    sliding = config.sliding_layers
    types = ["sliding_attention" if layer in sliding else "full_attention" for layer in range(config.n_layers)]
    return {"sliding_window": config.sliding_window, "layer_types": types}
