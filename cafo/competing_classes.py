"""The classes that can beat an image's label: all that is left of a search once the affinities have been read.

CaFo (arXiv 2303.02151), section 3.4: whatever the ensemble, an image's logits rise with p_ZS and with the class sums of
every source. So a class j never decides whether the label wins, at no α, β or ensemble, if some other class k (or the
label itself) is above it in p_ZS and, at every β of the range, in the sums of every source: where j beats the label, k
does. The classes that remain, a few in a hundred, compete with the label.

The sums are compared at all β by comparing them at the nodes they are interpolated from (`cafo.beta_nodes`). They are
convex in β, so that between two nodes a sum of j is below its chord. A sum of k sags below its own chord, by about as
much as at the middle between the nodes, which is taken off k's values at both.

An image is thus reduced to p_ZS and the sums of its competing classes, and to products of all classes' sums, from which
the means and the deviations of eq. 8 follow at every β. The search, its refinements and the estimate read no affinity
again.

Legend: b images of a block, R their competing classes and label, S sources, n nodes, J values of β, N classes, D
dominators, E ensembles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cafo.alpha_intervals import alone_intervals, correct_intervals, label_margins
from cafo.beta_nodes import beta_nodes, class_sums, farthest_key, interpolation
from cafo.ensemble import NOTHING, ZERO_SHOT, Combination, Ensemble, combine, inverse_deviation, standardise
from cafo.held_out import HeldOut

_FLOATS = 1 << 17
"""sums that are compared at once: they stay in a core's cache"""
_DOMINATORS = 8
"""classes that each class is compared with, besides the label"""
_TAIL = 1.7
"""a normal distribution's tail falls about as exp(-1.7 z) around its middle"""
_SLACK = 4e-6
"""Relative error of sums in float32, a few times over; a class that is below another by less is kept."""
_ROUNDING = 1e-5
"""relative error of what is computed in float32, ten times over"""
_IMAGES_PER_GROUP, _COLUMNS_PER_GROUP = 32, 1 << 12
"""Images that are kept together, each with as many columns as the most of them have; their numbers are much alike.
More images are if they have few columns, so that a group is worth its calls."""


class ReducedGroup(NamedTuple):
    """Some images and the classes that compete, in the order of the classes. Columns past the last are padding."""

    rows: Tensor
    """(b,) int64: which of the search's images these are"""
    zero_shot: Tensor
    """(b, R): p_ZS"""
    standard_zero_shot: Tensor
    """(b, R): z(p_ZS)"""
    sums: Tensor
    """(b, S, n, R): class sums at each node, less their mean over all classes"""
    labels: Tensor
    """(b,) int64: the column of the label"""
    padding: Tensor
    """(b, R) bool"""
    means: Tensor
    """(b, S, n): mean of the class sums over all classes"""
    products: Tensor
    """(b, 1 + S n, 1 + S n): products over all classes of z(p_ZS) and the centred sums with one another"""
    nodes: Tensor
    """(n,) float64"""
    classes: int
    """N"""
    keys_per_class: int
    """K"""

    def intervals(self, sources: Sequence[str], betas: Sequence[float], ensembles: Sequence[Ensemble]) -> Tensor:
        """Return the open interval of α on which each image is correct: low and high, (2, E, J, b)."""
        predictions = self._predictions(sources, betas)
        zero_shot = predictions.zero_shot
        margins, ties = self._margins(zero_shot), self._margins(torch.zeros_like(zero_shot))
        found = self.sums.new_empty(2, len(ensembles), len(betas), len(self.rows))
        for e, ensemble in enumerate(ensembles):
            base, term, _, _ = predictions.combine(ensemble)
            rows = term.movedim(1, 0)  # (J, b, R)
            if ensemble.baseline == NOTHING:
                found[0, e], found[1, e] = alone_intervals(ties, rows, self.labels)
                continue
            known = margins if base is zero_shot else self._margins(base)
            found[0, e], found[1, e] = correct_intervals(known, rows, self.labels)
        return found

    def leads(self, sources: Sequence[str], alpha: float, beta: float, ensemble: Ensemble) -> tuple[Tensor, Tensor]:
        """Return how far each image's label is ahead of the best other class at some values, and what of it may be
        rounding: (b,) each. A label that is behind has a negative lead.
        """
        predictions = self._predictions(sources, [beta])
        base, term, shares, names = predictions.combine(ensemble)
        margins = self._margins(base)[0].scatter(1, self.labels[:, None], torch.inf)
        rows = term[:, 0]
        lead = (margins + alpha * (rows.gather(1, self.labels[:, None]) - rows)).amin(dim=1)
        errors = {name: predictions.rounding(name) for name in (ZERO_SHOT, *sources)}
        of_term = torch.zeros_like(lead)
        for share, name in zip(shares[:, 0].T, names, strict=True):
            scale, size = ensemble.scales.get(name, 1.0), predictions.z[name].abs().amax(dim=(1, 2))
            # w is a sum over N classes, and own · (1 - own) / τ the slope of a share in w
            own = share if ensemble.rule == "adaptive" else torch.ones_like(share)
            of_term += scale * own * (errors[name] + size * (1 - own) * _ROUNDING * self.classes / ensemble.temperature)
        of_base = errors[ensemble.baseline] if ensemble.baseline in sources else torch.zeros_like(lead)
        return lead, of_base + alpha * of_term

    def _predictions(self, sources: Sequence[str], betas: Sequence[float]) -> _Predictions:
        """Return z(p) of every source at some values of β, of the classes that compete."""
        weights = interpolation(self.nodes, betas).to(self.sums)  # (J, n)
        z, coefficients = {ZERO_SHOT: self.standard_zero_shot[:, None]}, {}
        inverses = {ZERO_SHOT: torch.zeros_like(self.standard_zero_shot[:, :1])}
        nodes = len(self.nodes)
        for s, name in enumerate(sources):
            own = slice(1 + s * nodes, 1 + (s + 1) * nodes)
            squares = ((weights @ self.products[:, own, own]) * weights).sum(dim=-1)  # (b, J)
            inverses[name] = inverse_deviation(squares.clamp_min(0).sqrt(), self.means[:, s] @ weights.T, self.classes)
            coefficients[name] = inverses[name][:, :, None] * weights  # (b, J, n)
            z[name] = coefficients[name] @ self.sums[:, s]  # (b, J, R)
        return _Predictions(
            zero_shot=self.zero_shot[:, None],
            z=z,
            inverses=inverses,
            agreements=_Agreements(self.products, coefficients),
            keys_per_class=self.keys_per_class,
        )

    def _margins(self, base: Tensor) -> Tensor:
        """Return base_y - base_j, and infinity for padding: (b, J, R) → (J, b, R)."""
        margins = label_margins(base.movedim(1, 0), self.labels)
        return margins.masked_fill(self.padding, torch.inf)


