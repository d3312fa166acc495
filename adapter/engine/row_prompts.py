"""The adapters' part of attention in a batch whose sequences each have an adapter of their own, or none.

An adapter enters a layer's attention only through the keys and values of its prompts, which no token changes. They are
computed once (`read_prompts`) and lie beside the KV cache, slot by slot (`PromptRows`), so that one product serves
sequences of different adapters. A sequence without an adapter has the gate 0 there, and its output is the base's.

L adapted layers, N layers, K prompts, G key/value heads, H query heads, R = H/G, D channels of a head, B slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapter.adaption import Adaption, FrozenLayer, ImageAdaption, gate_factor
from adapter.attention import visible
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.kv_cache import Attend, Reads, additive, prepend_visible
from adapter.methods.base import AdapterPart


@dataclass(frozen=True, eq=False)
class AdapterPrompts:
    """The prompts of a sequence's adapter, as its attention needs them."""

    keys_values: Tensor
    """(L, 2G, K, D), keys before values, of the top L layers, lowest first, in the base's dtype."""
    factors: Tensor
    """The gates' factors, (L, H), in the base's dtype."""
    joins_words: bool
    """The prompts are an ordinary prefix, whose keys share one softmax with those of the words."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors."""
        return self.keys_values.nbytes + self.factors.nbytes


@dataclass(frozen=True, eq=False)
class PromptLayers:
    """The layers of an adapter with prompts, and those that see an image; they need not be part of a model."""

    top: Sequence[Adaption] = ()
    """The top layers' prompts, lowest layer first."""
    lowest: Sequence[ImageAdaption] = ()
    """The lowest layers' attention to an image's own tokens, lowest layer first."""

    @classmethod
    def of(cls, model: Decoder) -> "PromptLayers":
        """The layers of the adapter that a decoder holds."""
        return cls(model.adaptions, model.image_adaptions)

    def by_number(self, n_layers: int, *, image: bool) -> dict[int, Adaption | ImageAdaption]:
        """The layers of a base of N = `n_layers` that an adapter changes, by their number. image: there is one."""
        prompts = dict(enumerate(self.top, n_layers - len(self.top)))
        return {**dict(enumerate(self.lowest)), **prompts} if image else {**prompts}

    @property
    def modules(self) -> list[AdapterPart]:
        """All parts."""
        return [*self.top, *self.lowest]


@torch.inference_mode()
def read_prompts(model: Decoder, layers: PromptLayers, image: Tensor | None = None) -> AdapterPrompts | None:
    """Compute the keys and values of an adapter's prompts on a base; None if there are no prompts, and no image.

    image: the image token (C,) that is added to every prompt, or an image's own tokens (K C,), if any. An image's own
    tokens are as many as the prompts, so that they lie beside them; a layer between has zeros, with the factor 0.
    """
    config, weight = model.config, model.tok_embeddings.weight
    q = torch.empty(1, config.n_heads, 0, config.head_dim, dtype=weight.dtype, device=weight.device)
    images = None if image is None else (image[None], torch.zeros(1, dtype=torch.int64, device=weight.device))
    used = layers.by_number(config.n_layers, image=image is not None)
    found, factors = dict[int, Tensor](), dict[int, Tensor]()
    for number, block in enumerate(model.blocks):
        if (adaption := used.get(number)) is None:
            continue
        base = block.attention
        has_bias = base.has_bias or base.wk.delta is not None or base.wv.delta is not None
        layer = FrozenLayer(base.wk, base.wv, base.k_norm, has_bias, base.attend)
        found[number] = torch.cat(adaption.keys_values(layer, q, images), dim=1)[0]
        factors[number] = gate_factor(adaption.gate, adaption.gate_convention).to(weight.dtype)
    if not found:
        return None
    first = min(found)
    nothing, closed = torch.zeros_like(found[first]), torch.zeros_like(factors[first])
    numbers = range(first, config.n_layers)
    joins_words = used[first].gate_convention == "prefix"
    keys_values = torch.stack([found.get(number, nothing) for number in numbers])
    return AdapterPrompts(keys_values, torch.stack([factors.get(number, closed) for number in numbers]), joins_words)


