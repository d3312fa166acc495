"""Image-conditioned prompts (LLaMA-Adapter, arXiv 2303.16199, eq. 9-10).

A frozen encoder gives M global features of an image, at several scales; a small trainable MLP turns them into one token,
which is added to every prompt of every adapted layer:

    I = up gelu(down [f_1; …; f_M])          I ∈ R^C
    P_l' = P_l + I

Each f_m is first brought to mean 0 and variance 1 over its channels, with nothing to learn (the paper does not say):
an encoder's scales differ in magnitude by orders, and the loudest would decide what learning rate the rest can bear.

The encoder is no part of the adapter. It is handed in as its features; only its name is kept, to refuse another's.

n images, C model width, F = the sum of the features' widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter.errors import AdapterError

Images = tuple[Tensor, Tensor]
"""Features (n, F), and the row of the batch that each belongs to, (n,) int64."""


@dataclass(frozen=True, kw_only=True)
class ImageProjectionConfig:
    """The trainable projection, and whose features it reads."""

    widths: tuple[int, ...]
    """Channels of the M features, in order."""
    bottleneck: int = 72
    """Width of the MLP's hidden layer; 72 makes about the paper's 0.6 M at 7B with any of CLIP's usual encoders."""
    encoder: str = ""
    """The encoder's identity: of its weights, preprocessing, precision and scales. Empty where it is not known."""
    preprocess: str = ""
    """The encoder's preprocessing in words, for whoever has to find it again."""

    def __post_init__(self) -> None:
        if self.bottleneck < 1 or not self.widths or min(self.widths) < 2:
            raise AdapterError(f"an image needs features at least two channels wide and a bottleneck, got {self}")


class Projection(nn.Module):
    """Features (n, F) → tokens (n, C), float32."""

    def __init__(self, config: ImageProjectionConfig, dim: int) -> None:
        super().__init__()
        self.widths = list(config.widths)
        self.down = nn.Linear(sum(config.widths), config.bottleneck)
        self.up = nn.Linear(config.bottleneck, dim)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights N(0, 1/fan_in), so that a token is about as long as the prompts it is added to; biases zero."""
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        scales = [F.layer_norm(scale, scale.shape[1:]) for scale in features.float().split(self.widths, dim=1)]
        return self.up(F.gelu(self.down(torch.cat(scales, dim=1))))


def gather(images: Sequence[Tensor | None], width: int) -> Images:
    """One (F,) or None per row of a batch → the features of the rows that have an image, and where they are.

    Raises ValueError for features of another width than F.
    """
    rows = [row for row, features in enumerate(images) if features is not None]
    found = [features for features in images if features is not None]
    if wrong := [tuple(features.shape) for features in found if features.shape != (width,)]:
        raise AdapterError(f"the adapter reads {width} features of an image, got {wrong[0]}: another encoder?")
    features = torch.stack(found).float() if found else torch.zeros(0, width)
    return features, torch.tensor(rows, dtype=torch.int64)
