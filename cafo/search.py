"""The search for α, β and the ensemble's weights, on validation or held-out features only.

CaFo (arXiv 2303.02151), section 3.4. α is exact, β lies on a grid that is refined around its best value
(`cafo.search_grid`), and all candidate ensembles are tried. The images are read once, in blocks (`cafo.reduced`).

Legend: M keys, B images, N classes, J values of β, A values of α.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.choice_names import Rule
from cafo.ensemble import NOTHING, ZERO_SHOT, Ensemble
from cafo.errors import CafoError, refuse_text
from cafo.held_out import HeldOut, HeldOutImages
from cafo.near_best import NearBest, choose_near_best
from cafo.parts import Part, measure_parts
from cafo.prior import expect_from
from cafo.reduced import ReducedImages, reduce_images
from cafo.search_grid import BetaGrid, Candidate, search_grid

# Candidates that are evaluated directly before the best of those evaluated is taken.
_MAX_CONFIRMATIONS = 16


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
    """images correct at these values; those whose label is ahead or behind by no more than rounding, by eq. 6-9 in
    float64"""
    total: int
    zero_shot_correct: int
    """images that p_ZS alone gets right"""
    landscapes: tuple[Landscape, ...]
    """one for each candidate ensemble, in their order"""
    parts: tuple[Part, ...] = ()
    """p_ZS and the sources: what each adds"""

    @property
    def accuracy(self) -> float:
        """The share of the images that are correct."""
        return self.correct / self.total

    def hurtful_parts(self) -> list[str]:
        """Return a sentence about each part without which more images are correct."""
        return [
            f"{part.name} hurts: {part.without} of {self.total} images are correct at the best values without it, "
            f"{part.with_it} with it"
            for part in self.parts
            if part.gain is not None and part.gain < 0
        ]


class _Confirmed(NamedTuple):
    """A candidate whose accuracy was counted directly."""

    alpha: float
    beta: float
    ensemble: int
    correct: int


@torch.no_grad()
def search(
    images: HeldOutImages,
    *,
    grid: BetaGrid | None = None,
    ensembles: Sequence[Ensemble] = (Ensemble(),),
    rule: Rule = "highest",
) -> SearchResult:
    """Find the best α ≥ 0, β and ensemble on the given images.

    With the rule `highest`, ties go to the smaller α, then the smaller β, then the earlier ensemble. The result is
    confirmed: its correct images are counted without an error (`ReducedImages.count_correct`). A candidate that is not
    confirmed gives way to the next. No α is chosen in a step so narrow that a classifier in float32 cannot be in it.

    Args:
        images: images that the keys were not trained on.
        grid: values of β; the default has the range and the 200 steps of the reference's Caltech101 search.
        ensembles: candidates; see `weight_grid`.
        rule: how one of them is chosen.

    Raises:
        CafoError: no images, labels outside the classes, or shapes that do not fit.
    """
    grid = grid or BetaGrid()
    return search_reduced(reduce_for_search(images, grid), grid=grid, ensembles=ensembles, rule=rule)


@torch.no_grad()
def reduce_for_search(images: HeldOutImages, grid: BetaGrid) -> ReducedImages:
    """Read the images once, for any number of searches in the range of a grid.

    Raises:
        CafoError: as for `search`.
    """
    _check_inputs(images)
    return reduce_images(images, grid.low, grid.high)


@torch.no_grad()
def search_reduced(images: ReducedImages, *, grid: BetaGrid, ensembles: Sequence[Ensemble], rule: Rule) -> SearchResult:
    """Search on images that were reduced for the range of the grid; otherwise as `search`."""
    total = len(images.rows)
    candidates = search_grid(images, grid, ensembles)
    landscapes = _landscapes(candidates, ensembles, total)
    by_ensemble = {number: max(landscape.correct) for number, landscape in enumerate(landscapes)}
    zero_shot_correct = int(images.zero_shot_correct[images.rows].sum())
    parts = measure_parts(images.images.sources, by_ensemble, ensembles, zero_shot_correct)
    candidates += _zero_shot_alone(candidates, ensembles, total - zero_shot_correct)
    best: NearBest | _Confirmed | None = None
    if rule == "near_best":
        keys_per_class = len(images.images.key_labels) / images.images.classes
        prior = expect_from(zero_shot_correct, images.zero_shot_deviation[images.rows], keys_per_class)
        floor = max((part.alone for part in parts if part.alone is not None), default=0)
        best = choose_near_best(candidates, images, ensembles, prior, floor)
    if best is None:
        best = _confirm(sorted(candidates), images, ensembles)
    return SearchResult(
        alpha=best.alpha,
        beta=best.beta,
        ensemble=ensembles[best.ensemble],
        correct=best.correct,
        total=total,
        zero_shot_correct=zero_shot_correct,
        landscapes=landscapes,
        parts=parts,
    )


@torch.no_grad()
def surface(images: HeldOutImages, ensemble: Ensemble, *, alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    """Return the number of correct images at every (β, α): (J, A) int64.

    Args:
        images: the images of a choice.
        ensemble: the rule that joins the sources.
        alphas: A values.
        betas: J values.
    """
    reduced = reduce_images(images, min(betas), max(betas))
    return reduced.count_correct_at(alphas, betas, ensemble).cpu()


def weight_grid(
    ensemble: Ensemble,
    sources: Sequence[str],
    temperatures: Sequence[float] = (1.0,),
    scales: Sequence[float] = (1.0,),
    *,
    drop_zero_shot: bool = False,
) -> list[Ensemble]:
    """Return candidates for the ensemble's weights: every temperature with every scale of every source.

    α multiplies all scales alike, so only their ratios matter: a candidate that is a multiple of another is left out.
    All candidates have the rule of `ensemble`.

    Args:
        ensemble: the rule, the baseline, and the sources.
        sources: names of the sources.
        temperatures: candidate temperatures.
        scales: candidate scales of every source; 0 leaves a source out, as if it had not been given.
        drop_zero_shot: add each candidate without p_ZS too, where that is the baseline. It is what α = ∞ would be, with
            equal weights, as eq. 8 compares with p_ZS.

    Raises:
        CafoError: no scale is positive.
    """
    refuse_text(sources, "sources")
    if not any(scale > 0 for scale in scales):
        raise CafoError(f"at least one scale must be positive, got {list(scales)}")
    may_leave_out = ensemble.baseline in (ZERO_SHOT, NOTHING)
    allowed = [scale for scale in scales if scale > 0 or may_leave_out]
    # without a source left out first, so that among equals the whole ensemble is the earlier one
    combinations = sorted(itertools.product(allowed, repeat=len(sources)), key=lambda c: c.count(0))
    baselines = [ensemble.baseline]
    if drop_zero_shot and ensemble.baseline == ZERO_SHOT and ensemble.rule == "adaptive":
        baselines.append(NOTHING)
    candidates: dict[object, Ensemble] = {}
    for baseline, temperature, combination in itertools.product(baselines, temperatures, combinations):
        if not any(combination):
            continue
        kept = {n: round(scale / max(combination), 9) for n, scale in zip(sources, combination, strict=True) if scale}
        one_weight = len(kept) == 1 and baseline in (ZERO_SHOT, NOTHING)  # a softmax over one source is 1
        candidate = Ensemble(
            rule=ensemble.rule,
            baseline=baseline,
            sources=tuple(kept) if len(kept) < len(sources) else ensemble.sources,
            temperature=temperatures[0] if one_weight or baseline == NOTHING else temperature,
            scales=kept,
        )
        candidates.setdefault((baseline, candidate.temperature, *kept.items()), candidate)
    return list(candidates.values())


def _check_inputs(images: HeldOutImages) -> None:
    total, classes, labels = images.total, images.classes, images.labels
    if not total or len(labels) != total:
        raise CafoError(f"the search needs one label per image and at least one image, got {len(labels)} and {total}")
    if classes < 2:
        raise CafoError("an ensemble over classes needs at least two classes")
    if not images.sources:
        raise CafoError("an ensemble needs at least one source")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise CafoError(f"labels run from {int(labels.min())} to {int(labels.max())} with {classes} classes")
    expected = (len(images.key_labels), total)
    given = images.affinities if isinstance(images, HeldOut) else {}
    if wrong := {name: tuple(a.shape) for name, a in given.items() if tuple(a.shape) != expected}:
        raise CafoError(f"{expected[0]} keys and {total} images need affinities of shape {expected}, got {wrong}")


def _zero_shot_alone(candidates: Sequence[Candidate], ensembles: Sequence[Ensemble], wrong: int) -> list[Candidate]:
    """Return α = 0 as a candidate: where p_ZS has ties, it may be better than any α beside it."""
    first = next((number for number, ensemble in enumerate(ensembles) if ensemble.baseline == ZERO_SHOT), None)
    return [] if first is None else [Candidate(wrong, 0.0, min(c.beta for c in candidates), first)]


def _confirm(candidates: Sequence[Candidate], images: ReducedImages, ensembles: Sequence[Ensemble]) -> _Confirmed:
    """Count the best candidates' correct images again, and return the best of them.

    It stops at the first candidate that claims no more than what is already confirmed.
    """
    total = len(images.rows)
    best: _Confirmed | None = None
    for candidate in candidates[:_MAX_CONFIRMATIONS]:
        if best is not None and total - candidate.wrong <= best.correct:
            break
        correct = images.count_correct(candidate.alpha, candidate.beta, ensembles[candidate.ensemble])
        if best is None or correct > best.correct:
            best = _Confirmed(candidate.alpha, candidate.beta, candidate.ensemble, correct)
    assert best is not None
    return best


def _landscapes(candidates: Sequence[Candidate], ensembles: Sequence[Ensemble], total: int) -> tuple[Landscape, ...]:
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
