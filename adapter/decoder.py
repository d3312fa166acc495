"""LLaMA, the frozen decoder (arXiv 2302.13971), with one place for an adapter: an attention layer may hold an adaption.

    h = x + wo(SDPA(rope(wq n), rope(wk n), wv n, causal)),  n = RMSNorm(x)
    y = h + w2(silu(w1 m) * w3 m),                           m = RMSNorm(h)

RoPE rotates the pairs (0, D/2), (1, D/2 + 1), ..., as Hugging Face's checkpoints do; Meta's are permuted on load.

B batch, T tokens, S keys seen so far (S = T without a cache), V vocabulary, C width, N layers, H query heads,
G key/value heads, D = C/H.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapter.adaption import Adaption, AdaptionConfig, attend
from adapter.errors import AdapterError
from adapter.image_projection import ImageProjection, Images, batch_images
from adapter.loss import labelled_cross_entropy
from adapter.rope import RopeScaling, apply_rope, rope_angles


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder's shape; `adapter.base.checkpoint` reads it from a checkpoint's `params.json` or `config.json`."""

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

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise AdapterError(f"dim {self.dim} must divide into {self.n_heads} heads of even width")
        if self.n_heads % self.n_kv_heads:
            raise AdapterError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return x32.to(x.dtype) * self.weight


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


class AttentionInputs(NamedTuple):
    """The inputs of every layer's attention besides the hidden states."""

    rope: tuple[Tensor, Tensor]
    """cos and sin, each (B or 1, 1, T, D)."""
    mask: Tensor | None
    """(B, 1, T, S) bool, True where a token may attend; None is the causal mask."""
    cache: KVCache | None
    """The keys and values of earlier tokens; None without generation."""
    images: Images | None
    """The image tokens (n, C) and their rows (n,); None where no row has an image."""


