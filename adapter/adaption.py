"""Adaption prompts and zero-init attention (LLaMA-Adapter, arXiv 2303.16199, eq. 1-8).

In each of the top L layers, l:

    P_l ∈ R^{K×C}   trainable prompt, initialised N(0, 1)
    g_l ∈ R^H       trainable gate, one per head, initialised to 0

    attention(x) = wo( SDPA(rope(q), rope(k), v, causal) + gate(g_l) ⊙ SDPA(rope(q), wk P_l, wv P_l) )

The two softmaxes are separate, so at g = 0 the adapted model equals the base model, bit for bit. The prompts' keys are
not rotated and no sliding window hides them, because prompts have no position. `wk` and `wv` are the frozen layer's
own, with its bias where it has one; so are the norm of the keys, the scale and the soft cap of the scores.

An image's token I (see `adapter.image_projection`) is added to the prompt. The projections are linear, so
wk (P + I) = wk P + wk I: a row with an image costs the projection of one more token, a row without one costs nothing. A
bias counts once, and a norm is taken of the sum.

LLaMA-Adapter V2 shows an image to other layers than those with prompts (`ImageAdaption`).

The paper's ablations are two more gates: `one` is fixed at 1 (rand-init attention); `prefix` has no gate but is an
ordinary prefix, whose keys share one softmax with those of the words. So one file serves three methods of
`adapter.methods.registry`: zero_init, rand_init and prefix.

B batch, T tokens, S keys, C width, H query heads, G key/value heads, D channels of a head, K prompt length, n images.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError
from adapter.image_projection import ImageProjection, ImageProjectionConfig, Images
from adapter.methods.base import AdapterMethod, AdapterPart

if TYPE_CHECKING:
    from adapter.decoder import Decoder

Gate = Literal["tanh", "identity", "one", "prefix"]

TRAINED_GATES: tuple[Gate, ...] = ("tanh", "identity")
"""The conventions with a trainable g."""

METHOD_GATES: Mapping[str, Gate] = MappingProxyType({"zero_init": "tanh", "rand_init": "one", "prefix": "prefix"})
"""The methods of prompts, and the gate that each is trained with."""

_PARAMETER = re.compile(r"layers\.(\d+)\.attention\.adaption\.(prompt|gate)")


def gate_factor(gate: Tensor, convention: Gate) -> Tensor:
    """The factor of the prompt's attention: tanh(g), or the gate as it is under every other convention."""
    return gate.tanh() if convention == "tanh" else gate


@dataclass(frozen=True, kw_only=True)
class AdaptionConfig(AdapterMethod):
    """The shape of an adapter of prompts."""

    n_layers: int = 30
    """L, number of adapted layers, counted from the top."""
    prompt_length: int = 10
    """K, number of prompt tokens in each adapted layer."""
    gate: Gate = "tanh"
    """Function that the model applies to g: `tanh` (as the official training code does) or `identity` (as official v1
    inference, litgpt and PEFT do). `one` and `prefix` have no trainable g."""
    vision: ImageProjectionConfig | None = None
    """Image projection of the adapter; None for text alone."""

    def __post_init__(self) -> None:
        if self.n_layers < 1 or self.prompt_length < 1:
            raise AdapterError(f"an adapter needs n_layers >= 1 and prompt_length >= 1, got {self}")
        if self.gate not in get_args(Gate):
            raise AdapterError(f"gate must be one of {', '.join(get_args(Gate))}, got {self.gate!r}")

    @property
    def method(self) -> str:
        """The method that trains this gate; `zero_init` for `identity`."""
        return next((name for name, gate in METHOD_GATES.items() if gate == self.gate), "zero_init")

    @property
    def untrained_tensors(self) -> frozenset[str]:
        """The gate, where it is fixed."""
        return frozenset() if self.gate in TRAINED_GATES else frozenset({"gate"})

    def install(self, model: "Decoder") -> None:
        """See `AdapterMethod.install`."""
        for block in list(model.blocks)[-self.n_layers :]:
            block.attention.adaption = Adaption(self, model.config.dim, model.config.n_heads)
        if self.vision is not None:
            model.vision = ImageProjection(self.vision, model.config.dim)

    def on_top(self, n_layers: int) -> Self:
        """See `AdapterMethod.on_top`."""
        return replace(self, n_layers=n_layers, vision=None)

    def describe(self) -> str:
        """See `AdapterMethod.describe`."""
        return f"{self.prompt_length} prompt tokens in each of the top {self.n_layers} layers"

    def header(self) -> dict[str, str]:
        """See `AdapterMethod.header`: the entries of the format's first version."""
        return {"gate": self.gate, "n_layers": str(self.n_layers), "prompt_length": str(self.prompt_length)}

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `AdapterMethod.pack`: `prompt` (L, K, C), `gate` (L, H), and the image projection under `vision.`."""
        layers: dict[str, dict[int, Tensor]] = {"prompt": {}, "gate": {}}
        rest = {}
        for name, tensor in tensors.items():
            if match := _PARAMETER.fullmatch(name):
                layers[match[2]][int(match[1])] = tensor
            else:
                rest[name] = tensor
        return {kind: torch.stack([of[layer] for layer in sorted(of)]) for kind, of in layers.items()} | rest

    def unpack(self, tensors: Mapping[str, Tensor], base: DecoderConfig) -> dict[str, Tensor]:
        """See `AdapterMethod.unpack`. A gate (L, 1), which serves all heads, becomes one per head."""
        unpacked = {name: tensor for name, tensor in tensors.items() if name not in ("prompt", "gate")}
        for layer, (prompt, gate) in enumerate(zip(tensors["prompt"], tensors["gate"], strict=True)):
            part = f"layers.{base.n_layers - self.n_layers + layer}.attention.adaption"
            unpacked |= {f"{part}.prompt": prompt, f"{part}.gate": gate.expand(base.n_heads)}
        return unpacked

    def sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """See `AdapterMethod.sizes`: files of other programs state little."""
        heads = {} if tensors["gate"].shape[1] == 1 else {"n_heads": tensors["gate"].shape[1]}
        return {"dim": tensors["prompt"].shape[2], **heads}


class FrozenLayer(NamedTuple):
    """The parts of its layer that the prompt's attention uses."""

    wk: nn.Module
    wv: nn.Module
    k_norm: nn.Module | None
    """The norm of each head's keys; None where the layer has none."""
    has_bias: bool
    """wk and wv add a bias."""
    attend: Callable[..., Tensor]
    """`adapter.attention.attend` with the layer's scale and soft cap."""


