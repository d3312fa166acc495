"""The kernel of a cache that votes, and the grid of β and α: what Tip-Adapter, APE and APE-T share.

Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (ECCV 2022, arXiv 2207.09519):

    votes = exp(-β (1 - f Gᵀ)) Y

with G the keys and Y their one-hot labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cafo.methods.base import Stage, combinations


@dataclass(frozen=True, kw_only=True)
class VotingGrid:
    """Even steps of β and α from 0.1, which leave out the upper ends; the authors set these for each data set."""

    beta_high: float
    alpha_high: float
    beta_steps: int = 200
    alpha_steps: int = 20

    def stage(self, **others: list[float]) -> Stage:
        """Return the stage that chooses β and α, and other hyperparameters with them: β outside, α inside."""
        betas = linear_steps(0.1, self.beta_high, self.beta_steps)
        return Stage(combinations(beta=betas, **others), linear_steps(0.1, self.alpha_high, self.alpha_steps))


def linear_steps(low: float, high: float, steps: int) -> list[float]:
    """Return evenly spaced values from `low`, without the upper end."""
    return [low + i * (high - low) / steps for i in range(steps)]


def kernel(affinity: Tensor, beta: float) -> Tensor:
    """Return φ(x) = exp(-β (1 - x)) of each affinity."""
    return torch.exp(-beta * (1 - affinity))
