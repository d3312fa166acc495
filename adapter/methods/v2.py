"""LLaMA-Adapter V2 (arXiv 2304.15010, section 3): prompts, and unlocked norms, biases and scales in all layers.

    y = s ⊙ (W x + b)        in every linear layer of every block; s = 1 and b = 0 at first (eq. 4)
    norms                    the weights of all norms before and after attention and feed-forward, and of the last one
    prompts                  zero-init attention to K prompts in the top L layers, as in V1 (`adapter.adaption`)
    images, early fusion     zero-init attention to an image's K tokens in the lowest E layers, which have no prompts:
                             attention(x) = wo( SDPA(q, k, v, causal) + tanh(g) ⊙ SDPA(q, wk I, wv I) )

In joint training (section 3.3) the parameters are disjoint: records with an image train the projection that makes
I ∈ R^{K×C} of its features and the gates of the early layers; records without one train all the rest.

This is the paper's variant. The released code for chat has W (s ⊙ x) + b, and the released code for images has W x + b
in some layers and adds the image to all prompts; files of these are refused, because they mean something else. The
image's tokens come of the same small projection as V1's one token, in place of the paper's transformer. A scale is held
as s = 1 + d and a norm's weight as w + d, with d trained and 0 at first, so that weight decay pulls to the base. The
keys and values of prompts and of an image's tokens go through the adapted wk and wv. Norms of queries and keys stay
frozen. Folded, without prompts and images: W' = diag(s) W, b' = s ⊙ b.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from adapter.adaption import AdaptionConfig, ImageAdaption
from adapter.decoder_config import DecoderConfig
from adapter.errors import AdapterError
from adapter.image_projection import ImageProjection, ImageProjectionConfig
from adapter.methods.base import LINEARS, AdapterMethod, AdapterPart, Delta, install_deltas

if TYPE_CHECKING:
    from adapter.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class V2Config(AdapterMethod):
    """LLaMA-Adapter V2's settings."""

    n_layers: int = 30
    """L, number of layers with prompts, counted from the top; 0 for none. All layers have scales, biases and unlocked
    norms."""
    prompt_length: int = 10
    """K, number of prompt tokens in each of these layers, and of tokens of an image."""
    variant: Literal["paper"] = "paper"
    """The form of scale and bias. Published code has others, which are not interchangeable."""
    image_layers: int = 1
    """E, number of layers that attend to an image, counted from the lowest; none of them has prompts."""
    vision: ImageProjectionConfig | None = None
    """Image projection of the adapter; None for text alone."""

    def __post_init__(self) -> None:
        if self.variant != "paper":
            raise AdapterError(f"LLaMA-Adapter V2 is known as in its paper, s (W x + b); not as in {self.variant!r}")
        if self.n_layers < 0 or self.prompt_length < 1 or self.image_layers < 1:
            raise AdapterError(
                f"LLaMA-Adapter V2 needs n_layers >= 0, prompt_length >= 1 and image_layers >= 1, got {self}"
            )

    @property
    def method(self) -> str:
        """`v2`."""
        return "v2"

    @property
    def separates_images(self) -> bool:
        """See `AdapterMethod.separates_images`: where it reads images."""
        return self.vision is not None

    def check(self, base: DecoderConfig) -> None:
        """See `AdapterMethod.check`: a layer has prompts or sees the image."""
        super().check(base)
        if self.vision is not None and self.n_layers + self.image_layers > base.n_layers:
            raise AdapterError(
                f"LLaMA-Adapter V2 shows images to the lowest {self.image_layers} layers and has prompts in the top "
                f"{self.n_layers}, more than the {base.n_layers} that the base has: set n_layers to at most "
                f"{max(0, base.n_layers - self.image_layers)}"
            )

    def first_layer(self, n_layers: int) -> int:
        """See `AdapterMethod.first_layer`: all layers are trained."""
        return 0

    def on_top(self, n_layers: int) -> Self:
        """See `AdapterMethod.on_top`: prompts stand in as many layers as they can."""
        return type(self)(n_layers=min(n_layers, self.n_layers), prompt_length=self.prompt_length)

    @property
    def usual_lr(self) -> float:
        """The released code's."""
        return 1e-3

    def install(self, model: "Decoder") -> None:
        """See `AdapterMethod.install`."""
        if self.n_layers:
            self._prompts().install(model)
        if self.vision is not None:
            for block in list(model.blocks)[: self.image_layers]:
                block.attention.adaption = ImageAdaption(model.config.n_heads, self.prompt_length)
            model.vision = ImageProjection(self.vision, self.prompt_length * model.config.dim)
        install_deltas(model, None, tuple(LINEARS), lambda _, n_out: ScaledBiasDelta(n_out))
        for norm in model.stream_norms:
            norm.shift = NormShift(model.config.dim)

    def describe(self) -> str:
        """See `AdapterMethod.describe`."""
        prompts = f"{self._prompts().describe()}; " if self.n_layers else ""
        images = f"; images in the lowest {self.image_layers}" if self.vision is not None else ""
        return f"{prompts}scales, biases and norms in all layers{images}"

    def _prompts(self) -> AdaptionConfig:
        return AdaptionConfig(n_layers=self.n_layers, prompt_length=self.prompt_length)


class ScaledBiasDelta(Delta):
    """One layer's scale, as its difference d (O,) to 1, and bias b (O,)."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.empty(n_outputs))
        self.b = nn.Parameter(torch.empty(n_outputs))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set d and b to 0."""
        nn.init.zeros_(self.d)
        nn.init.zeros_(self.b)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        d, b = self.trained(self.d), self.trained(self.b)
        return (1 + d).to(y.dtype) * (y + b.to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = 1 + self.d
        return scale[:, None] * weight, scale * (self.b if bias is None else self.b + bias)


class NormShift(AdapterPart):
    """The difference d (C,) that training adds to a norm's weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.empty(dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set d to 0."""
        nn.init.zeros_(self.d)

    def forward(self, weight: Tensor) -> Tensor:
        """The norm's weight (C,) with its difference, in float32."""
        return weight.float() + self.trained(self.d)
