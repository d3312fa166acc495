"""LLaMA's decoder (arXiv 2302.13971), frozen, with places for an adapter's parts (see `adapter.methods.base`).

    h = x + wo(SDPA(rope(wq n), rope(wk n), wv n, causal)),  n = RMSNorm(x)
    y = h + w2(silu(w1 m) * w3 m),                           m = RMSNorm(h)

Mistral, Qwen, SmolLM 3 and Gemma are this decoder with switches set: `DecoderConfig` lists and explains them.
RoPE rotates the pairs (0, D/2), (1, D/2 + 1), ..., as Hugging Face's checkpoints do; Meta's are permuted on load.

B batch, T tokens, V vocabulary, C width, N layers, H query heads,
G key/value heads, D channels of a head (C/H in LLaMA), W tokens of a sliding window.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapter.adaption import Adaption, FrozenLayer, ImageAdaption
from adapter.attention import attend, soft_cap, visible
from adapter.decoder_config import DecoderConfig
from adapter.disjoint_parameters import run_learning, shows_images, split_kinds
from adapter.errors import AdapterError
from adapter.frozen_ops import frozen_rms_norm, gated_silu
from adapter.image_projection import ImageProjection, Images, batch_images
from adapter.kv_cache import Step
from adapter.linear import Linear
from adapter.loss import IGNORE, summed_cross_entropy
from adapter.methods.base import AdapterMethod, AdapterPart
from adapter.packing import Packing, pack
from adapter.rope import apply_rope, rope_angles


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32."""

    shift: AdapterPart | None

    def __init__(self, dim: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(dim))
        self.register_module("shift", None)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, float(not self.offset))

    def forward(self, x: Tensor) -> Tensor:
        if not self.offset and self.shift is None and not self.weight.requires_grad:
            return frozen_rms_norm(x, self.weight, self.eps)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight if self.shift is None else self.shift(self.weight)
        if self.offset:  # Gemma rounds after the product, LLaMA before it
            return (x32 * (1 + weight.float())).to(x.dtype)
        return x32.to(x.dtype) * weight.to(self.weight.dtype)


class AttentionInputs(NamedTuple):
    """The inputs of a layer's attention besides the hidden states."""

    rope: tuple[Tensor, Tensor]
    """cos and sin, each (B or 1, T, 1, D), or (n, 1, D) of packed tokens."""
    mask: Tensor | None
    """(1, 1, T, T) bool, True where a token may attend; None is the causal mask."""
    step: Step | None
    """The sequences that generation goes on with; None without generation."""
    images: Images | None
    """The image tokens (n, C or K C) and their rows (n,); None where no row has an image."""
    packing: Packing | None
    """The places of packed tokens in the rows; None where the hidden states are rows already."""


class Attention(nn.Module):
    """Causal self-attention, grouped-query where G < H, plus the gated term of an adaption if the layer holds one."""

    adaption: Adaption | ImageAdaption | None
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        norm = config.norm_eps, config.norm_offset
        C, H, G, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.layer, self.head_dim, self.has_bias = layer, D, config.qkv_bias
        self.rotated = layer not in config.unrotated_layers
        self.scale, self.cap = config.score_dim**-0.5, config.score_cap
        self.wq = Linear(C, H * D, bias=config.qkv_bias)
        self.wk = Linear(C, G * D, bias=config.qkv_bias)
        self.wv = Linear(C, G * D, bias=config.qkv_bias)
        self.wo = Linear(H * D, C, bias=config.out_bias)
        for name in ("q_norm", "k_norm"):
            self.register_module(name, RMSNorm(D, *norm) if config.qk_norm else None)
        self.register_module("adaption", None)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        rope, mask, step, images, packing = inputs
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotated:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if packing is not None:
            q, k, v = packing.spread(q), packing.spread(k), packing.spread(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        if step is not None:
            y = step.attention(self.layer, q, k, v, self.attend)
        elif self.adaption is None:
            y = self.attend(q, k, v, mask, causal=mask is None)
        else:
            has_bias = self.has_bias or self.wk.delta is not None or self.wv.delta is not None
            layer = FrozenLayer(self.wk, self.wv, self.k_norm, has_bias, self.attend)
            y = self.adaption(q, k, v, mask, layer, images)
        y = y.transpose(1, 2).flatten(2)
        return self.wo(y if packing is None else packing.collect(y))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """`adapter.attention.attend` with this layer's scale and cap."""
        return attend(q, k, v, mask, causal=causal, scale=self.scale, cap=self.cap)


class FeedForward(nn.Module):
    """The gated feed-forward layer: SwiGLU, or GEGLU in Gemma."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.w1 = Linear(config.dim, config.hidden_dim, bias=config.ffn_bias)
        self.w2 = Linear(config.hidden_dim, config.dim, bias=config.ffn_bias)
        self.w3 = Linear(config.dim, config.hidden_dim, bias=config.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)
        if self.activation == "silu":
            return self.w2(gated_silu(gate, up))
        return self.w2(F.gelu(gate, approximate="tanh") * up)


class Block(nn.Module):
    """One decoder layer."""

    attention_post_norm: RMSNorm | None
    ffn_post_norm: RMSNorm | None

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        norm = config.norm_eps, config.norm_offset
        self.attention_norm = RMSNorm(config.dim, *norm)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, *norm)
        self.feed_forward = FeedForward(config)
        for name in ("attention_post_norm", "ffn_post_norm"):
            self.register_module(name, RMSNorm(config.dim, *norm) if config.post_norms else None)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Tensor:
        h = self.attention(self.attention_norm(x), inputs)
        if inputs.packing is not None:
            x = inputs.packing.keep(x)
        x = x + (h if self.attention_post_norm is None else self.attention_post_norm(h))
        h = self.feed_forward(self.ffn_norm(x))
        return x + (h if self.ffn_post_norm is None else self.ffn_post_norm(h))


class Head(nn.Linear):
    """Final hidden states (..., C) to logits (..., V); or (m, C), and m targets, to their loss (`adapter.loss`)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config.dim, config.vocab_size, bias=False)
        self.cap = config.logit_cap

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is not None:
            return summed_cross_entropy(hidden, self.weight, targets, self.cap)
        logits = super().forward(hidden)
        return logits if self.cap is None else soft_cap(logits, self.cap)


