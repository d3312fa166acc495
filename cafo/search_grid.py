"""The exact best α at every β of a grid, for every candidate ensemble.

CaFo (arXiv 2303.02151), section 3.4. α is exact (`cafo.alpha_intervals`), and β lies on a grid that is refined around
its best value. The images are read before, once (`cafo.reduced`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cafo.alpha_intervals import accuracy_steps, best_alpha
from cafo.ensemble import Ensemble
from cafo.errors import CafoError
from cafo.reduced import ReducedImages

_ENDS = 1 << 19
"""intervals whose ends are sorted at once"""


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


def search_grid(images: ReducedImages, grid: BetaGrid, ensembles: Sequence[Ensemble]) -> list[Candidate]:
    """Return the best α of every β of the coarse grid, then of ever finer grids around the best β.

    Args:
        images: images that were reduced for the grid's range.
        grid: the values of β.
        ensembles: the candidates.
    """
    candidates: list[Candidate] = []
    betas, spacing = grid.values(), (grid.high - grid.low) / max(grid.steps - 1, 1)
    for _ in range(grid.refinements + 1):
        known = {candidate.beta for candidate in candidates}
        candidates += _candidates(images, [beta for beta in betas if beta not in known], ensembles)
        if spacing == 0:
            break
        centre = min(candidates).beta
        betas = _even_grid(max(grid.low, centre - spacing), min(grid.high, centre + spacing), grid.refined_steps)
        spacing = 2 * spacing / (grid.refined_steps - 1)
    return candidates


def _even_grid(low: float, high: float, steps: int) -> list[float]:
    return [low + (high - low) * i / max(steps - 1, 1) for i in range(steps)]


def _candidates(images: ReducedImages, betas: Sequence[float], ensembles: Sequence[Ensemble]) -> list[Candidate]:
    """Return the best α at each β, for each ensemble."""
    candidates, total = [], len(images.rows)
    some = max(1, _ENDS // total)
    for part in images.intervals(betas, ensembles):
        for e, low, high in zip(part.ensembles, part.low, part.high, strict=True):
            for j in range(0, len(low), some):
                correct, alphas = best_alpha(*accuracy_steps(low[j : j + some], high[j : j + some]))
                candidates += [
                    Candidate(total - count, alpha, beta, e)
                    for beta, count, alpha in zip(
                        betas[part.betas[j] :][: len(correct)], correct.tolist(), alphas.tolist(), strict=True
                    )
                ]
    return candidates
