"""The search for α, β and the ensemble's weights, on validation features only.

CaFo (arXiv 2303.02151), section 3.4. α is exact (`cafo.alpha_intervals`), β lies on a grid that is refined around its
best value, and all candidate ensembles are tried. Two facts make it fast:
- Affinities do not depend on α, β or the ensemble, and are given.
- On an even grid of β, φ at β + Δ is φ at β times exp(-Δ (1 - x)): one multiplication for each step.

Legend: M keys, B images, N classes, K keys of the largest class, J values of β, b images of one block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.alpha_intervals import accuracy_steps, best_alpha, correct_intervals, label_margins
from cafo.cache import Cache, class_logits
from cafo.ensemble import Ensemble, combine
from cafo.errors import CafoError, refuse_text

# φ and its factor, of all sources, stay near this many floats for a block of images, so that they stay in the CPU's
# cache while β rises.
_BLOCK_FLOATS = 1 << 19
# The products of φ accumulate rounding errors, so φ is computed afresh after this many values of β.
_BETAS_PER_CHUNK = 25
# Candidates that are evaluated directly before the best of those evaluated is taken.
_MAX_CONFIRMATIONS = 16
_IMAGES_PER_BLOCK = 1024


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


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """The best α at every β that was tried, for one ensemble; for plots."""

    ensemble: Ensemble
    betas: tuple[float, ...]
    alphas: tuple[float, ...]
    correct: tuple[int, ...]
    """images correct at each (α, β), as the intervals of α tell"""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The chosen α, β and ensemble."""

    alpha: float
    beta: float
    ensemble: Ensemble
    correct: int
    """images correct at these values, by a direct evaluation of eq. 9 in float32"""
    total: int
    landscapes: tuple[Landscape, ...]
    """one for each candidate ensemble, in their order"""

    @property
    def accuracy(self) -> float:
        """The share of the validation images that are correct."""
        return self.correct / self.total


class _Candidate(NamedTuple):
    """The best α of one (β, ensemble). Candidates sort best first; ties by smaller α, smaller β, earlier ensemble."""

    wrong: int
    alpha: float
    beta: float
    ensemble: int


@torch.no_grad()
def search(
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    labels: Tensor,
    *,
    grid: BetaGrid | None = None,
    ensembles: Sequence[Ensemble] = (Ensemble(),),
) -> SearchResult:
    """Find the best α ≥ 0, β and ensemble on the given images.

    Ties go to the smaller α, then the smaller β, then the earlier ensemble. The result is confirmed by a direct
    evaluation in float32; a candidate that is not confirmed gives way to the next.

    Args:
        zero_shot: p_ZS, (B, N).
        affinities: {source: (M, B)}, from `Cache.affinities`, with the trained keys.
        key_labels: (M,) int64.
        labels: (B,) int64, of validation images.
        grid: values of β; the default has the range and the 200 steps of the reference's Caltech101 search.
        ensembles: candidates; see `weight_grid`.

    Raises:
        CafoError: no images, labels outside the classes, or shapes that do not fit.
    """
    _check_inputs(zero_shot, affinities, key_labels, labels)
    candidates = _search_grid(zero_shot, affinities, key_labels, labels, grid or BetaGrid(), ensembles)
    correct, best = _confirm(sorted(candidates), zero_shot, affinities, key_labels, labels, ensembles)
    return SearchResult(
        alpha=best.alpha,
        beta=best.beta,
        ensemble=ensembles[best.ensemble],
        correct=correct,
        total=len(labels),
        landscapes=_landscapes(candidates, ensembles, len(labels)),
    )


@torch.no_grad()
def surface(
    cache: Cache, features: Mapping[str, Tensor], labels: Tensor, *, alphas: Sequence[float], betas: Sequence[float]
) -> Tensor:
    """Return the number of correct images at every (β, α), with the cache's keys and ensemble: (J, A) int64.

    Args:
        features: {source: (B, C)}.
        labels: (B,) int64.
        alphas: A values.
        betas: J values.
    """
    counts = torch.zeros(len(betas), len(alphas), dtype=torch.int64)
    alpha_column = torch.tensor(alphas, dtype=torch.float32)[:, None]
    for rows in torch.arange(len(labels)).split(_IMAGES_PER_BLOCK):
        block = {name: f[rows] for name, f in features.items()}
        zero_shot, affinities, block_labels = cache.zero_shot(block), cache.affinities(block), labels[rows]
        for j, beta in enumerate(betas):
            sums = {n: class_logits(a, cache.labels, zero_shot.shape[1], beta) for n, a in affinities.items()}
            base, term, _, _ = combine(zero_shot, sums, cache.ensemble)
            low, high = correct_intervals(label_margins(base, block_labels), term, block_labels)
            counts[j] += ((low <= alpha_column) & (alpha_column < high)).sum(dim=1)
    return counts