class Decoder(nn.Module):
    """The decoder, with its adapter if it holds one. Parameter names are Meta's."""

    vision: ImageProjection | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter: AdapterMethod | None = None
        self.checkpoint_activations = False
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        self.output = Head(config)
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
    def stream_norms(self) -> Iterator[RMSNorm]:
        """The norms of the residual stream: those before and after each block's parts, lowest first, then the last."""
        for block in self.blocks:
            norms = (block.attention_norm, block.attention_post_norm, block.ffn_norm, block.ffn_post_norm)
            yield from (norm for norm in norms if norm is not None)
        yield self.norm

    @property
    def first_adapted(self) -> int:
        """Lowest layer that needs gradients: that of the adapter, or 0 without an adapter, to train the base."""
        return 0 if self.adapter is None else self.adapter.first_layer(self.config.n_layers)

    @property
    def adaptions(self) -> list[Adaption]:
        """The adaptions of the layers with prompts, lowest layer first; empty without prompts."""
        return [one for block in self.blocks if isinstance(one := block.attention.adaption, Adaption)]

    @property
    def image_adaptions(self) -> list[ImageAdaption]:
        """The adaptions of the layers that attend to an image's own tokens, lowest layer first."""
        return [one for block in self.blocks if isinstance(one := block.attention.adaption, ImageAdaption)]

    @property
    def adapter_modules(self) -> list[AdapterPart]:
        """The parts that the adapter adds to the base, in the order in which they are initialised."""
        return [module for module in self.modules() if isinstance(module, AdapterPart)]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the adapter: those of its parts, trained or not, and of the base what it trains."""
        if self.adapter is not None and self.adapter.trains_base:
            return self.named_parameters()
        parts = {id(parameter) for module in self.adapter_modules for parameter in module.parameters()}
        return ((name, one) for name, one in self.named_parameters() if id(one) in parts)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the base, without those of the adapter's parts."""
        parts = {id(parameter) for module in self.adapter_modules for parameter in module.parameters()}
        return ((name, one) for name, one in self.named_parameters() if id(one) not in parts)

    def add_adapter(self, adapter: AdapterMethod, generator: torch.Generator | None = None) -> None:
        """Freeze the base and add a freshly initialised adapter, in place of any that is there.

        The initial values are drawn on the generator's device, so that one on the CPU gives the same values on every
        device; without a generator, on the base's.

        Raises AdapterError if the base cannot take the adapter, and if the base's own weights were trained.
        """
        adapter.check(self.config)
        self.remove_adapter()
        self.requires_grad_(False)
        self.adapter = adapter
        adapter.install(self)
        device = self.tok_embeddings.weight.device
        if device.type != "meta":
            for part in self.adapter_modules:
                part.to_empty(device=device if generator is None else generator.device)
                part.reset_parameters(generator)
                part.to(device)

    def remove_adapter(self) -> None:
        """Take the adapter off, if there is one: the decoder then computes what its base does, to the bit.

        Raises AdapterError if the adapter is in the base's own weights, and cannot be taken off.
        """
        if self.adapter is not None and self.adapter.trains_base:
            raise AdapterError(
                f"the method {self.adapter.method} changes the base's own weights and cannot be taken off: load the "
                "base again"
            )
        self.take_parts_off()

    def take_parts_off(self) -> None:
        """Leave every place of an adapter's part empty, and forget the method."""
        self.adapter = None
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, AdapterPart):
                    setattr(module, name, None)

    @property
    def separates_images(self) -> bool:
        """True if records with an image and those without train disjoint parameters of the adapter."""
        return self.adapter is not None and self.adapter.separates_images

    @property
    def image_parameters(self) -> frozenset[str]:
        """Names of the parameters that records with an image train, and no others do, where these are disjoint."""
        if not self.separates_images:
            return frozenset()
        own = {id(one) for part in self.adapter_modules if part.of_images for one in part.parameters()}
        return frozenset(name for name, one in self.named_parameters() if id(one) in own)

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

    def hidden_states(
        self,
        tokens: Tensor,
        step: Step | None = None,
        images: Images | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Final normalised hidden states (B, T, C) of tokens (B, T) int64; or (p, C) of those that predict a label, of
        the tokens (n,) of a packing.

        step: in generation, the sequences that tokens (1, N) go on with, whose prompts and images it has. images:
        features (n, F) and the rows (n,) that they belong to.

        Rows padded on the right need no mask, because no real token looks ahead. Layers below the first adapted one run
        without autograd.

        Raises AdapterError for rows with and without image together, where they train disjoint parameters.
        """
        run: Callable[..., Tensor] = nn.Module.__call__
        if self.separates_images and torch.is_grad_enabled():
            shows = shows_images(images, len(tokens if packing is None else packing.places))
            run = partial(run_learning, shows)
        if images is not None:
            assert self.vision is not None
            images = self.vision(images[0]), images[1]
        x = self.tok_embeddings(tokens)
        if self.config.scaled_embeddings:  # by √C in the weights' precision, as Gemma was trained
            x = x * float(torch.tensor(self.config.dim**0.5, dtype=x.dtype))
        full, sliding = self._attention_inputs(x, step, images, packing)
        grad = torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            inputs = sliding if layer in self.config.sliding_layers else full
            if packing is not None and layer == self.config.n_layers - 1:
                inputs = inputs._replace(packing=packing.last())
            with torch.set_grad_enabled(grad and layer >= self.first_adapted):
                if self.checkpoint_activations and torch.is_grad_enabled():
                    x = checkpoint(run, block, x, inputs, use_reentrant=False)
                else:
                    x = run(block, x, inputs)
        return run(self.norm, x)

    def _attention_inputs(
        self, x: Tensor, step: Step | None, images: Images | None, packing: Packing | None
    ) -> tuple[AttentionInputs, AttentionInputs]:
        """The inputs of attention to all earlier tokens, and those of attention within the sliding window.

        x: the embeddings (B, T, C), or (n, C) of packed tokens. images: the image tokens and their rows.
        """
        config, T = self.config, x.shape[1] if packing is None else packing.places.shape[1]
        rows = torch.arange(T, device=x.device)[None]
        if step is not None:
            positions, angles = step.positions[None], step.rope_angles()
        else:
            positions = rows if packing is None else packing.positions
            angles = rope_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling, T)
        full = AttentionInputs(_per_head(angles, x.dtype), None, step, images, packing)
        sliding = full
        if step is None and config.sliding_window is not None and config.sliding_window < T:
            sliding = sliding._replace(mask=visible(rows, T, config.sliding_window))
        if config.sliding_rope_theta is not None:
            angles = rope_angles(positions, config.head_dim, config.sliding_rope_theta)
            sliding = sliding._replace(rope=_per_head(angles, x.dtype))
        return full, sliding

    def forward(self, tokens: Tensor, labels: Tensor | None = None, images: Images | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T) in the model's dtype; or, given labels (B, T), the summed float32 loss.

        labels[b, t] is the id that position t - 1 must predict at position t, or `adapter.loss.IGNORE`.
        images: as in `hidden_states`. Where rows with and without an image train disjoint parameters, a batch of both
        is run as two.
        """
        if labels is None:
            return self.output(self.hidden_states(tokens, images=images))
        if images is not None and self.separates_images and torch.is_grad_enabled():
            kinds = split_kinds(tokens, labels, images)
            return torch.stack([self.output(*self._predictions(*kind)) for kind in kinds]).sum()
        return self.output(*self._predictions(tokens, labels, images))

    def losses(self, tokens: Tensor, labels: Tensor, images: Images | None = None) -> Tensor:
        """The summed float32 loss of each row, (B,); otherwise as `forward`."""
        hidden, targets = self._predictions(tokens, labels, images)
        counts = (labels[:, 1:] != IGNORE).sum(1).tolist()
        rows = zip(hidden.split(counts), targets.split(counts), strict=True)
        return torch.stack([self.output(*row) for row in rows])

    def _predictions(self, tokens: Tensor, labels: Tensor, images: Images | None) -> tuple[Tensor, Tensor]:
        """The hidden state (m, C) that predicts each label, and the labels (m,), row by row."""
        packing = pack(tokens, labels, None if images is None else images[1]).to(self.tok_embeddings.weight.device)
        hidden = self.hidden_states(packing.tokens, images=images, packing=packing)
        return hidden if packing.labelled is None else hidden[packing.labelled], packing.targets


def _per_head(angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., D) in the model's dtype, shaped to turn all heads: (..., 1, D)."""
    cos, sin = angles
    return cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)
