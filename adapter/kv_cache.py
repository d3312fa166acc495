"""The keys and values of the tokens seen so far, and attention to them: what generation computes once per token.

A cache has slots, one for each sequence. One forward, a `Step`, runs the new tokens of many sequences laid end to end,
as one row of N tokens: the next token of each of the first B slots, and chunks of prompts that are still being read.
Norms and linear layers do not care whose a token is, so that the weights are read once for all of them, and nothing is
padded. Attention is computed for each sequence on its own tokens, with the prompts of its own adapter.

N tokens of a step, B sequences that go on by one token, T tokens of a chunk, S tokens of the longest sequence,
H query heads, G key/value heads, R = H/G, D channels of a head, K prompts of an adapter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter.attention import visible
from adapter.decoder_config import DecoderConfig
from adapter.rope import DynamicScaling, LongRopeScaling, rope_angles

Attend = Callable[..., Tensor]
"""`adapter.attention.attend` with a layer's scale and soft cap."""


class KVCache:
    """The keys and values of up to `slots` sequences of up to `length` tokens, in memory that is allocated at once.

    Place p of a slot holds the token at position p. What lies behind a sequence's last token is finite but stale.
    """

    def __init__(
        self, config: DecoderConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.config, self.slots, self.length = config, slots, length
        shape = (config.n_layers, 2, slots, config.n_kv_heads, length, config.head_dim)  # a head's places lie together
        self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(keys, values) for keys, values in self.tensor]
        self._rows = [(keys.flatten(0, 2), values.flatten(0, 2)) for keys, values in self._layers]

    @staticmethod
    def n_bytes(config: DecoderConfig, slots: int, length: int, dtype: torch.dtype) -> int:
        """The bytes of a cache."""
        return 2 * config.n_layers * slots * length * config.n_kv_heads * config.head_dim * dtype.itemsize

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The places (N · G,) of tokens in these slots (N,) at these positions (N,), for `write`."""
        heads = torch.arange(self.config.n_kv_heads, device=slots.device)
        rows = slots[:, None] * self.config.n_kv_heads + heads
        return (rows * self.length + positions[:, None]).flatten()

    def write(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values, each (N, G, D), at `places`."""
        keys, values = self._rows[layer]
        keys.index_copy_(0, places, k.reshape(-1, k.shape[-1]))
        values.index_copy_(0, places, v.reshape(-1, v.shape[-1]))

    def read(self, layer: int, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the first `length` places of some slots: each (B, G, S, D), without a copy."""
        keys, values = self._layers[layer]
        return keys[slots, :, :length], values[slots, :, :length]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""
        self.tensor[:, :, target, :, :length] = self.tensor[:, :, source, :, :length]


class Chunk(NamedTuple):
    """The part of a prompt that a step reads."""

    slot: int
    start: int
    """Position of its first token."""
    stop: int
    """Position after its last token."""
    prompt_length: int
    """Tokens of the whole prompt, which some scalings of RoPE depend on."""


class Reads(NamedTuple):
    """Queries, and the words that they attend to."""

    q: Tensor
    """(B, G, R, D) where a token of each of B sequences reads, (1, H, T, D) where a chunk does."""
    k: Tensor
    """(B or 1, G, S, D)"""
    v: Tensor
    """(B or 1, G, S, D)"""
    mask: Tensor | None
    """(B or 1, 1, 1 or T, S), bool or additive; None where every place is visible, or under `causal`."""
    causal: bool


class RowPrompts(Protocol):
    """The adapters' part of attention, each sequence's its own (see `adapter.engine.row_prompts`)."""

    def first_layer(self, slots: slice) -> int:
        """The lowest layer in which any of the slots has prompts; the number of layers if none has."""

    def attend(self, layer: int, slots: slice, words: Tensor, reads: "Reads", attend: Attend) -> Tensor:
        """Attention to words and prompts, in the shape of `words`, the attention to the words alone."""


class Step:
    """The tokens of one forward, and attention to them and to those in the cache."""

    def __init__(self, cache: KVCache, prompts: RowPrompts, lengths: Sequence[int], chunks: Sequence[Chunk]) -> None:
        """lengths: the tokens that each of the first B slots holds; each goes on by one. chunks: of further slots."""
        self.cache, self.prompts, self.lengths, self.chunks = cache, prompts, list(lengths), list(chunks)
        device, n_rows = cache.tensor.device, len(lengths)
        following = torch.tensor(self.lengths, dtype=torch.int64)
        slots = torch.arange(n_rows)
        reading = [torch.arange(chunk.start, chunk.stop) for chunk in chunks]
        self.positions = torch.cat([following, *reading]).to(device)
        """Position of each token within its sequence, (N,)."""
        owners = [slots, *(torch.full((c.stop - c.start,), c.slot, dtype=torch.int64) for c in chunks)]
        self._places = cache.places(torch.cat(owners).to(device), self.positions)
        self.length = max([*(length + 1 for length in self.lengths), *(chunk.stop for chunk in chunks)])
        """Tokens of the longest sequence."""
        self._rows = slice(0, n_rows)
        self._row_length = max(self.lengths, default=0) + 1
        self._row_masks = self._make_row_masks(following.to(device)) if n_rows else (None, None)
        self._first_adapted = [prompts.first_layer(self._rows)]
        self._first_adapted += [prompts.first_layer(slice(chunk.slot, chunk.slot + 1)) for chunk in chunks]

    def rope_angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every token's rotation, each (1, N, D) float32.

        Where the frequencies depend on a sequence's length, each sequence has those of its own.
        """
        config = self.cache.config
        settings = config.head_dim, config.rope_theta, config.rope_scaling
        if not isinstance(config.rope_scaling, DynamicScaling | LongRopeScaling):
            return rope_angles(self.positions[None], *settings)
        sizes = [1] * len(self.lengths) + [chunk.stop - chunk.start for chunk in self.chunks]
        lengths = [length + 1 for length in self.lengths] + [chunk.prompt_length for chunk in self.chunks]
        parts = [
            rope_angles(positions[None], *settings, length)
            for positions, length in zip(self.positions.split(sizes), lengths, strict=True)
        ]
        cos, sin = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return cos, sin

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Store the new keys and values, and attend: (1, H, N, D) of q (1, H, N, D), k and v (1, G, N, D)."""
        self.cache.write(layer, self._places, k[0].transpose(0, 1), v[0].transpose(0, 1))
        n_rows, parts = len(self.lengths), []
        if n_rows:
            parts.append(self._continue(layer, q[:, :, :n_rows], attend))
        start = n_rows
        for number, chunk in enumerate(self.chunks):
            stop = start + chunk.stop - chunk.start
            adapted = layer >= self._first_adapted[1 + number]
            new = (q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop])
            parts.append(self._read_chunk(layer, chunk, adapted, new, attend))
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _continue(self, layer: int, q: Tensor, attend: Attend) -> Tensor:
        """Attention of one token of each of the first B slots, (1, H, B, D).

        The R queries that share a key/value head are laid out as R tokens of one head, which reads the keys once.
        """
        config, n_rows = self.cache.config, q.shape[2]
        q = q[0].transpose(0, 1).reshape(n_rows, config.n_kv_heads, -1, config.head_dim)  # (B, G, R, D)
        k, v = self.cache.read(layer, self._rows, self._row_length)
        mask = self._row_masks[layer in config.sliding_layers]
        y = attend(q, k, v, mask)
        if layer >= self._first_adapted[0]:
            y = self.prompts.attend(layer, self._rows, y, Reads(q, k, v, mask, False), attend)
        return y.reshape(n_rows, config.n_heads, config.head_dim).transpose(0, 1)[None]

    def _read_chunk(
        self, layer: int, chunk: Chunk, adapted: bool, new: tuple[Tensor, Tensor, Tensor], attend: Attend
    ) -> Tensor:
        """Attention of a chunk's tokens, (1, H, T, D), to the tokens before them and to each other.

        new: the chunk's queries, keys and values.
        """
        (q, k, v), slot, mask = new, slice(chunk.slot, chunk.slot + 1), None
        window = self.cache.config.sliding_window if layer in self.cache.config.sliding_layers else None
        if chunk.start:
            k, v = self.cache.read(layer, slot, chunk.stop)
        if chunk.start or (window is not None and window < chunk.stop):
            mask = visible(torch.arange(chunk.start, chunk.stop, device=q.device)[None], chunk.stop, window)
        y = attend(q, k, v, mask, causal=mask is None)
        if adapted:
            y = self.prompts.attend(layer, slot, y, Reads(q, k, v, mask, mask is None), attend)
        return y

    def _make_row_masks(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The masks of full and of sliding attention of the first B slots, (B, 1, 1, S); None where all is visible."""
        config, longest = self.cache.config, self._row_length
        window = config.sliding_window if config.sliding_layers else None
        ragged = min(self.lengths) + 1 < longest
        full = visible(positions[:, None], longest) if ragged else None
        sliding = full
        if window is not None and window < longest:
            sliding = visible(positions[:, None], longest, window)
        if config.score_cap is None:  # once for all layers: the kernel would add a bool mask as this, in every layer
            dtype = self.cache.tensor.dtype
            full, sliding = (additive(mask, dtype) for mask in (full, sliding))
        return full, sliding


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as what is added to scores: 0 where it is True, -inf elsewhere."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def prepend_visible(mask: Tensor | None, n: int) -> Tensor | None:
    """The mask with n more places in front that every token may attend to."""
    if mask is None:
        return None
    return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)