class PromptRows:
    """The prompts' keys and values of the sequence in each slot, and attention to them."""

    def __init__(self, config: DecoderConfig, slots: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self._config = config
        self._keys_values = torch.zeros(
            config.n_layers, slots, 2 * config.n_kv_heads, 0, config.head_dim, dtype=dtype, device=device
        )
        self._factors = torch.zeros(config.n_layers, slots, config.n_heads, dtype=dtype, device=device)
        self._first_layers = [config.n_layers] * slots
        self._n_prompts = [0] * slots
        self._joins_words = [False] * slots
        self._masks: dict[tuple[int, int], Tensor | None] = {}

    def put(self, slot: int, prompts: AdapterPrompts | None) -> None:
        """Give the sequence in a slot its adapter; None stands for the base alone."""
        first, n_prompts = self._config.n_layers, 0
        self._keys_values[:, slot], self._factors[:, slot] = 0, 0
        if prompts is not None:
            first -= len(prompts.keys_values)
            n_prompts = prompts.keys_values.shape[2]
            self._make_room(n_prompts)
            self._keys_values[first:, slot, :, :n_prompts] = prompts.keys_values
            if not prompts.joins_words:
                self._factors[first:, slot] = prompts.factors
        self._first_layers[slot], self._n_prompts[slot] = first, n_prompts
        self._joins_words[slot] = prompts is not None and prompts.joins_words
        self._masks.clear()

    def copy_slot(self, source: int, target: int) -> None:
        """Copy one slot's prompts to another."""
        self._keys_values[:, target] = self._keys_values[:, source]
        self._factors[:, target] = self._factors[:, source]
        self._first_layers[target] = self._first_layers[source]
        self._n_prompts[target] = self._n_prompts[source]
        self._joins_words[target] = self._joins_words[source]
        self._masks.clear()

    def first_layer(self, slots: slice) -> int:
        """The lowest layer in which any of the slots has prompts; the number of layers if none has."""
        return min(self._first_layers[slots], default=self._config.n_layers)

    def attend(self, layer: int, slots: slice, words: Tensor, reads: Reads, attend: Attend) -> Tensor:
        """Add the gated attention to each slot's prompts to `words`, the attention to the words alone."""
        n_prompts = max(self._n_prompts[slots])
        held = self._keys_values[layer, slots, :, :n_prompts]
        keys, values = held.split(self._config.n_kv_heads, dim=1)
        if not all(self._joins_words[slots]):
            factor = self._factors[layer, slots].view(len(held), words.shape[1], -1, 1)  # (B, G, R, 1) or (1, H, 1, 1)
            words = words + factor * attend(reads.q, keys, values, self._mask(slots, n_prompts))
        for slot in range(slots.start, slots.stop):
            if self._joins_words[slot] and layer >= self._first_layers[slot]:
                row = slice(slot - slots.start, slot - slots.start + 1)
                n = self._n_prompts[slot]
                words[row] = _attend_jointly(row, keys[row, :, :n], values[row, :, :n], reads, attend)
        return words

    def _mask(self, slots: slice, n_prompts: int) -> Tensor | None:
        """The mask (B, 1, 1, K) of slots that have fewer prompts than others; None if all have as many, or none.

        A slot without prompts attends to zeros, and its factor is 0.
        """
        key = slots.start, slots.stop
        if key not in self._masks:
            counts = [count or n_prompts for count in self._n_prompts[slots]]
            mask = None
            if min(counts) < n_prompts:
                last = torch.tensor(counts, device=self._factors.device)[:, None] - 1
                mask = visible(last, n_prompts)
                mask = mask if self._config.score_cap is not None else additive(mask, self._factors.dtype)
            self._masks[key] = mask
        return self._masks[key]

    def _make_room(self, n_prompts: int) -> None:
        """Widen all slots to at least `n_prompts` prompts."""
        held = self._keys_values
        if n_prompts > held.shape[3]:
            self._keys_values = held.new_zeros(*held.shape[:3], n_prompts, held.shape[4])
            self._keys_values[..., : held.shape[3], :] = held


def _attend_jointly(row: slice, keys: Tensor, values: Tensor, reads: Reads, attend: Attend) -> Tensor:
    """Attention of one sequence of a batch in which prompts and words share one softmax.

    keys, values: of the sequence's prompts, (1, G, K, D). Every word attends to all of them.
    """
    q, k, v = (x if len(x) == 1 else x[row] for x in (reads.q, reads.k, reads.v))
    mask = reads.mask if reads.mask is None or len(reads.mask) == 1 else reads.mask[row]
    if reads.causal:
        mask = visible(torch.arange(q.shape[2], device=q.device)[None], k.shape[2])
    return attend(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), prepend_visible(mask, keys.shape[2]))
