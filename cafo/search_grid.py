"""The exact best α at every β of a grid, for every candidate ensemble.

CaFo (arXiv 2303.02151), section 3.4. α is exact (`cafo.alpha_intervals`), and β lies on a grid that is refined around
its best value. Two facts make it fast:
- Affinities do not depend on α, β or the ensemble, and are given.
- On an even grid of β, φ at β + Δ is φ at β times exp(-Δ (1 - x)): one multiplication for each step.

Legend: M keys, B images, N classes, K keys of the largest class, J values of β, b images of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.alpha_intervals import accuracy_steps, best_alpha, correct_intervals, label_margins
from cafo.cache import nearest_affinity
from cafo.ensemble import ZERO_SHOT, Ensemble, combine, standardise
from cafo.errors import CafoError

# φ and its factor, of all sources, stay near this many floats for a block of images, so that they stay in the CPU's
# cache while β rises.
_BLOCK_FLOATS = 1 << 19
# The products of φ accumulate rounding errors, so φ is computed afresh after this many values of β.
_BETAS_PER_CHUNK = 25


@dataclass(frozen=True, kw_only=True)
class BetaGrid:
    """`steps` evenly spaced values of β from `low` to `high`, then `refinements` finer grids around the best.

    Raises:
        CafoError: bounds that are not 0 < low <= high, or too few steps.
    """

    low: float = 0.1
    high: float = 12.0
    steps: int = 200
    refinements: int = 2
    refined_steps: int = 9

    def __post_init__(self) -> None:
        if not (0 < self.low <= self.high and self.steps >= 1 and self.refinements >= 0 and self.refined_steps >= 2):
            raise CafoError(
                f"a β grid needs 0 < low <= high, steps >= 1 and refined_steps >= 2, got low={self.low}, "
                f"high={self.high}, steps={self.steps}, refined_steps={self.refined_steps}"
            )

    def edge_notice(self, alpha: float, beta: float, *, low_setting: str = "low", high_setting: str = "high") -> str:
        """Return what a user should know if the chosen α or β is at the edge of its range; empty if neither is.

        α has no upper edge, since the search for it is exact.

        Args:
            low_setting, high_setting: the settings that widen the range of β, by the names that the user knows.
        """
        if alpha == 0:
            return "the chosen α is 0, its smallest value: the cache does not help on the validation images"
        if self.low < self.high and beta in (self.low, self.high):
            extreme, setting = ("smallest", low_setting) if beta == self.low else ("largest", high_setting)
            return f"the chosen β is {beta:g}, the {extreme} value that was tried; to try others, change {setting}"
        return ""

    def values(self) -> list[float]:
        """Return the coarse grid, both ends included."""
        return _even_grid(self.low, self.high, self.steps)


class Candidate(NamedTuple):
    """The best α of one (β, ensemble). Candidates sort best first; ties by smaller α, smaller β, earlier ensemble."""

    wrong: int
    alpha: float
    beta: float
    ensemble: int


def search_grid(
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    labels: Tensor,
    grid: BetaGrid,
    ensembles: Sequence[Ensemble],
) -> list[Candidate]:
    """Return the best α of every β of the coarse grid, then of ever finer grids around the best β."""
    candidates: list[Candidate] = []
    betas, spacing = grid.values(), (grid.high - grid.low) / max(grid.steps - 1, 1)
    known: set[float] = set()
    for _ in range(grid.refinements + 1):
        # The whole even grid is computed, as φ needs an even one; values of β that were tried before are left out.
        finer = _candidates(zero_shot, affinities, key_labels, labels, betas, ensembles)
        candidates += [candidate for candidate in finer if candidate.beta not in known]
        if spacing == 0:
            break
        centre = min(candidates).beta
        known = {candidate.beta for candidate in candidates}
        betas = _even_grid(max(grid.low, centre - spacing), min(grid.high, centre + spacing), grid.refined_steps)
        spacing = 2 * spacing / (grid.refined_steps - 1)
    return candidates


def _even_grid(low: float, high: float, steps: int) -> list[float]:
    return [low + (high - low) * i / max(steps - 1, 1) for i in range(steps)]


def _candidates(
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    labels: Tensor,
    betas: Sequence[float],
    ensembles: Sequence[Ensemble],
) -> list[Candidate]:
    """Return the best α at each of the evenly spaced `betas`, for each ensemble."""
    if not betas:
        return []
    images, classes = zero_shot.shape
    slots = _class_slots(key_labels, classes)
    low = torch.empty(len(ensembles), len(betas), images, dtype=zero_shot.dtype, device=zero_shot.device)
    high = torch.empty_like(low)
    block = max(1, _BLOCK_FLOATS // max(slots.numel() * len(affinities), 1))

    @torch.no_grad()  # grad mode is per thread, so the caller's does not hold here
    def fill_intervals(rows: Tensor) -> None:
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        block_zero_shot, block_labels = zero_shot[at], labels[at]
        zero_shot_margins = label_margins(block_zero_shot, block_labels)
        z_zero_shot = standardise(block_zero_shot)
        for chunk, predictions in _class_sums({n: a[:, at] for n, a in affinities.items()}, slots, betas):
            z = {ZERO_SHOT: z_zero_shot, **{name: standardise(p) for name, p in predictions.items()}}
            for e, ensemble in enumerate(ensembles):
                base, term, _, _ = combine(block_zero_shot, predictions, ensemble, z)
                margins = zero_shot_margins if base is block_zero_shot else label_margins(base, block_labels)
                low[e, chunk, at], high[e, chunk, at] = correct_intervals(margins, term, block_labels)

    with _block_threads(zero_shot.device) as pool:
        list(pool.map(fill_intervals, torch.arange(images, device=labels.device).split(block)))
    candidates = []
    for e in range(len(ensembles)):
        correct, alphas = best_alpha(*accuracy_steps(low[e], high[e]))
        candidates += [
            Candidate(images - count, alpha, beta, e)
            for count, alpha, beta in zip(correct.tolist(), alphas.tolist(), betas, strict=True)
        ]
    return candidates


@contextmanager
def _block_threads(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool with as many threads as PyTorch uses here, each of which runs PyTorch single-threaded.

    A block is many short operations on tensors in the CPU's cache. PyTorch's own threads, which split each operation,
    would spend most of the time waiting for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # holds for this thread; the pool's threads set it for themselves
    try:
        with ThreadPoolExecutor(threads if device.type == "cpu" else 1, "search", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _class_slots(key_labels: Tensor, classes: int) -> Tensor:
    """Return the row numbers of each class's keys, (K, N); M, one past the last, where a class has fewer than K."""
    keys, device = len(key_labels), key_labels.device
    counts = torch.bincount(key_labels, minlength=classes)
    order = torch.argsort(key_labels, stable=True)
    rank = torch.arange(keys, device=device) - (counts.cumsum(0) - counts)[key_labels[order]]
    slots = torch.full((int(counts.max()) if keys else 0, classes), keys, device=device)
    slots[rank, key_labels[order]] = order
    return slots


