"""Image-conditioned prompts (LLaMA-Adapter, arXiv 2303.16199, eq. 9-10).

A frozen image encoder gives M global features of an image, at several scales. A small trainable MLP turns them into one
token, which is added to every prompt of every adapted layer:

    I = up gelu(down [f_1; …; f_M])          I ∈ R^C
    P_l' = P_l + I

Each f_m is first normalised to mean 0 and variance 1 over its channels, without trainable parameters (the paper does
not say). An encoder's scales differ in magnitude by orders, and the largest would otherwise limit the learning rate.

The encoder is not part of the adapter, which only sees its features. The adapter file records the encoder's identity,
so that features of another encoder can be refused.

n images, C model width, K tokens of an image in LLaMA-Adapter V2, F = the sum of the features' widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.errors import AdapterError
from adapter.methods.base import AdapterPart

Images = tuple[Tensor, Tensor]
"""A batch's image features (n, F) float32, and the row of the batch that each belongs to, (n,) int64."""


@dataclass(frozen=True, kw_only=True)
class ImageProjectionConfig:
    """The shape of the trainable projection, and the image encoder whose features it reads."""

    widths: tuple[int, ...]
    """Channels of each of the M features, in order."""
    bottleneck: int = 72
    """Width of the MLP's hidden layer; 72 gives about the paper's 0.6 M parameters at 7B with CLIP's usual encoders."""
    encoder: str = ""
    """Identity of the encoder: its weights, preprocessing, precision and scales. Empty where it is not known."""
    preprocess: str = ""
    """The encoder's preprocessing in words, to help a reader find the encoder again."""

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or not self.widths or min(self.widths) < 2:
            raise AdapterError(f"an image needs features at least two channels wide and a bottleneck, got {self}")


class ImageProjection(AdapterPart):
    """The MLP of eq. 10: features (n, F) → tokens (n, C), in float32; or the K tokens of each image, (n, K C)."""

    of_images = True

    def __init__(self, config: ImageProjectionConfig, dim: int) -> None:
        super().__init__()
        self.widths = list(config.widths)
        self.down = nn.Linear(sum(config.widths), config.bottleneck)
        self.up = nn.Linear(config.bottleneck, dim)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set weights to N(0, 1/fan_in), so that a token is about as long as the prompts it joins; biases to 0."""
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        scales = [F.layer_norm(scale, scale.shape[1:]) for scale in features.float().split(self.widths, dim=1)]
        return self.up(F.gelu(self.down(torch.cat(scales, dim=1))))


def batch_images(features: Sequence[Tensor | None], width: int) -> Images:
    """Stack the features (F,) of the rows that have an image; None stands for a row without one.

    Raises AdapterError for features of another width than F = `width`.
    """
    rows = [row for row, one in enumerate(features) if one is not None]
    present = [one for one in features if one is not None]
    if wrong := [tuple(one.shape) for one in present if one.shape != (width,)]:
        raise AdapterError(f"the adapter reads {width} features of an image, got {wrong[0]}: another encoder?")
    stacked = torch.stack(present).float() if present else torch.zeros(0, width)
    return stacked, torch.tensor(rows, dtype=torch.int64)
