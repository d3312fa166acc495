"""The nodes that class sums are interpolated from, and the sums there, against loops that state the equations."""

import itertools
import math

import pytest
import torch

from cafo.beta_nodes import beta_nodes, class_slots, class_sums, farthest_key, interpolation

INF = math.inf
LABELS = torch.tensor([2, 0, 2, 4, 0, 2, 4, 1])
"""Three keys of class 2, two of 0 and 4, one of 1, and none of 3 and 5."""


def lagrange(nodes, beta):
    """The weights Π_k (β - β_k) / (β_i - β_k) over all k but i."""
    return [math.prod((beta - b) / (a - b) for k, b in enumerate(nodes) if k != i) for i, a in enumerate(nodes)]


def worst_error(nodes, farthest):
    """The largest error of an interpolated φ midway between two nodes, of all distances up to the farthest."""
    errors = []
    for beta in ((a + b) / 2 for a, b in itertools.pairwise(nodes)):
        weights = lagrange(nodes, beta)
        for distance in (farthest * i / 40 for i in range(1, 41)):
            found = sum(w * math.exp((nodes[0] - b) * distance) for w, b in zip(weights, nodes, strict=True))
            errors.append(abs(found - math.exp((nodes[0] - beta) * distance)))
    return max(errors)


def expected_nodes(count, low, high):
    """Nodes whose gaps double from both ends on, up to a limit; more than 20 stand like Chebyshev's."""
    if count > 20:
        unit = [(1 - math.cos(math.pi * i / (count - 1))) / 2 for i in range(count)]
    else:
        widest = 4 if count < 14 else 8
        ends = [2**i for i in range(int(math.log2(widest)))]
        gaps = [*ends, *[widest] * (count - 1 - 2 * len(ends)), *reversed(ends)]
        unit = [sum(gaps[:i]) / sum(gaps) for i in range(count)]
    return [low + (high - low) * each for each in unit]


def test_slots_are_the_rows_of_each_classs_keys():
    assert class_slots(LABELS, 6).T.tolist() == [[1, 4, 8], [7, 8, 8], [0, 2, 5], [8, 8, 8], [3, 6, 8], [8, 8, 8]]
    assert class_slots(LABELS[:0], 6).shape == (0, 6)


@pytest.mark.parametrize(("low", "high"), [(0.1, 12.0), (0.001, 0.002)])
@pytest.mark.parametrize(
    "exponent", [0.01, 0.25, 0.6, 0.8, 1.2, 1.75, 2.0, 2.6, 3.25, 4.9, 7.75, 8.7, 8.8, 10.5, 14.75, 33.0]
)
def test_nodes_are_the_fewest_that_phi_is_exact_from(low, high, exponent):
    """Half the range, times the farthest distance, is rounded up to a quarter."""
    farthest, rounded = (2 * each / (high - low) for each in (exponent - 1e-9, math.ceil(4 * exponent) / 4))
    nodes = beta_nodes(low, high, farthest)
    count = len(nodes)
    assert nodes.dtype == torch.float64
    assert nodes.tolist() == pytest.approx(expected_nodes(count, low, high), rel=1e-12)
    assert worst_error(nodes.tolist(), rounded) <= 1e-8
    assert worst_error(expected_nodes(count - 1, low, high), rounded) > 1e-8


def test_there_are_six_nodes_at_least_and_one_for_one_beta():
    assert beta_nodes(2.0, 5.0, 0.0).tolist() == pytest.approx(expected_nodes(6, 2.0, 5.0))
    nodes = beta_nodes(3.0, 3.0, 1.7)
    assert nodes.tolist() == [3.0]
    assert interpolation(nodes, [3.0, 3.0]).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("nodes", [beta_nodes(0.1, 12.0, 0.7), beta_nodes(1.0, 9e3, 0.1)], ids=len)
def test_weights_are_lagranges(nodes):
    """The product of a few hundred differences neither grows nor vanishes, whatever the range."""
    low, high = float(nodes[0]), float(nodes[-1])
    betas = [low + (high - low) * i / 23 for i in range(24)]
    weights = interpolation(nodes, betas)
    assert weights.dtype == torch.float64
    for beta, found in zip(betas, weights.tolist(), strict=True):
        assert found == pytest.approx(lagrange(nodes.tolist(), beta), rel=1e-9, abs=1e-10)
    at_nodes = interpolation(nodes, [*nodes.tolist(), low * (1 + 1e-15)])
    assert torch.equal(at_nodes, torch.eye(len(nodes), dtype=torch.float64)[[*range(len(nodes)), 0]])
    near = interpolation(nodes, [float(nodes[2]) + 1e-7])[0]
    assert near.tolist() == pytest.approx(lagrange(nodes.tolist(), float(nodes[2]) + 1e-7), rel=1e-6)


def test_the_farthest_key_is_the_least_alike_beside_the_nearest():
    assert farthest_key(torch.tensor([[0.25, 0.5, 0.75], [0.0, -0.5, 0.25]])) == 0.75
    left_out = torch.tensor([[0.25, -INF, 0.75], [-INF, -INF, -INF], [0.5, 0.5, -INF]])
    assert farthest_key(left_out) == 0.5
    assert farthest_key(left_out[1:2]) == 0.0
    assert farthest_key(torch.empty(0, 3)) == farthest_key(torch.empty(3, 0)) == 0.0


@pytest.mark.parametrize("floats", [1, 40, 1 << 15])
@pytest.mark.parametrize(
    ("low", "high", "width"), [(0.1, 12.0, 0.2), (0.5, 90.0, 0.7), (1e-4, 3e-4, 0.5), (2.0, 2.0, 1.0)]
)
def test_sums_at_the_nodes_are_those_of_phi_less_one(low, high, width, floats, monkeypatch):
    """Each is right to a few roundings of itself, also where all φ are near 1."""
    monkeypatch.setattr("cafo.beta_nodes._CPU_FLOATS", floats)
    affinity = 1 - width * torch.rand(7, len(LABELS), generator=torch.Generator().manual_seed(3))
    affinity[1, 4] = affinity[3, 6] = -INF  # keys that are left out
    affinity[5] = -INF
    nodes = beta_nodes(low, high, farthest_key(affinity))
    for labels, classes in ((LABELS, 6), (LABELS[1:5].clamp_max(2), 3), (LABELS.argsort(), 8)):
        some = affinity[:, : len(labels)]
        slots = class_slots(labels, classes)
        expected = torch.zeros(len(some), len(nodes), classes, dtype=torch.float64)
        for (b, row), (n, beta), c in itertools.product(
            enumerate(some.tolist()), enumerate(nodes.tolist()), range(classes)
        ):
            own = [x for x, label in zip(row, labels.tolist(), strict=True) if label == c]
            phi_less_one = [math.expm1(-beta * (max(row) - x)) if x > -INF else -1 for x in own]
            expected[b, n, c] = math.fsum(phi_less_one) - (len(slots) - len(own))
        torch.testing.assert_close(class_sums(some, slots, nodes).double(), expected, rtol=1e-5, atol=1e-12)


def test_without_keys_sums_are_zero():
    nodes = beta_nodes(0.1, 12.0, 0.0)
    assert torch.equal(class_sums(torch.empty(2, 0), class_slots(LABELS[:0], 5), nodes), torch.zeros(2, 6, 5))
