"""Rotary position embedding (RoPE, arXiv 2104.09864), with Llama 3's scaling to longer windows.

It rotates the pairs (0, D/2), (1, D/2 + 1), ... of a head's channels, as Hugging Face's checkpoints do.

B batch, H heads, T tokens, D channels of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of RoPE to longer windows.

    Frequencies whose wavelength exceeds `original_length / low_freq_factor` tokens are divided by `factor`; those below
    `original_length / high_freq_factor` are unchanged; those in between are interpolated.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    """The window that the model was first trained with, in tokens."""


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's rotation, each (*positions.shape, D) float32; the two halves of D are equal."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    if scaling is not None:
        turns = scaling.original_length * frequencies / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / scaling.factor
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys x (B, H, T, D) by cos and sin, each (B or 1, 1, T, D)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
