"""The exact search for α, β and the ensemble's weights, on validation features only.

CaFo (arXiv 2303.02151), section 3.4: the logits are base + α · term (eq. 9), and the term does not depend on α. For an
image with label y and any other class j,

    y beats j   ⇔   (base_y - base_j) + α (term_y - term_j) > 0

is a half-line of α, so the image is right on one interval (lo, hi) of α ≥ 0. The number of right images is a step
function of α; one sort of the intervals' ends gives all of it, hence the exact best α over the whole half-line where
a grid tries a few. Over an even grid of β, φ at β + Δ is φ at β times exp(-Δ (1 - x)): one multiply. Affinities are
computed once, before.

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

from cafo.cache import Cache, class_logits
from cafo.ensemble import Ensemble, combine
from cafo.errors import CafoError

# φ and its step, of all sources, for a block of images stay near this many floats so that the walk along β runs in
# cache.
_BLOCK_FLOATS = 1 << 19
# The walk along β multiplies rounding errors; after this many steps φ is taken afresh.
_LEG = 25
# A gap between two breakpoints narrower than this (relative) may not survive float32, so no α is chosen in it.
_GAP = 1e-5
# Claims re-evaluated before the search settles for the best it has confirmed.
_CONFIRMATIONS = 16
_IMAGES_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class BetaGrid:
    """`steps` even values of β from `low` to `high`, then `refinements` finer grids around the best."""

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

    def values(self) -> list[float]:
        """The coarse grid, both ends included."""
        return _even(self.low, self.high, self.steps)


class AccuracyPath(NamedTuple):
    """Right answers as a step function of α at one β."""

    alphas: Tensor
    """(P,) float64, rising, from 0: step p covers (alphas[p], alphas[p+1]), the last runs to infinity"""
    correct: Tensor
    """(P,) int64: images right on that step"""


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """The best over α at every β that was tried, for one ensemble: what a plot of the search needs."""

    ensemble: Ensemble
    betas: tuple[float, ...]
    alphas: tuple[float, ...]
    correct: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The search's answer. `correct` is a direct evaluation of eq. 9 in float32 at exactly these values."""

    alpha: float
    beta: float
    ensemble: Ensemble
    correct: int
    total: int
    landscapes: tuple[Landscape, ...]

    @property
    def accuracy(self) -> float:
        """Share of the validation images."""
        return self.correct / self.total