class Adaption(AdapterPart):
    """One adapted layer's prompt (K, C) and gate (H,), and the layer's attention with them."""

    def __init__(self, config: AdaptionConfig, dim: int, n_heads: int) -> None:
        super().__init__()
        self.gate_convention, self.reads_images = config.gate, config.vision is not None
        self.prompt = nn.Parameter(torch.empty(config.prompt_length, dim))
        self.gate = nn.Parameter(torch.empty(n_heads), requires_grad=config.gate in TRAINED_GATES)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set prompts to N(0, 1), and gates to 0 if they are trained, else to 1."""
        nn.init.normal_(self.prompt, generator=generator)
        nn.init.constant_(self.gate, float(not self.gate.requires_grad))

    def keys_values(self, layer: FrozenLayer, q: Tensor, images: Images | None) -> list[Tensor]:
        """The prompt's keys and values: each (1, G, K, D) for all rows, or (B, G, K, D) if some rows have an image.

        q: queries (B, H, T, D), in the dtype that the base computes in. images: the image tokens (n, C) and their rows.
        """
        keys_values = []
        prompt = self.trained(self.prompt).to(q.dtype)
        for projection, norm in ((layer.wk, layer.k_norm), (layer.wv, None)):
            heads = projection(prompt).unflatten(-1, (-1, q.shape[-1]))
            projected = heads[None].transpose(1, 2)  # (1, G, K, D)
            if images is not None and self.reads_images:
                tokens, rows = images
                image = projection(tokens.to(q.dtype))
                if layer.has_bias:  # as a projection: ZeRO-3 gathers the bias for a call of its module alone
                    image = image - projection(torch.zeros_like(tokens[:1], dtype=q.dtype))
                image = image.unflatten(-1, (-1, q.shape[-1]))[:, :, None].expand(-1, -1, projected.shape[2], -1)
                projected = projected.expand(len(q), -1, -1, -1).index_add(0, rows, image)
            keys_values.append(projected if norm is None else norm(projected))
        return keys_values

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        layer: FrozenLayer,
        images: Images | None = None,
    ) -> Tensor:
        """Attention to words and prompt, (B, H, T, D): eq. 6-8.

        q: rotated queries (B, H, T, D). k, v: keys and values (B, G, S, D) of the words, under `mask` (None is causal).
        layer: the frozen layer. images: the image tokens (n, C) and their rows (n,).
        """
        keys, values = self.keys_values(layer, q, images)
        keys, values = (x.expand(q.shape[0], -1, -1, -1) for x in (keys, values))
        if self.gate_convention == "prefix":
            if mask is None:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = F.pad(mask, (keys.shape[2], 0), value=True)  # every word attends to the whole prompt
            return layer.attend(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), mask)
        gate = gate_factor(self.trained(self.gate), self.gate_convention)
        words = layer.attend(q, k, v, mask, causal=mask is None)
        return words + gate.to(q.dtype).view(1, -1, 1, 1) * layer.attend(q, keys, values)


class ImageAdaption(AdapterPart):
    """The gate (H,) of a layer that attends to an image's own K tokens, and the layer's attention with them."""

    of_images = True
    gate_convention: Gate = "tanh"

    def __init__(self, n_heads: int, n_tokens: int) -> None:
        """n_tokens: K, the number of an image's tokens."""
        super().__init__()
        self.n_tokens = n_tokens
        self.gate = nn.Parameter(torch.empty(n_heads))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the gate to 0."""
        nn.init.zeros_(self.gate)

    def keys_values(self, layer: FrozenLayer, q: Tensor, images: Images | None) -> list[Tensor]:
        """The keys and values (n, G, K, D) of the tokens (n, K C) of n images. q: as in `Adaption.keys_values`."""
        assert images is not None
        tokens = images[0].to(q.dtype).unflatten(1, (self.n_tokens, -1))
        keys, values = (w(tokens).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2) for w in (layer.wk, layer.wv))
        return [keys if layer.k_norm is None else layer.k_norm(keys), values]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        layer: FrozenLayer,
        images: Images | None = None,
    ) -> Tensor:
        """Attention to words and, in the rows that have one, to the image: as `Adaption.forward`."""
        words = layer.attend(q, k, v, mask, causal=mask is None)
        if images is None:
            return words
        gate = gate_factor(self.trained(self.gate), self.gate_convention)
        keys, values = self.keys_values(layer, q, images)
        if not len(keys):  # which kernels may refuse; gradients are 0, and not None
            return words + 0 * (gate.sum() + keys.sum() + values.sum()).to(words.dtype)
        seen = layer.attend(q[images[1]], keys, values)
        return words.index_add(0, images[1], gate.to(q.dtype).view(1, -1, 1, 1) * seen)
