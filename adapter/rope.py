"""Rotary position embedding (RoPE, arXiv 2104.09864), and its scalings to longer sequences.

RoPE rotates the pairs (0, D/2), (1, D/2 + 1), ... of a head's channels, as Hugging Face's checkpoints do. Pair i of the
token at position p turns by p f_i, where f_i = θ^(-2i/D) unless the model scales the frequencies. The scalings are
those of transformers 5, and equal its frequencies bit for bit.

B batch, H heads, T tokens, D channels of a head.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divide all frequencies by `factor` (position interpolation, arXiv 2306.15595)."""

    kind: ClassVar[str] = "linear"
    factor: float
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        """f (D/2,) of pairs with exponents 2i/D, in a batch whose longest sequence has `length` tokens."""
        return 1.0 / theta**exponents / self.factor


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """Raise θ with the sequence's length, once that exceeds the trained one ("dynamic NTK").

    The longest sequence of a batch sets the frequencies of all, and a cache keeps the keys as they were rotated.
    """

    kind: ClassVar[str] = "dynamic"
    factor: float
    original_length: int
    """Length that the model was trained with, in tokens."""
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        """f (D/2,), as in `LinearScaling.frequencies`."""
        if length > self.original_length:
            stretch = self.factor * torch.tensor(length) / self.original_length - (self.factor - 1)  # float32
            head_dim = 2 * len(exponents)
            theta = float(theta * stretch ** (head_dim / (head_dim - 2)))
        return 1.0 / theta**exponents


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3's scaling: divide the low frequencies alone.

    Frequencies whose wavelength exceeds `original_length / low_freq_factor` tokens are divided by `factor`; those below
    `original_length / high_freq_factor` are unchanged; those in between are interpolated.
    """

    kind: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    """Length that the model was first trained with, in tokens."""
    attention_factor: ClassVar[float] = 1.0

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        """f (D/2,), as in `LinearScaling.frequencies`."""
        plain = 1.0 / theta**exponents
        turns = self.original_length / (2 * math.pi / plain)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - keep) * plain / self.factor + keep * plain


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): divide the frequencies by pair, along a ramp, and sharpen attention.

    Pairs that turn at least `beta_fast` times over the original length are unchanged, those that turn at most
    `beta_slow` times are divided by `factor`, those in between are interpolated by their index.
    """

    kind: ClassVar[str] = "yarn"
    factor: float
    original_length: int
    """Length that the model was first trained with, in tokens."""
    attention_factor: float
    """Factor of cos and sin."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Round the ramp's ends to whole pairs."""

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        """f (D/2,), as in `LinearScaling.frequencies`."""
        periods, half = theta**exponents, len(exponents)
        first, last = (
            half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * half - 1)
        span = last - first or 0.001
        keep = 1 - ((torch.arange(half, device=periods.device).float() - first) / span).clamp(0, 1)
        return 1.0 / (self.factor * periods) * (1 - keep) + 1.0 / periods * keep


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): divide each pair's frequency by a factor of its own, found by search.

    As with `DynamicScaling`, the longest sequence of a batch decides for all which factors are used.
    """

    kind: ClassVar[str] = "longrope"
    short_factors: tuple[float, ...]
    """Divisors (D/2,) for sequences of at most the original length."""
    long_factors: tuple[float, ...]
    """Divisors (D/2,) for longer sequences."""
    original_length: int
    """Length that the model was first trained with, in tokens."""
    attention_factor: float
    """Factor of cos and sin."""

    def frequencies(self, theta: float, exponents: Tensor, length: int) -> Tensor:
        """f (D/2,), as in `LinearScaling.frequencies`."""
        divisors = self.long_factors if length > self.original_length else self.short_factors
        return 1.0 / (torch.tensor(divisors, device=exponents.device) * theta**exponents)


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling
"""A scaling of RoPE's frequencies to sequences longer than a model was first trained with."""


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None, length: int = 0
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's rotation, each (*positions.shape, D) float32; the two halves of D are equal.

    length: tokens of the batch's longest sequence, which some scalings depend on.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / theta**exponents if scaling is None else scaling.frequencies(theta, exponents, length)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys x (..., H, D) by cos and sin, each (..., 1, D)."""
    return _Rotation.apply(x, cos, sin) if x.requires_grad else _rotate(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """The rotation, whose gradient is the rotation back: nothing else is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(upstream[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half] -= x[..., half:] * sin[..., :half]
    rotated[..., half:] += x[..., :half] * sin[..., half:]
    return rotated