def weight_grid(
    ensemble: Ensemble,
    sources: Sequence[str],
    temperatures: Sequence[float] = (1.0,),
    scales: Sequence[float] = (1.0,),
) -> list[Ensemble]:
    """Return candidates for the ensemble's weights: every temperature with every scale of every source.

    α multiplies all scales alike, so only their ratios matter: a candidate that is a multiple of another is left out.
    All candidates have the rule, baseline and sources of `ensemble`.
    """
    refuse_text(sources, "sources")
    candidates: dict[tuple[float, ...], Ensemble] = {}
    for temperature, combination in itertools.product(temperatures, itertools.product(scales, repeat=len(sources))):
        ratios = tuple(round(scale / max(combination), 9) for scale in combination)
        values = {
            "rule": ensemble.rule,
            "baseline": ensemble.baseline,
            "sources": ensemble.sources,
            "temperature": temperature,
            "scales": dict(zip(sources, ratios, strict=True)),
        }
        candidates.setdefault((temperature, *ratios), Ensemble(**values))  # type: ignore[arg-type]
    return list(candidates.values())


def _even_grid(low: float, high: float, steps: int) -> list[float]:
    return [low + (high - low) * i / max(steps - 1, 1) for i in range(steps)]


def _check_inputs(zero_shot: Tensor, affinities: Mapping[str, Tensor], key_labels: Tensor, labels: Tensor) -> None:
    images, classes = zero_shot.shape
    if not images or len(labels) != images:
        raise CafoError(f"the search needs one label per image and at least one image, got {len(labels)} and {images}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise CafoError(f"labels run from {int(labels.min())} to {int(labels.max())} with {classes} classes")
    expected = (len(key_labels), images)
    if wrong := {name: tuple(a.shape) for name, a in affinities.items() if tuple(a.shape) != expected}:
        raise CafoError(f"{expected[0]} keys and {images} images need affinities of shape {expected}, got {wrong}")


def _search_grid(
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    labels: Tensor,
    grid: BetaGrid,
    ensembles: Sequence[Ensemble],
) -> list[_Candidate]:
    """Return the best α of every β of the coarse grid, then of ever finer grids around the best β."""
    candidates: list[_Candidate] = []
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


def _confirm(
    candidates: Sequence[_Candidate],
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    labels: Tensor,
    ensembles: Sequence[Ensemble],
) -> tuple[int, _Candidate]:
    """Evaluate the best candidates directly, and return the best result with its candidate.

    It stops at the first candidate that claims no more than what is already confirmed.
    """
    total, best = len(labels), None
    for candidate in candidates[:_MAX_CONFIRMATIONS]:
        if best is not None and total - candidate.wrong <= best[0]:
            break
        predictions = {
            name: class_logits(a, key_labels, zero_shot.shape[1], candidate.beta) for name, a in affinities.items()
        }
        logits = combine(zero_shot, predictions, ensembles[candidate.ensemble]).logits(candidate.alpha)
        correct = int((logits.argmax(dim=-1) == labels).sum())
        if best is None or correct > best[0]:
            best = (correct, candidate)
    assert best is not None
    return best


def _landscapes(candidates: Sequence[_Candidate], ensembles: Sequence[Ensemble], total: int) -> tuple[Landscape, ...]:
    landscapes = []
    for number, ensemble in enumerate(ensembles):
        rows = sorted((c for c in candidates if c.ensemble == number), key=lambda c: c.beta)
        landscapes.append(
            Landscape(
                ensemble=ensemble,
                betas=tuple(c.beta for c in rows),
                alphas=tuple(c.alpha for c in rows),
                correct=tuple(total - c.wrong for c in rows),
            )
        )
    return tuple(landscapes)


def _candidates(
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    labels: Tensor,
    betas: Sequence[float],
    ensembles: Sequence[Ensemble],
) -> list[_Candidate]:
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
        for chunk, predictions in _class_sums({n: a[:, at] for n, a in affinities.items()}, slots, betas):
            for e, ensemble in enumerate(ensembles):
                base, term, _, _ = combine(block_zero_shot, predictions, ensemble)
                margins = zero_shot_margins if base is block_zero_shot else label_margins(base, block_labels)
                low[e, chunk, at], high[e, chunk, at] = correct_intervals(margins, term, block_labels)

    with _block_threads(zero_shot.device) as pool:
        list(pool.map(fill_intervals, torch.arange(images, device=labels.device).split(block)))
    candidates = []
    for e in range(len(ensembles)):
        correct, alphas = best_alpha(*accuracy_steps(low[e], high[e]))
        candidates += [
            _Candidate(images - count, alpha, beta, e)
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
        relative = a - a.amax(dim=0) if len(a) else a  # φ relative to the nearest key, as in `class_logits`
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