class _Claim(NamedTuple):
    """The best step of one (β, ensemble), as its breakpoints tell; sorts best first, then towards small α."""

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
    """The best (α ≥ 0, β, ensemble) on the given images: exact in α, on a refined grid in β, exhaustive over ensembles.

    Ties go to the smaller α, then the smaller β, then the earlier ensemble. α is the middle of its step, so that
    rounding does not move an image across; the answer is confirmed by a direct evaluation, and a claim that float32
    does not confirm gives way to the next.

    Args:
        zero_shot: p_ZS, (B, N).
        affinities: {source: (M, B)}, from `Cache.affinities`, with the fine-tuned keys.
        key_labels: (M,) int64.
        labels: (B,) int64, of validation images.
        grid: values of β; the default holds the reference's Caltech101 range at its 200 steps.
        ensembles: candidates; see `weight_grid`.

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    _check(zero_shot, affinities, key_labels, labels)
    grid = grid or BetaGrid()
    claims: list[_Claim] = []
    betas, radius = grid.values(), (grid.high - grid.low) / max(grid.steps - 1, 1)
    for _ in range(grid.refinements + 1):
        claims += _claims(zero_shot, affinities, key_labels, labels, betas, ensembles)
        if radius == 0:
            break
        centre = min(claims).beta
        known = {claim.beta for claim in claims}
        finer = _even(max(grid.low, centre - radius), min(grid.high, centre + radius), grid.refined_steps)
        betas, radius = [b for b in finer if b not in known], 2 * radius / (grid.refined_steps - 1)

    total, confirmed = len(labels), None
    for claim in sorted(claims)[:_CONFIRMATIONS]:
        if confirmed is not None and claim.wrong >= total - confirmed[0]:
            break
        predictions = {n: class_logits(a, key_labels, zero_shot.shape[1], claim.beta) for n, a in affinities.items()}
        logits = combine(zero_shot, predictions, ensembles[claim.ensemble]).logits(claim.alpha)
        correct = int((logits.argmax(dim=-1) == labels).sum())
        if confirmed is None or correct > confirmed[0]:
            confirmed = (correct, claim)
    assert confirmed is not None
    correct, chosen = confirmed
    landscapes = []
    for e, ensemble in enumerate(ensembles):
        rows = sorted((c for c in claims if c.ensemble == e), key=lambda c: c.beta)
        landscapes.append(
            Landscape(
                ensemble=ensemble,
                betas=tuple(c.beta for c in rows),
                alphas=tuple(c.alpha for c in rows),
                correct=tuple(total - c.wrong for c in rows),
            )
        )
    return SearchResult(
        alpha=chosen.alpha,
        beta=chosen.beta,
        ensemble=ensembles[chosen.ensemble],
        correct=correct,
        total=total,
        landscapes=tuple(landscapes),
    )


@torch.no_grad()
def accuracy_path(base: Tensor, term: Tensor, labels: Tensor) -> AccuracyPath:
    """Accuracy over the whole half-line α ≥ 0 for logits base + α · term: (B, N), (B, N), (B,)."""
    low, high = _intervals(_margins(base, labels), term, labels)
    ends, correct = _steps(low[None], high[None])
    kept = torch.cat([ends[0, 1:] > ends[0, :-1], ends.new_ones(1, dtype=torch.bool)]) & ends[0].isfinite()
    return AccuracyPath(ends[0][kept].double(), correct[0][kept])


@torch.no_grad()
def surface(
    cache: Cache, features: Mapping[str, Tensor], labels: Tensor, *, alphas: Sequence[float], betas: Sequence[float]
) -> Tensor:
    """Images right at every (β, α), with the cache's keys and ensemble: (J, A) int64, for a plot.

    Args:
        features: {source: (B, C)}.
        labels: (B,).
        alphas, betas: A values and J values.
    """
    counts = torch.zeros(len(betas), len(alphas), dtype=torch.int64)
    at = torch.tensor(alphas, dtype=torch.float32)[:, None]
    for rows in torch.arange(len(labels)).split(_IMAGES_AT_ONCE):
        block = {name: f[rows] for name, f in features.items()}
        zero_shot, affinities, own = cache.zero_shot(block), cache.affinities(block), labels[rows]
        for j, beta in enumerate(betas):
            sums = {n: class_logits(a, cache.labels, zero_shot.shape[1], beta) for n, a in affinities.items()}
            base, term, _, _ = combine(zero_shot, sums, cache.ensemble)
            low, high = _intervals(_margins(base, own), term, own)
            counts[j] += ((low <= at) & (at < high)).sum(dim=1)
    return counts


def weight_grid(
    ensemble: Ensemble,
    sources: Sequence[str],
    temperatures: Sequence[float] = (1.0,),
    scales: Sequence[float] = (1.0,),
) -> list[Ensemble]:
    """Candidates for the ensemble's weights: every temperature with every scale of every source.

    α multiplies all scales at once, so only their ratios count: a candidate that is another one times a factor is left
    out. The given ensemble's rule, baseline and sources are kept.
    """
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


def _even(low: float, high: float, steps: int) -> list[float]:
    return [low + (high - low) * i / max(steps - 1, 1) for i in range(steps)]


def _check(zero_shot: Tensor, affinities: Mapping[str, Tensor], key_labels: Tensor, labels: Tensor) -> None:
    images, classes = zero_shot.shape
    if not images or len(labels) != images:
        raise CafoError(f"the search needs one label per image and at least one image, got {len(labels)} and {images}")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise CafoError(f"labels run from {int(labels.min())} to {int(labels.max())} with {classes} classes")
    wanted = (len(key_labels), images)
    if wrong := {name: tuple(a.shape) for name, a in affinities.items() if tuple(a.shape) != wanted}:
        raise CafoError(f"{wanted[0]} keys and {images} images need affinities of shape {wanted}, got {wrong}")


def _claims(
    zero_shot: Tensor,
    affinities: Mapping[str, Tensor],
    key_labels: Tensor,
    labels: Tensor,
    betas: Sequence[float],
    ensembles: Sequence[Ensemble],
) -> list[_Claim]:
    """The best step of α at each of the even `betas`, for each ensemble."""
    if not betas:
        return []
    images, classes = zero_shot.shape
    slots = _slots(key_labels, classes)
    low = torch.empty(len(ensembles), len(betas), images, dtype=zero_shot.dtype, device=zero_shot.device)
    high = torch.empty_like(low)
    block = max(1, _BLOCK_FLOATS // max(slots.numel() * len(affinities), 1))

    @torch.no_grad()  # which holds for one thread
    def fill(rows: Tensor) -> None:
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        walk = _walk({n: a[:, at] for n, a in affinities.items()}, slots, betas)
        piece = zero_shot[at]
        fixed = _margins(piece, labels[at])
        for leg, predictions in walk:
            for e, ensemble in enumerate(ensembles):
                base, term, _, _ = combine(piece, predictions, ensemble)
                margins = fixed if base is piece else _margins(base, labels[at])
                low[e, leg, at], high[e, leg, at] = _intervals(margins, term, labels[at])

    with _block_threads(zero_shot.device) as pool:
        list(pool.map(fill, torch.arange(images, device=labels.device).split(block)))
    claims = []
    for e in range(len(ensembles)):
        correct, alphas = _best(*_steps(low[e], high[e]))
        claims += [
            _Claim(images - c, a, beta, e) for c, a, beta in zip(correct.tolist(), alphas.tolist(), betas, strict=True)
        ]
    return claims


@contextmanager
def _block_threads(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch may use here, for whole blocks of images: the walk is many short operations on cached
    blocks, and threads that fork and join for each of them gain little and wait much for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own threads, of this thread; the pool's have to be told themselves
    try:
        with ThreadPoolExecutor(threads if device.type == "cpu" else 1, "search", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _slots(key_labels: Tensor, classes: int) -> Tensor:
    """(K, N): row numbers of each class's keys; M, one past the last, where a class has fewer than K."""
    keys, device = len(key_labels), key_labels.device
    counts = torch.bincount(key_labels, minlength=classes)
    order = torch.argsort(key_labels, stable=True)
    rank = torch.arange(keys, device=device) - (counts.cumsum(0) - counts)[key_labels[order]]
    slots = torch.full((int(counts.max()) if keys else 0, classes), keys, device=device)
    slots[rank, key_labels[order]] = order
    return slots


