"""The keys and values of the tokens seen so far, which generation reads instead of computing them again.

B batch, T new tokens, S slots, N layers, G key/value heads, D channels of a head.
"""

import torch
from torch import Tensor

from adapter.decoder_config import DecoderConfig


class KVCache:
    """The keys and values of the tokens seen so far. Slot s of a row holds its token at position s.

    Rows may differ in length: run a batch padded on the right, then `truncate` it to the real lengths; later tokens
    overwrite the slots of padding. The cache also holds the keys and values of the adapter's prompts, which do not
    depend on the tokens.
    """

    def __init__(
        self, config: DecoderConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (batch, length, config.n_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.prompts: list[list[Tensor]] = [[] for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.used = 0
        """Length of the longest row, as a Python number, so that reading it does not wait for the device."""

    def positions(self, n_tokens: int) -> Tensor:
        """The positions of each row's next `n_tokens` tokens, (B, T)."""
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's k and v, each (B, G, T, D). Returns that layer's keys and values of all S slots.

        Call `advance` once all layers are extended.
        """
        T = k.shape[2]
        slots = (torch.arange(len(k), device=k.device)[:, None], self.positions(T))
        self.keys[layer][slots] = k.transpose(1, 2)
        self.values[layer][slots] = v.transpose(1, 2)
        end = self.used + T
        return self.keys[layer][:, :end].transpose(1, 2), self.values[layer][:, :end].transpose(1, 2)

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` more tokens in every row."""
        self.lengths = self.lengths + n_tokens
        self.used += n_tokens

    def truncate(self, lengths: Tensor) -> None:
        """Discard the tokens past each row's length (B,)."""
        self.lengths = lengths

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.lengths = self.lengths[rows]
        self.used = int(self.lengths.max())
        for prompt in self.prompts:
            if prompt and len(prompt[0]) > 1:  # one per row, because some rows have an image
                prompt[:] = [x[rows] for x in prompt]
        for layer in range(len(self.keys)):  # one layer at a time: never two caches in memory
            self.keys[layer], self.values[layer] = self.keys[layer][rows], self.values[layer][rows]
