"""Meta's `params.json`: the shape of LLaMA 1, 2 and 3."""

from typing import Annotated

from pydantic import Field

from adapter.base.json_config import JsonConfig, LayerCount, PositiveFloat, PositiveInt
from adapter.decoder_config import DecoderConfig
from adapter.rope import Llama3Scaling


class MetaConfig(JsonConfig):
    """Meta's `params.json`."""

    dim: PositiveInt
    n_layers: LayerCount
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