def _walk(
    affinities: Mapping[str, Tensor], slots: Tensor, betas: Sequence[float]
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield, leg by leg of the even `betas`, which ones and {source: p (J', b, N)}: eq. 6-7 by one multiply per
    step."""
    exponents, steps = {}, {}
    delta = (betas[-1] - betas[0]) / max(len(betas) - 1, 1)
    for name, a in affinities.items():
        relative = a - a.amax(dim=0) if len(a) else a  # as `class_logits` takes φ
        absent = relative.new_full((1, relative.shape[1]), -math.inf)  # φ = 0: the filler of short classes adds nothing
        exponents[name] = torch.cat([relative, absent])[slots]  # (K, N, b)
        steps[name] = torch.exp(delta * exponents[name])
    for first in range(0, len(betas), _LEG):
        leg = slice(first, min(first + _LEG, len(betas)))
        predictions = {}
        for name, exponent in exponents.items():
            phi = torch.exp(betas[first] * exponent)
            sums = phi.new_empty(leg.stop - leg.start, *exponent.shape[1:])  # (J', N, b)
            for j, p in enumerate(sums):
                if j:
                    phi *= steps[name]
                torch.sum(phi, dim=0, out=p)
            predictions[name] = sums.transpose(1, 2)
        yield leg, predictions


def _margins(base: Tensor, labels: Tensor) -> Tensor:
    """base_y - base_j: (…, B, N), never zero.

    Where two logits are equal, argmax takes the first class, so a tie is a hair's breadth won by y over a later j and
    lost to an earlier one. The label's own column always wins.
    """
    margin = _own(base, labels) - base
    later = torch.arange(base.shape[-1], device=base.device) >= labels[:, None]
    hair = torch.where(later, 1.0, -1.0).to(margin) * torch.finfo(margin.dtype).tiny
    return torch.where(margin == 0, hair, margin)


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each image's own class: (…, B, N) → (…, B, 1)."""
    return logits.gather(-1, labels[:, None].expand(*logits.shape[:-1], 1))


def _intervals(margins: Tensor, term: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The open interval of α on which each image is right: (…, B) twice; low ≥ high where there is none."""
    slope = _own(term, labels) - term  # (…, B, N)
    crossing = -margins / slope  # slope 0: -inf where y leads for ever, +inf where it never does
    low = crossing.where(slope >= 0, -math.inf).amax(dim=-1)
    high = crossing.where(slope < 0, math.inf).amin(dim=-1)
    return low.clamp_min(0), high


def _steps(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Step functions of J sets of intervals: ends (J, 2B + 1) rising from 0, and the count right of each end."""
    none = low >= high
    low, high = low.masked_fill(none, math.inf), high.masked_fill(none, math.inf)
    ends = torch.cat([torch.zeros_like(low[:, :1]), low, high], dim=1)
    change = torch.ones_like(ends, dtype=torch.int64)
    change[:, 0], change[:, 1 + low.shape[1] :] = 0, -1
    ends, order = ends.sort(dim=1)
    return ends, change.gather(1, order).cumsum(dim=1)


def _best(ends: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Highest count of each row and the α to take for it: the middle of the leftmost wide enough step, 0 if it begins
    there."""
    following = torch.cat([ends[:, 1:], torch.full_like(ends[:, :1], math.inf)], dim=1)
    # Equal ends form one breakpoint: only the last of a run opens a step. An end at infinity opens none.
    wide = (following - ends > _GAP * (1 + ends)) & ends.isfinite()
    best, at = correct.masked_fill(~wide, -1).max(dim=1)
    start, stop = (edge.gather(1, at[:, None])[:, 0].double() for edge in (ends, following))
    middle = torch.where(stop.isfinite(), (start + stop) / 2, 2 * start + 1)
    return best, torch.where(start == 0, torch.zeros_like(start), middle)
