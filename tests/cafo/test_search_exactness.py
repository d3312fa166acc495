"""Counts of correct images are those of float64, and no step of α that a float32 classifier can be in is missed."""

import math

import pytest
import torch

from cafo.beta_nodes import beta_nodes
from cafo.ensemble import NOTHING, Ensemble
from cafo.held_out import HeldOut
from cafo.reduced import reduce_images
from cafo.search import search
from cafo.search_grid import BetaGrid
from tests.cafo.test_search import setup

ENSEMBLES = [
    Ensemble(),
    Ensemble(temperature=30.0, scales={"clip": 0.4}),
    Ensemble(sources=("dino",)),
    Ensemble(baseline=NOTHING),
    Ensemble(baseline="clip"),
    Ensemble(rule="average"),
    Ensemble(rule="maximum"),
]
GRID = BetaGrid(low=0.1, high=40.0, steps=5, refinements=1, refined_steps=4)
WIDE = 1e-3
"""relative width of a step of α whose ends float32 tells apart, whatever the problem"""


def problem(seed):
    """Random sizes, from two classes and one key to many; the last ones with near-ties on purpose."""
    rng = torch.Generator().manual_seed(seed)
    classes, images, keys = (int(torch.randint(2, top, (1,), generator=rng)) for top in (60, 90, 9))
    zero_shot, affinities, labels, own = setup(
        seed, classes=classes, images=images, keys_per_class=keys, noise=0.5 + 0.2 * (seed % 5)
    )
    if seed % 3 == 2:  # affinities that many keys share, and coarse p_ZS
        affinities = {name: (20 * a).round() / 20 for name, a in affinities.items()}
        zero_shot = (4 * zero_shot).round() / 4 + 1e-4 * torch.rand(zero_shot.shape, generator=rng)
    return HeldOut(zero_shot, affinities, labels, own)


def in_float64(images):
    return images._replace(
        zero_shot=images.zero_shot.double(), affinities={n: a.double() for n, a in images.affinities.items()}
    )


def best_of_wide_steps(base, term, labels):
    """The most images that are correct between two neighbouring crossings of α that are far enough apart."""
    own = labels[:, None]
    lead, slope = (logits.gather(1, own) - logits for logits in (base, term))
    crossings = (-lead / slope)[slope != 0]
    alphas = torch.cat([torch.zeros(1, dtype=torch.float64), crossings[crossings > 0].sort().values])
    ends = torch.cat([alphas[1:], torch.tensor([math.inf], dtype=torch.float64)])
    wide = ends - alphas > WIDE * (1 + alphas)
    middles = torch.where(ends.isfinite(), (alphas + ends) / 2, 2 * alphas + 1)[wide]
    return max(int(((base + alpha * term).argmax(1) == labels).sum()) for alpha in middles.tolist())


@pytest.mark.parametrize("seed", range(8))
def test_the_result_is_that_of_float64(seed):
    images = problem(seed)
    exact = in_float64(images)
    for ensemble in ENSEMBLES:
        result = search(images, grid=GRID, ensembles=[ensemble])
        logits = exact.combine(result.beta, ensemble).logits(result.alpha)
        assert result.correct == int((logits.argmax(1) == images.labels).sum())
        for beta in GRID.values():
            base, term, _, _ = exact.combine(beta, ensemble)
            assert result.correct >= best_of_wide_steps(base, term, images.labels)


@pytest.mark.parametrize("seed", range(6))
def test_a_lead_is_right_up_to_what_it_says_of_rounding(seed):
    """And few images are so near. A label that wins may be ahead of the classes that compete by more than of others."""
    images = problem(seed)
    exact, reduced = in_float64(images), reduce_images(images, 0.1, 40.0)
    near = total = 0
    for ensemble in ENSEMBLES:
        for alpha, beta in ((0.3, 0.1), (2.0, 3.3), (50.0, 40.0)):
            logits = exact.combine(beta, ensemble).logits(alpha)
            own = logits.gather(1, images.labels[:, None])[:, 0]
            expected = own - logits.scatter(1, images.labels[:, None], -math.inf).amax(1)
            for group in reduced.groups:
                lead, rounding = (value.double() for value in group.leads(images.sources, alpha, beta, ensemble))
                error, loses = lead - expected[group.rows], expected[group.rows] < 0
                assert (error.abs() <= rounding)[loses].all()
                assert (error >= -rounding).all()
                near += int((lead.abs() <= rounding).sum())
                total += len(group.rows)
    assert near < 0.02 * total


def test_a_class_that_is_ahead_between_two_nodes_alone_is_kept():
    """Class 2 is below class 1 at all nodes, and above it and the label between two, where their sums almost touch."""
    farthest = 1.0
    nodes = beta_nodes(0.1, 12.0, farthest)
    beta = float(nodes[5] + nodes[6]) / 2
    x = 1.230097284546  # (x, x, 3 - 2 x) and (1.5, 0.75, 0.75) have equal sums, and equal slopes of them
    sums = {0: [(x, x, 3 - 2 * x), 3.5e-6], 1: [(1.5, 0.75, 0.75), 7e-6], 2: [(x, x, 3 - 2 * x), 0.0]}
    distances = [[0.12 - math.log(u) / beta + shift for u in of_class] for of_class, shift in sums.values()]
    distances.append([0.0, farthest, farthest])  # a class with the nearest key, and of no other importance
    affinity = 1 - torch.tensor(distances).flatten()[:, None]
    zero_shot = torch.tensor([[5.0, 4.00001, 4.0, 0.0]])
    images = HeldOut(zero_shot, {"clip": affinity}, torch.arange(4).repeat_interleave(3), torch.tensor([0]))
    exact = in_float64(images)
    for at in (*nodes.tolist(), beta):
        _, term, _, _ = exact.combine(at, Ensemble())
        assert (term[0, 2] > max(term[0, 0], term[0, 1])) == (at == beta)
    (part,) = reduce_images(images, 0.1, 12.0).intervals([beta], [Ensemble()])
    base, term, _, _ = exact.combine(beta, Ensemble())
    expected = (base[0, 0] - base[0, 2]) / (term[0, 2] - term[0, 0])
    assert float(part.high) == pytest.approx(float(expected), rel=0.05)