class _Predictions(NamedTuple):
    """The predictions of a group's images, which ensembles combine, at some values of β."""

    zero_shot: Tensor
    """(b, 1, R): p_ZS"""
    z: Mapping[str, Tensor]
    """source, and `ZERO_SHOT` → (b, J, R): z(p)"""
    inverses: Mapping[str, Tensor]
    """source → (b, J): 1 / std(p)"""
    agreements: _Agreements
    keys_per_class: int

    def combine(self, ensemble: Ensemble) -> Combination:
        """Return eq. 8-9: each part (b, J, R)."""
        sources = {name: z for name, z in self.z.items() if name != ZERO_SHOT}
        return combine(self.zero_shot, sources, ensemble, self.z, self.agreements)

    def rounding(self, name: str) -> Tensor:
        """Return what of a difference of z(p) may be rounding at the first β: (b,).

        A class sum is one of K numbers up to 1, which z(p) divides by their deviation over the classes.
        """
        size = self.z[name][:, 0].abs().amax(dim=1)
        return _ROUNDING * (self.keys_per_class * self.inverses[name][:, 0] + size)


class _Agreements:
    """The agreement w of eq. 8 of two predictions, over all classes."""

    def __init__(self, products: Tensor, coefficients: Mapping[str, Tensor]) -> None:
        self.products, self.coefficients = products, coefficients
        self._known: dict[tuple[str, str], Tensor] = {}

    def __call__(self, one: str, other: str) -> Tensor:
        """Return Σ_n z(p_one)_n z(p_other)_n: (b, J)."""
        if (one, other) not in self._known:
            at, rows = self._of(one)
            at_other, rows_other = self._of(other)
            self._known[one, other] = ((rows @ self.products[:, at, at_other]) * rows_other).sum(dim=-1)
        return self._known[one, other]

    def _of(self, name: str) -> tuple[slice, Tensor]:
        if name == ZERO_SHOT:
            return slice(0, 1), self.products.new_ones(1, 1, 1)
        nodes = next(iter(self.coefficients.values())).shape[2]
        first = 1 + list(self.coefficients).index(name) * nodes
        return slice(first, first + nodes), self.coefficients[name]