def _class_sums(
    affinities: Mapping[str, Tensor], slots: Tensor, betas: Sequence[float]
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield eq. 6-7 for chunks of J' of the evenly spaced `betas`: the chunk, and {source: p (J', b, N)}.

    Within a chunk, each value of β costs one multiplication of φ.
    """
    exponents, factors = {}, {}
    spacing = (betas[-1] - betas[0]) / max(len(betas) - 1, 1)
    for name, a in affinities.items():
        relative = a - nearest_affinity(a) if len(a) else a  # φ relative to the nearest key, as in `class_logits`
        absent = relative.new_full((1, relative.shape[1]), -math.inf)  # φ = 0 in the empty slots of small classes
        exponents[name] = torch.cat([relative, absent])[slots]  # (K, N, b)
        factors[name] = torch.exp(spacing * exponents[name])
    for first in range(0, len(betas), _BETAS_PER_CHUNK):
        chunk = slice(first, min(first + _BETAS_PER_CHUNK, len(betas)))
        predictions = {}
        for name, exponent in exponents.items():
            phi = torch.exp(betas[first] * exponent)
            sums = phi.new_empty(chunk.stop - chunk.start, *exponent.shape[1:])  # (J', N, b)
            for j, p in enumerate(sums):
                if j:
                    phi *= factors[name]
                torch.sum(phi, dim=0, out=p)
            predictions[name] = sums.transpose(1, 2)
        yield chunk, predictions
