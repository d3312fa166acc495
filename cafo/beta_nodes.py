"""Class sums of φ at every β of a range, from their values at a few.

φ(β) = exp(-β d), with d the distance of a key from the image's nearest one (eq. 6-7 up to a factor per image), is so
smooth in β that its interpolation from a dozen nodes is exact to float32's last digit, and so is that of any sum of φ.
The number of nodes follows from the largest d.

φ at β + Δ is φ at β times exp(-Δ d). So the nodes stand like Chebyshev's, closer towards both ends, but with gaps in
proportions of 1, 2, 4, 4, …, 4, 2 and 1: three exponentials lead from each node to the next. From 14 nodes on the gaps
double once more, to 8.

At small β all φ are near 1, and their differences would be lost in float32. So φ - 1 is computed and summed, and every
class sum is less by K, which neither the deviation from the mean nor an order of classes tells.

Legend: M keys, b images, N classes, K keys of the largest class, n nodes, J values of β.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_ERROR = 1e-8
"""of an interpolated φ, which is at most 1; float32 rounds φ to 6e-8"""
_FEWEST, _MOST_EVEN = 6, 20
"""nodes: the fewest, and the most whose gaps are as above"""
_CPU_FLOATS, _GPU_FLOATS = 1 << 15, 1 << 24
"""exponents that are worked on at once: with φ and its factors they stay in a core's cache"""


def class_slots(key_labels: Tensor, classes: int) -> Tensor:
    """Return the row numbers of each class's keys, (K, N); M, one past the last, where a class has fewer than K."""
    keys, device = len(key_labels), key_labels.device
    counts = torch.bincount(key_labels, minlength=classes)
    order = torch.argsort(key_labels, stable=True)
    rank = torch.arange(keys, device=device) - (counts.cumsum(0) - counts)[key_labels[order]]
    slots = torch.full((int(counts.max()), classes), keys, device=device)
    slots[rank, key_labels[order]] = order
    return slots


def beta_nodes(low: float, high: float, farthest: float) -> Tensor:
    """Return nodes that φ is interpolated from between two values of β: (n,) float64, rising from low to high.

    Args:
        low, high: the range.
        farthest: the largest d.
    """
    if low == high:
        return torch.tensor([low], dtype=torch.float64)
    exponent = 0.5 * (high - low) * farthest
    count = _nodes_needed(math.ceil(4 * exponent) / 4)
    return low + (high - low) * (1 + _unit_nodes(count)) / 2


def interpolation(nodes: Tensor, betas: Sequence[float]) -> Tensor:
    """Return the weights of the nodes at some values of β, by Lagrange's formula: (J, n) float64."""
    apart = (nodes[:, None] - nodes) * (4 / (nodes[-1] - nodes[0]))  # so that the product neither grows nor vanishes
    signs = 1 / apart.fill_diagonal_(1.0).prod(dim=1)
    distance = torch.tensor(betas, dtype=torch.float64)[:, None] - nodes
    at_node = distance.abs() < 1e-12 * nodes[-1]
    terms = signs / distance  # infinite at a node
    weights = terms / terms.sum(dim=1, keepdim=True)
    return torch.where(at_node.any(dim=1, keepdim=True), at_node.double(), weights)


def farthest_key(affinity: Tensor) -> float:
    """Return the largest difference between an image's affinities: (b, M). Keys that are left out do not count."""
    if not affinity.numel():
        return 0.0
    lowest = affinity.amin(dim=1)
    if not bool((lowest > -math.inf).all()):
        lowest = affinity.masked_fill(affinity == -math.inf, math.inf).amin(dim=1)
    return max(0.0, float((affinity.amax(dim=1) - lowest).max()))


def class_sums(affinity: Tensor, slots: Tensor, nodes: Tensor) -> Tensor:
    """Return eq. 6-7 at every node, less K: (b, n, N).

    Args:
        affinity: (b, M), one row per image; -inf leaves a key out.
        slots: (K, N), from `class_slots`.
        nodes: (n,), from `beta_nodes`.
    """
    images, (most, classes) = len(affinity), slots.shape
    sums = affinity.new_zeros(images, len(nodes), classes)
    if not slots.numel():
        return sums
    nearest = affinity.amax(dim=1)
    nearest = nearest.where(nearest > -math.inf, 0.0)
    if bool((slots == affinity.shape[1]).any()):  # φ = 0 in the empty slots of small classes
        affinity = torch.cat([affinity, affinity.new_full((images, 1), -math.inf)], dim=1)
    gaps = [round(gap, 9) for gap in nodes.diff().tolist()]
    floats = _CPU_FLOATS if affinity.device.type == "cpu" else _GPU_FLOATS
    for at in torch.arange(images).split(max(1, floats // slots.numel())):
        rows = slice(int(at[0]), int(at[-1]) + 1)
        distance = affinity[rows].index_select(1, slots.flatten()).view(-1, most, classes)
        distance -= nearest[rows, None, None]
        _sum_at_nodes(distance, float(nodes[0]), gaps, sums[rows])
    return sums


def _sum_at_nodes(exponent: Tensor, first: float, gaps: Sequence[float], sums: Tensor) -> None:
    """Write the sums of exp(β · exponent) - 1 at each node: (b, K, N) → (b, n, N)."""
    less = torch.expm1(first * exponent)  # φ - 1
    torch.sum(less, dim=1, out=sums[:, 0])
    steps = {gap: torch.expm1(gap * exponent) for gap in set(gaps)}
    factors = {gap: 1 + step for gap, step in steps.items()}
    for i, gap in enumerate(gaps, start=1):
        torch.addcmul(steps[gap], less, factors[gap], out=less)
        torch.sum(less, dim=1, out=sums[:, i])


def _unit_nodes(count: int) -> Tensor:
    """Return nodes from -1 to 1. Many cannot be even in the middle, and are Chebyshev's, whose gaps are symmetric."""
    if count > _MOST_EVEN:
        return -torch.cos(math.pi * torch.arange(count, dtype=torch.float64) / (count - 1))
    rising = [1, 2] if count < 14 else [1, 2, 4]
    widest = [2 * rising[-1]] * (count - 1 - 2 * len(rising))
    position = torch.tensor([0, *itertools.accumulate([*rising, *widest, *reversed(rising)])], dtype=torch.float64)
    return 2 * position / position[-1] - 1


@lru_cache(maxsize=256)
def _nodes_needed(exponent: float) -> int:
    """Return the nodes that interpolate exp(-x (1 + t)) on -1 <= t <= 1 to `_ERROR`, for every x up to `exponent`."""
    x = exponent * torch.linspace(0, 1, 41, dtype=torch.float64)[1:]
    count = _FEWEST
    while True:
        nodes = _unit_nodes(count)
        between = ((nodes[1:] + nodes[:-1]) / 2).tolist()
        tried = torch.tensor(between, dtype=torch.float64)[:, None]
        found = interpolation(nodes, between) @ torch.exp(-x * (1 + nodes[:, None]))
        if float((found - torch.exp(-x * (1 + tried))).abs().max()) <= _ERROR:
            return count
        count += 1
