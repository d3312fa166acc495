"""The values of β that a search tries, on images whose intervals are written by hand."""

import pytest
import torch

import cafo.search_grid
from cafo.ensemble import Ensemble
from cafo.errors import CafoError
from cafo.reduced import Intervals
from cafo.search_grid import BetaGrid, search_grid

IMAGES = 50


def count_at(beta, ensemble):
    """The images that are correct at a β: the most at 3.3, and one fewer for the second ensemble."""
    return max(0, IMAGES - ensemble - int(7 * abs(beta - 3.3)))


class Images:
    """Images of which the first few are correct at every α, in parts of two values of β and one ensemble."""

    rows = range(IMAGES)

    def intervals(self, betas, ensembles):
        for e in range(len(ensembles)):
            for j in range(0, len(betas), 2):
                part = betas[j : j + 2]
                right = torch.tensor([[row < count_at(beta, e) for row in range(IMAGES)] for beta in part])
                low, high = torch.where(right, 0.0, torch.inf), torch.full(right.shape, torch.inf)
                yield Intervals(range(e, e + 1), range(j, j + len(part)), low[None], high[None])


def expected_betas(grid):
    """All values in order: the coarse grid, then ever finer ones as far as the neighbours of the best so far."""
    betas = [grid.low + (grid.high - grid.low) * i / (grid.steps - 1) for i in range(grid.steps)]
    tried, spacing = list(betas), (grid.high - grid.low) / (grid.steps - 1)
    for _ in range(grid.refinements):
        best = min(tried, key=lambda beta: (-count_at(beta, 0), beta))
        low, high = max(grid.low, best - spacing), min(grid.high, best + spacing)
        finer = [low + (high - low) * i / (grid.refined_steps - 1) for i in range(grid.refined_steps)]
        tried += [beta for beta in finer if beta not in tried]
        spacing = 2 * spacing / (grid.refined_steps - 1)
    return tried


@pytest.mark.parametrize("ends", [1, 2 * IMAGES, 1 << 19])
@pytest.mark.parametrize(
    "grid",
    [
        BetaGrid(low=0.5, high=9.0, steps=7, refinements=3, refined_steps=5),
        BetaGrid(low=3.0, high=3.4, steps=2, refinements=2, refined_steps=4),
        BetaGrid(low=4.0, high=20.0, steps=5, refinements=2, refined_steps=2),
        BetaGrid(low=0.1, high=3.0, steps=6, refinements=0),
        BetaGrid(low=1.0, high=7.0, steps=7, refinements=1),
    ],
)
def test_finer_grids_reach_to_the_neighbours_of_the_best_value(monkeypatch, grid, ends):
    monkeypatch.setattr(cafo.search_grid, "_ENDS", ends)
    candidates = search_grid(Images(), grid, [Ensemble(), Ensemble(rule="average")])
    for number in (0, 1):
        own = [one for one in candidates if one.ensemble == number]
        assert [one.beta for one in own] == pytest.approx(expected_betas(grid), rel=1e-12)
        assert [one.wrong for one in own] == [IMAGES - count_at(one.beta, number) for one in own]
        assert {one.alpha for one in own} == {0.0}


def test_one_value_is_tried_once():
    for grid in (BetaGrid(low=3.0, high=3.0), BetaGrid(low=3.0, high=3.0, steps=1)):
        assert {one.beta for one in search_grid(Images(), grid, [Ensemble()])} == {3.0}
    assert BetaGrid(low=2.0, high=4.0, steps=1).values() == [2.0]
    assert len(search_grid(Images(), BetaGrid(low=3.0, high=3.0, steps=1), [Ensemble()])) == 1


@pytest.mark.parametrize(
    "wrong", [{"low": 0.0}, {"low": 12.1}, {"steps": 0}, {"refinements": -1}, {"refined_steps": 1}], ids=str
)
def test_a_grid_that_cannot_be_is_refused(wrong):
    BetaGrid(low=12.0, high=12.0, steps=1, refinements=0, refined_steps=2)
    BetaGrid(low=0.01)
    with pytest.raises(CafoError, match="a β grid needs 0 < low <= high, steps >= 1 and refined_steps >= 2, got low="):
        BetaGrid(**wrong)


def test_the_default_is_the_references_search_on_caltech101_refined_twice():
    assert BetaGrid() == BetaGrid(low=0.1, high=12.0, steps=200, refinements=2, refined_steps=9)
    assert (BetaGrid().values()[0], BetaGrid().values()[-1], len(BetaGrid().values())) == (0.1, 12.0, 200)


def test_a_choice_at_the_edge_of_its_range_names_the_setting_to_widen():
    grid = BetaGrid(low=0.1, high=12.0)
    assert grid.edge_notice(1.0, 5.0) == ""
    assert grid.edge_notice(1.0, 12.0).endswith("is 12, the largest value that was tried; to try others, change high")
    low = grid.edge_notice(1.0, 0.1, low_setting="search.beta_low")
    assert low.endswith("is 0.1, the smallest value that was tried; to try others, change search.beta_low")
    assert "α is 0" in grid.edge_notice(0.0, 0.1)
    assert BetaGrid(low=3.0, high=3.0).edge_notice(1.0, 3.0) == ""