class Attention(nn.Module):
    """Causal self-attention, grouped-query where G < H, plus the gated term of an adaption if the layer holds one."""

    adaption: Adaption | None

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads = layer, config.n_heads, config.n_kv_heads
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.register_module("adaption", None)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        B, T, _ = x.shape
        rope, mask, cache, images = inputs
        q = self.wq(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.wk(x).view(B, T, self.n_kv_heads, -1).transpose(1, 2)  # (B, G, T, D)
        v = self.wv(x).view(B, T, self.n_kv_heads, -1).transpose(1, 2)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if self.adaption is None:
            y = attend(q, k, v, mask, causal=mask is None)
        else:
            cached = None if cache is None else cache.prompts[self.layer]
            y = self.adaption(q, k, v, mask, (self.wk, self.wv), cached, images)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """The SwiGLU feed-forward layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        x = x + self.attention(self.attention_norm(x), inputs)
        return x + self.feed_forward(self.ffn_norm(x))


class Head(nn.Linear):
    """Final hidden states (..., C) to logits (..., V) or, given labels, to the summed loss (see `adapter.loss`)."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        return labelled_cross_entropy(hidden, self.weight, labels)


class Decoder(nn.Module):
    """The decoder, with its adapter if it holds one. Parameter names are Meta's."""

    vision: ImageProjection | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.adaption_config: AdaptionConfig | None = None
        self.checkpoint_activations = False
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Head(config.dim, config.vocab_size, bias=False)
        self.register_module("vision", None)
        self.tie()

    def tie(self) -> None:
        """Share the embedding's parameter with a tied head; call it after either parameter object was replaced."""
        if self.config.tied_head:
            self.output.weight = self.tok_embeddings.weight

    @property
    def blocks(self) -> Iterator[Block]:
        """The layers, lowest first."""
        return (block for block in self.layers if isinstance(block, Block))

    @property
    def first_adapted(self) -> int:
        """Lowest layer that needs gradients: the lowest adapted one, or 0 without an adapter, to train the base."""
        if self.adaption_config is None:
            return 0
        return self.config.n_layers - self.adaption_config.n_layers

    @property
    def adaptions(self) -> list[Adaption]:
        """The adaptions of the adapted layers, lowest layer first; empty without an adapter."""
        adaptions = (block.attention.adaption for block in self.blocks)
        return [adaption for adaption in adaptions if adaption is not None]

    @property
    def adapter_modules(self) -> list[Adaption | ImageProjection]:
        """The modules that the adapter adds to the base, in the order in which they are initialised."""
        return [*self.adaptions, *([] if self.vision is None else [self.vision])]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of `adapter_modules`, including gates that are not trained."""
        adapter_ids = {id(parameter) for module in self.adapter_modules for parameter in module.parameters()}
        return ((name, parameter) for name, parameter in self.named_parameters() if id(parameter) in adapter_ids)

    def add_adapter(self, config: AdaptionConfig, generator: torch.Generator | None = None) -> None:
        """Freeze the base and add a freshly initialised adapter to the top L layers, in place of any that is there.

        Raises AdapterError if the decoder has fewer than L layers.
        """
        if config.n_layers > self.config.n_layers:
            raise AdapterError(
                f"the adapter wants {config.n_layers} adapted layers, the base has {self.config.n_layers}: "
                f"set n_layers to at most {self.config.n_layers}"
            )
        self.requires_grad_(False)
        self.adaption_config = config
        for layer, block in enumerate(self.blocks):
            adapted = layer >= self.first_adapted
            block.attention.adaption = Adaption(config, self.config.dim, self.config.n_heads) if adapted else None
        self.vision = None if config.vision is None else ImageProjection(config.vision, self.config.dim)
        device = self.tok_embeddings.weight.device
        if device.type != "meta":
            self.reset_adapter(generator, device)

    def reset_adapter(self, generator: torch.Generator | None, device: torch.device | str) -> None:
        """Move the adapter to `device`, which must be the generator's own, and give it its initial values."""
        for module in self.adapter_modules:
            module.to_empty(device=device)
            module.reset_parameters(generator)

    def batch_images(self, features: Sequence[Tensor | None]) -> Images | None:
        """Stack each row's image features (F,), None where it has no image, on the model's device.

        Returns None if no row has an image. Raises AdapterError for features that the adapter cannot read.
        """
        if not any(one is not None for one in features):
            return None
        if self.vision is None:
            raise AdapterError("there are images, but the adapter was made for text alone: train one with vision")
        stacked, rows = batch_images(features, self.vision.down.in_features)
        device = self.tok_embeddings.weight.device
        return stacked.to(device), rows.to(device)

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, images: Images | None = None) -> Tensor:
        """Final normalised hidden states (B, T, C) of tokens (B, T) int64, which follow those in the cache, if any.

        images: features (n, F) and the rows (n,) that they belong to. With a cache they are given once, with the
        prompts; the cache keeps what follows from them.

        Rows padded on the right need no mask, because no real token looks ahead. Layers below the first adapted one run
        without autograd.
        """
        if images is not None:
            assert self.vision is not None
            images = self.vision(images[0]), images[1]
        T = tokens.shape[1]
        positions = torch.arange(T, device=tokens.device)[None] if cache is None else cache.positions(T)
        mask = None  # causal
        if cache is not None and cache.used:
            slots = torch.arange(cache.used + T, device=tokens.device)
            mask = slots <= positions[:, None, :, None]  # (B, 1, T, S)
        x = self.tok_embeddings(tokens)
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        rope = (cos[:, None].to(x.dtype), sin[:, None].to(x.dtype))  # (B or 1, 1, T, D)
        inputs = AttentionInputs(rope, mask, cache, images)
        grad = torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            with torch.set_grad_enabled(grad and layer >= self.first_adapted):
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x = checkpoint(block, x, inputs, use_reentrant=False)
                else:
                    x = block(x, inputs)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, images: Images | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) in the model's dtype; or, given labels (B, T), the summed float32 loss.

        labels[b, t] is the id that position t - 1 must predict at position t, or `adapter.loss.IGNORE`.
        images: as in `hidden_states`.
        """
        return self.output(self.hidden_states(tokens, images=images), labels)
