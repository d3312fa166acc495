"""The intervals of α on which each image is classified correctly, and the best α that follows from them.

CaFo (arXiv 2303.02151), section 3.4: the logits are base + α · term (eq. 9), and the term does not depend on α. For an
image with label y and any other class j,

    y beats j   ⇔   (base_y - base_j) + α (term_y - term_j) > 0

is a half-line of α. So an image is correct on one interval (low, high) of α ≥ 0, and the number of correct images is a
step function of α. Sorting the ends of all intervals gives the whole function, and with it the exact best α over the
half-line, where a grid would try a few values.

Legend: A values of α, B images, N classes, J independent problems (the values of β in a search).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A step between two breakpoints that is narrower than this (relative) may not survive float32: no α is chosen in it.
_MIN_STEP_WIDTH = 1e-5
TIE = 1e-36
"""In place of a margin of 0: below every other margin, and so large that its inverse times a slope is finite."""


def label_margins(base: Tensor, labels: Tensor) -> Tensor:
    """Return base_y - base_j, (…, B, N), with ties replaced by a tiny positive or negative number.

    Where two logits are equal, argmax takes the first class. So a tie counts as won by y against a later class j, and
    as lost against an earlier one. The label's own column always counts as won.

    Args:
        base: (…, B, N).
        labels: (B,) int64.
    """
    margin = _label_logits(base, labels) - base
    wins_ties = torch.arange(base.shape[-1], device=base.device) >= labels[:, None]
    return torch.where(margin == 0, torch.where(wins_ties, TIE, -TIE).to(margin), margin)


def correct_intervals(margins: Tensor, term: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the open interval of α ≥ 0 on which each image is correct: low and high, (…, B) each.

    low ≥ high means that the image is correct for no α.

    Args:
        margins: (…, B, N), from `label_margins`.
        term: (…, B, N).
        labels: (B,) int64.
    """
    # Where y is behind j at α = 0, it catches up if the slope is positive; where it is ahead, it falls behind if the
    # slope is negative. The last to be caught up with, and the first to overtake y, have the smallest rate.
    rate = (_label_logits(term, labels) - term) * (1 / margins.abs())  # 1 / α of the crossing; (…, B, N)
    behind = margins < 0
    infinite = torch.full_like(margins, math.inf)
    slowest = (rate + infinite.masked_fill(behind, 0)).amin(dim=-1)
    fastest = (rate + infinite.masked_fill(~behind, 0)).amin(dim=-1)
    return torch.where(slowest > 0, 1 / slowest, math.inf), torch.where(fastest < 0, -1 / fastest, math.inf)


def alone_intervals(margins: Tensor, term: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intervals where there is no base: an image is correct at every α > 0 or at none; (…, B) each.

    Args:
        margins: (…, B, N), from `label_margins` of zeros; infinite where a class does not count.
        term: (…, B, N).
        labels: (B,) int64.
    """
    # a margin decides between equal terms alone
    right = (_label_logits(term, labels) - term + margins).amin(dim=-1) > 0
    low = torch.where(right, TIE, math.inf).to(term)
    return low, torch.full_like(low, math.inf)


def count_correct_at(alphas: Tensor, base: Tensor, term: Tensor, labels: Tensor) -> Tensor:
    """Return the number of images that are correct at each α, as the intervals tell: (A,) int64.

    Args:
        alphas: (A,).
        base, term: (B, N).
        labels: (B,) int64.
    """
    low, high = correct_intervals(label_margins(base, labels), term, labels)
    return ((low <= alphas[:, None]) & (alphas[:, None] < high)).sum(dim=1)


def accuracy_steps(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of correct images as a step function of α, for each of J sets of intervals (J, B).

    Returns:
        The breakpoints, (J, 2B + 1), rising from 0, and the number of images correct between each breakpoint and the
        next, int64 of the same shape. Equal breakpoints are one: only the last of them starts a step.
    """
    empty = low >= high
    low, high = low.masked_fill(empty, math.inf), high.masked_fill(empty, math.inf)
    breakpoints = torch.cat([torch.zeros_like(low[:, :1]), low, high], dim=1)
    change = torch.ones_like(breakpoints, dtype=torch.int64)
    change[:, 0], change[:, 1 + low.shape[1] :] = 0, -1
    breakpoints, order = breakpoints.sort(dim=1)
    return breakpoints, change.gather(1, order).cumsum(dim=1)


def best_alpha(breakpoints: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest count of each of J step functions, and an α of the first step that reaches it.

    The α is the middle of the step, so that rounding does not move an image across its end. It is 0 where the step
    starts at 0.

    Args:
        breakpoints, correct: (J, 2B + 1), from `accuracy_steps`.
    """
    following = torch.cat([breakpoints[:, 1:], torch.full_like(breakpoints[:, :1], math.inf)], dim=1)
    # Of equal breakpoints only the last starts a step of some width. A breakpoint at infinity starts none.
    wide = (following - breakpoints > _MIN_STEP_WIDTH * (1 + breakpoints)) & breakpoints.isfinite()
    best, at = correct.masked_fill(~wide, -1).max(dim=1)
    start, stop = (ends.gather(1, at[:, None])[:, 0].double() for ends in (breakpoints, following))
    middle = torch.where(stop.isfinite(), (start + stop) / 2, 2 * start + 1)
    return best, torch.where(start == 0, torch.zeros_like(start), middle)


def _label_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logit of each image's label: (…, B, N) → (…, B, 1)."""
    return logits.gather(-1, labels[:, None].expand(*logits.shape[:-1], 1))