def reduce_block(block: HeldOut, rows: Tensor, slots: Tensor, low: float, high: float) -> list[ReducedGroup]:
    """Return a block of images, reduced to the classes that compete.

    Args:
        block: the images.
        rows: (b,) which of the search's images they are.
        slots: (K, N), from `class_slots`.
        low, high: the range of β.
    """
    affinities = [a.T for a in block.affinities.values()]  # (b, M)
    farthest = max(farthest_key(a) for a in affinities)
    nodes = beta_nodes(low, high, farthest)
    images, classes = block.zero_shot.shape
    sums = block.zero_shot.new_empty(images, len(affinities), len(nodes), classes)
    for s, a in enumerate(affinities):
        sums[:, s] = class_sums(a.contiguous(), slots, nodes)
    z = standardise(block.zero_shot)
    means = sums.mean(dim=-1)  # of the class sums less K
    kept = torch.cat(
        [
            _undominated(sums[at], block.zero_shot[at], z[at], block.labels[at], nodes, farthest)
            for at in torch.arange(images, device=rows.device).split(max(1, _FLOATS // sums[0].numel()))
        ]
    )
    sums -= means[..., None]
    rank = torch.cat([z[:, None], sums.flatten(1, 2)], dim=1)  # (b, 1 + S n, N)
    products = rank @ rank.transpose(1, 2)
    groups = []
    counts = kept.sum(dim=1)
    for at in counts.argsort().split(max(_IMAGES_PER_GROUP, _COLUMNS_PER_GROUP // int(counts.max()))):
        columns, labels, padding = _columns(kept[at], block.labels[at])
        groups.append(
            ReducedGroup(
                rows=rows[at],
                zero_shot=block.zero_shot[at].gather(1, columns),
                standard_zero_shot=z[at].gather(1, columns),
                sums=sums[at].gather(3, columns[:, None, None].expand(-1, *sums.shape[1:3], -1)),
                labels=labels,
                padding=padding,
                means=means[at] + len(slots),
                products=products[at],
                nodes=nodes,
                classes=classes,
                keys_per_class=len(slots),
            )
        )
    return groups


def _columns(kept: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept classes (b, R), the position of the label among them (b,), and what is padding (b, R)."""
    counts = kept.sum(dim=1)
    image, of_class = kept.nonzero(as_tuple=True)
    position = torch.arange(len(image), device=kept.device) - (counts.cumsum(0) - counts)[image]
    columns = labels[:, None].repeat(1, max(2, int(counts.max())))  # `combine` refuses one class
    columns[image, position] = of_class
    padding = torch.arange(columns.shape[1], device=kept.device) >= counts[:, None]
    return columns, (kept & (torch.arange(kept.shape[1], device=kept.device) < labels[:, None])).sum(dim=1), padding


def _undominated(sums: Tensor, zero_shot: Tensor, z: Tensor, labels: Tensor, nodes: Tensor, farthest: float) -> Tensor:
    """Return which classes no dominator is above everywhere: (b, N) bool; the label is kept.

    Args:
        sums: (b, S, n, N), not centred.
        zero_shot, z: p_ZS and z(p_ZS), (b, N).
        labels: (b,).
        nodes: (n,).
        farthest: the largest distance of a key from the nearest one.
    """
    images, classes = zero_shot.shape
    flat = sums.flatten(1, 2)  # (b, S n, N)
    dominators = _dominators(sums, z, labels)  # (b, D)
    values = flat.gather(2, dominators[:, None].expand(-1, flat.shape[1], -1)).view(*sums.shape[:3], -1)
    limits = _below_everywhere(values, nodes, farthest).flatten(1, 2)  # (b, S n, D)
    top = zero_shot.gather(1, dominators)
    kept = torch.ones(images, classes, dtype=torch.bool, device=sums.device)
    for d in range(dominators.shape[1]):
        above = (flat - limits[:, :, d, None]).amax(dim=1) > 0
        kept &= above | (zero_shot >= top[:, d, None])
    return kept.scatter(1, labels[:, None], True)


def _below_everywhere(values: Tensor, nodes: Tensor, farthest: float) -> Tensor:
    """Return what another class's sums must be below at every node, to be below these at every β between: (…, n, D)."""
    limits = values.clone()
    if len(nodes) > 1:
        middles = interpolation(nodes, ((nodes[1:] + nodes[:-1]) / 2).tolist()).to(values) @ values
        sag = ((values[..., 1:, :] + values[..., :-1, :]) / 2 - middles).clamp_min(0)
        sag *= _deepest_sag(float(nodes.diff().max()) * farthest)
        limits[..., 1:, :] -= sag
        limits[..., :-1, :] = torch.minimum(limits[..., :-1, :], values[..., :-1, :] - sag)
    return limits - _SLACK * values.abs()


def _deepest_sag(exponent: float) -> float:
    """Return how much deeper exp(-x t), x <= exponent, can sag below its chord than at the middle of 0 <= t <= 1.

    It is the same for a sum of such functions. The deepest point is where the slopes are equal.
    """
    x = max(exponent, 1e-3)
    drop = -math.expm1(-x)
    t = -math.log(drop / x) / x
    return 1e-3 + (1 - drop * t - math.exp(-x * t)) / (1 - drop / 2 - math.exp(-x / 2))


def _dominators(sums: Tensor, z: Tensor, labels: Tensor) -> Tensor:
    """Return the label, and the classes that are likely above most others: (b, D).

    A class is above most others if it is far above the mean in p_ZS and, at the smallest and the largest β, in the sums
    of every source. The number of classes above it in each falls about as a normal distribution's tail.
    """
    parts = [z, *(standardise(sums[:, s, node]) for s in range(sums.shape[1]) for node in (0, -1))]
    above = torch.stack(parts).mul_(-_TAIL).exp_().sum(dim=0)
    likely = above.topk(min(_DOMINATORS, above.shape[1]), dim=1, largest=False).indices
    return torch.cat([labels[:, None], likely], dim=1)
