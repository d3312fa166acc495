"""LLaMA, the frozen decoder (arXiv 2302.13971), with one hook: an attention layer may hold an adaption.

    h = x + wo(SDPA(rope(wq n), rope(wk n), wv n, causal)),  n = RMSNorm(x)
    y = h + w2(silu(w1 m) * w3 m),                           m = RMSNorm(h)

RoPE rotates halves, (0, D/2), (1, D/2 + 1), ..., as Hugging Face's checkpoints do; Meta's are permuted on load.

B batch, T tokens, S keys seen so far (S = T without a cache), V vocabulary, C width, N layers, H query heads,
G key/value heads, D = C/H.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapter.adaption import Adaption, AdaptionConfig, attend
from adapter.errors import AdapterError
from adapter.image_projection import Images, Projection, gather
from adapter.loss import labelled_cross_entropy


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of RoPE: wavelengths past `original_length / low_freq_factor` are divided by `factor`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A decoder's shape; `adapter.weights` reads it from `params.json` or `config.json`."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 2048
    tied_head: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise AdapterError(f"dim {self.dim} must divide into {self.n_heads} heads of even width")
        if self.n_heads % self.n_kv_heads:
            raise AdapterError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


class RMSNorm(nn.Module):
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


def rope_angles(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's rotation, float32, each (*positions.shape, D); halves repeat."""
    frequencies = 1.0 / config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    )
    if scaling := config.rope_scaling:
        # Wavelengths are left alone when short, divided by `factor` when long, and blended in between.
        turns = scaling.original_length * frequencies / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, H, T, D) by cos, sin (B or 1, 1, T, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class KVCache:
    """Keys and values of the tokens seen so far. Slot s of a row holds its token at position s.

    Rows may differ in length: a batch padded on the right is run, then `trim`med to the real lengths, and the slots of
    padding are written over. It also keeps the prompts' keys and values, which depend on no word.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, length, config.n_kv_heads, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.prompts: list[list[Tensor]] = [[] for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.used = 0
        """The longest row's length, known without asking the device."""

    def positions(self, n_tokens: int) -> Tensor:
        """Where each row's next tokens go, (B, T)."""
        return self.lengths[:, None] + torch.arange(n_tokens, device=self.lengths.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts (B, G, T, D) behind what a layer holds; returns all S slots. `advance` follows the last layer."""
        T = k.shape[2]
        slots = (torch.arange(len(k), device=k.device)[:, None], self.positions(T))
        self.keys[layer][slots] = k.transpose(1, 2)
        self.values[layer][slots] = v.transpose(1, 2)
        end = self.used + T
        return self.keys[layer][:, :end].transpose(1, 2), self.values[layer][:, :end].transpose(1, 2)

    def advance(self, n_tokens: int) -> None:
        self.lengths = self.lengths + n_tokens
        self.used += n_tokens

    def trim(self, lengths: Tensor) -> None:
        """Forgets what lies past each row's length, (B,)."""
        self.lengths = lengths

    def keep(self, rows: Tensor) -> None:
        """Drops all rows of the batch but these."""
        self.lengths = self.lengths[rows]
        self.used = int(self.lengths.max())
        for prompt in self.prompts:
            if prompt and len(prompt[0]) > 1:  # rows of their own, for some have an image
                prompt[:] = [x[rows] for x in prompt]
        for layer in range(len(self.keys)):  # one layer at a time: never two caches in memory
            self.keys[layer], self.values[layer] = self.keys[layer][rows], self.values[layer][rows]


class Attention(nn.Module):
    """Causal self-attention, grouped-query where G < H, plus the gated term of an adaption if the layer holds one."""

    adaption: Adaption | None

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads = layer, config.n_heads, config.n_kv_heads
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.register_module("adaption", None)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        images: Images | None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D)
        k = self.wk(x).view(B, T, self.n_kv_heads, -1).transpose(1, 2)  # (B, G, T, D)
        v = self.wv(x).view(B, T, self.n_kv_heads, -1).transpose(1, 2)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if self.adaption is None:
            y = attend(q, k, v, mask, causal=mask is None)
        else:
            known = None if cache is None else cache.prompts[self.layer]
            y = self.adaption(q, k, v, mask, (self.wk, self.wv), known, images)
        return self.wo(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KVCache | None,
        images: Images | None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, images)
        return x + self.feed_forward(self.ffn_norm(x))


class Head(nn.Linear):
    """Final states (..., C) to logits (..., V), or, given labels, straight to the summed loss (see `adapter.loss`)."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(hidden)
        return labelled_cross_entropy(hidden, self.weight, labels)


class Llama(nn.Module):
    """The decoder. Parameter names are Meta's; a tied head shares the embedding's parameter."""

    vision: Projection | None

    def __init__(self, config: LlamaConfig) -> None:
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
        """Lets a tied head share the embedding again after either parameter object was replaced."""
        if self.config.tied_head:
            self.output.weight = self.tok_embeddings.weight

    @property
    def blocks(self) -> Iterator[Block]:
        return (block for block in self.layers if isinstance(block, Block))

    @property
    def first_adapted(self) -> int:
        """The lowest layer that needs a gradient; all N of them need one when the base itself is being trained."""
        if self.adaption_config is None:
            return 0
        return self.config.n_layers - self.adaption_config.n_layers

    @property
    def adaptions(self) -> list[Adaption]:
        """The adapted layers' trainable parts, lowest layer first; empty on a bare base."""
        found = (block.attention.adaption for block in self.blocks)
        return [adaption for adaption in found if adaption is not None]

    @property
    def adapter_modules(self) -> list[Adaption | Projection]:
        """All that an adapter adds to the base, in the order in which it is drawn."""
        return [*self.adaptions, *([] if self.vision is None else [self.vision])]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The names and parameters of those modules; fixed gates are among them."""
        ours = {id(parameter) for module in self.adapter_modules for parameter in module.parameters()}
        return ((name, parameter) for name, parameter in self.named_parameters() if id(parameter) in ours)

    def attach(self, config: AdaptionConfig, generator: torch.Generator | None = None) -> None:
        """Freezes the base and puts a fresh adaption on each of the top L layers, replacing any that is there.

        Raises ValueError if the decoder has fewer than L layers.
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
        self.vision = None if config.vision is None else Projection(config.vision, self.config.dim)
        device = self.tok_embeddings.weight.device
        if device.type != "meta":
            self.draw_adapter(generator, device)

    def draw_adapter(self, generator: torch.Generator | None, device: torch.device | str) -> None:
        """Gives the attached adapter its initial values, on a device: the generator's own."""
        for module in self.adapter_modules:
            module.to_empty(device=device)
            module.reset_parameters(generator)

    def images(self, features: Sequence[Tensor | None]) -> Images | None:
        """Each row's features (F,), or None where it has no image, as `hidden` takes them.

        Raises ValueError for features that the adapter cannot read.
        """
        if not any(one is not None for one in features):
            return None
        if self.vision is None:
            raise AdapterError("there are images, but the adapter was made for text alone: train one with vision")
        found, rows = gather(features, self.vision.down.in_features)
        device = self.tok_embeddings.weight.device
        return found.to(device), rows.to(device)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, images: Images | None = None) -> Tensor:
        """Final normalised states (B, T, C) of tokens (B, T), which follow those in the cache, if there is one.

        Rows padded on the right need no mask: no real token looks ahead. Layers below the first adapted one run without
        autograd. images are features (n, F) and the rows (n,) that they belong to; with a cache, which remembers them,
        they are given once.

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
        cos, sin = rope_angles(self.config, positions)
        rope = (cos[:, None].to(x.dtype), sin[:, None].to(x.dtype))  # (B or 1, 1, T, D)
        grad = torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            with torch.set_grad_enabled(grad and layer >= self.first_adapted):
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x = checkpoint(block, x, rope, mask, cache, images, use_reentrant=False)
                else:
                    x = block(x, rope, mask, cache, images)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, images: Images | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) in the model's dtype; or, given labels (B, T), the summed float32 loss.

        labels[b, t] is the id that position t must be predicted as (by position t - 1), or `adapter.loss.IGNORE`.
        """
        return self.output(self.hidden(tokens, images=images), labels)
