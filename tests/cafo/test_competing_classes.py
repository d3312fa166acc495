"""The classes that compete with a label, against the definition: sums of φ in float64, and loops over all classes."""

import itertools
import math

import pytest
import torch

from cafo.alpha_intervals import correct_intervals, label_margins
from cafo.beta_nodes import beta_nodes, class_slots
from cafo.competing_classes import _below_everywhere, _deepest_sag, reduce_block
from cafo.ensemble import NOTHING, Ensemble
from cafo.held_out import HeldOut
from tests.cafo.reference import z_loop

LOW, HIGH = 0.2, 11.0
ENSEMBLES = [
    Ensemble(temperature=3.0, scales={"dino": 0.4}),
    Ensemble(temperature=0.5),
    Ensemble(sources=("dino",)),
    Ensemble(baseline="dino", temperature=9.0),
    Ensemble(baseline=NOTHING),
    Ensemble(rule="average", scales={"clip": 3.0}),
    Ensemble(rule="maximum"),
]


def problem(seed, classes=7, images=11, most_keys=3, wide=0.3):
    """A class that is strong in one source likely is in both. One class is smaller, and some keys are left out."""
    rng = torch.Generator().manual_seed(seed)
    key_labels = torch.arange(classes).repeat_interleave(most_keys)
    key_labels = key_labels[torch.randperm(len(key_labels), generator=rng)][1:]
    strength = torch.randn(images, classes, generator=rng)
    affinities = {}
    for name, noise in (("clip", 0.5), ("dino", 0.9)):
        own = strength[:, key_labels] + noise * torch.randn(images, len(key_labels), generator=rng)
        affinities[name] = 1 - wide * torch.sigmoid(-own).T
    affinities["dino"][2, 1] = affinities["clip"][0, 3] = -math.inf
    zero_shot = strength + 0.4 * torch.randn(images, classes, generator=rng)
    return HeldOut(zero_shot, affinities, key_labels, torch.randint(classes, (images,), generator=rng))


def sums_of_phi(block, betas):
    """Eq. 6-7 at each β, relative to the nearest key: (b, S, J, N) float64."""
    values = torch.nn.functional.one_hot(block.key_labels, block.classes).double()
    distances = [a.double().amax(dim=0) - a.double() for a in block.affinities.values()]
    each = [torch.stack([torch.exp(-beta * d).T @ values for beta in betas], dim=1) for d in distances]
    return torch.stack(each, dim=1)


def reduce(block, low=LOW, high=HIGH):
    """The block's groups; its images are the search's 100th and the following."""
    rows = 100 + torch.arange(block.total)
    return reduce_block(block, rows, class_slots(block.key_labels, block.classes), low, high)


def kept_classes(block, group):
    """The class of every column that is no padding, for each image of a group."""
    sums = sums_of_phi(block, group.nodes.tolist())
    found = []
    for i, row in enumerate((group.rows - 100).tolist()):
        columns = (group.sums[i] + group.means[i, :, :, None])[..., ~group.padding[i]]
        apart = (sums[row, :, :, None] - columns[..., None]).abs().amax(dim=(0, 1))  # (R, N)
        apart += (block.zero_shot[row] - group.zero_shot[i, ~group.padding[i], None]).abs()
        assert float(apart.amin(dim=1).max()) < 1e-5
        found.append(apart.argmin(dim=1).tolist())
    return found


@pytest.mark.parametrize("floats", [1, 1 << 17])
@pytest.mark.parametrize("seed", range(3))
def test_a_group_has_what_eq_8_and_9_need_of_its_images(seed, floats, monkeypatch):
    monkeypatch.setattr("cafo.competing_classes._FLOATS", floats)
    monkeypatch.setattr("cafo.competing_classes._IMAGES_PER_GROUP", 3)
    monkeypatch.setattr("cafo.competing_classes._COLUMNS_PER_GROUP", 13)
    block = problem(seed)
    groups = reduce(block)
    assert sorted(torch.cat([group.rows for group in groups]).tolist()) == [100 + row for row in range(11)]
    widths = [len(classes) for group in groups for classes in kept_classes(block, group)]
    assert widths == sorted(widths)  # those of a group are much alike
    assert max(len(group.rows) for group in groups) == max(3, 13 // max(widths))
    for group in groups:
        sums = sums_of_phi(block, group.nodes.tolist())
        assert (group.classes, group.keys_per_class) == (7, 3)
        for i, classes in enumerate(kept_classes(block, group)):
            row, count = int(group.rows[i]) - 100, len(classes)
            label = int(block.labels[row])
            assert classes == sorted(set(classes))
            assert classes[group.labels[i]] == label
            assert group.padding[i].tolist() == [c >= count for c in range(group.padding.shape[1])]
            columns = [*classes, *[label] * (group.padding.shape[1] - count)]
            assert torch.equal(group.zero_shot[i], block.zero_shot[row, columns])
            z = torch.tensor(z_loop(block.zero_shot[row].tolist()))
            torch.testing.assert_close(group.standard_zero_shot[i], z[columns], rtol=1e-5, atol=1e-6)
            means = sums[row].mean(dim=-1)
            torch.testing.assert_close(group.means[i].double(), means, rtol=1e-5, atol=1e-6)
            centred = sums[row] - means[..., None]
            torch.testing.assert_close(group.sums[i].double(), centred[..., columns], rtol=1e-5, atol=2e-6)
            rank = torch.cat([z.double()[None], centred.flatten(0, 1)])
            torch.testing.assert_close(group.products[i].double(), rank @ rank.T, rtol=1e-4, atol=1e-5)


def sag(p, nodes, betas):
    """The deepest sag of each sum below its chord, beside each node: (b, S, n, N).

    Args:
        p: (b, S, J, N), at the nodes and at some β between.
    """
    per_gap = (len(betas) - 1) // (len(nodes) - 1)
    deepest = []
    for i in range(len(nodes) - 1):
        between = p[:, :, i * per_gap : (i + 1) * per_gap + 1]
        share = torch.arange(per_gap + 1, dtype=torch.float64)[:, None] / per_gap
        chord = between[:, :, :1] * (1 - share) + between[:, :, -1:] * share
        deepest.append((chord - between).amax(dim=2))
    return torch.stack([torch.maximum(a, b) for a, b in itertools.pairwise([deepest[0], *deepest, deepest[-1]])], dim=2)


@pytest.mark.parametrize(("low", "high"), [(LOW, HIGH), (0.1, 60.0), (3.0, 3.0)])
@pytest.mark.parametrize("seed", range(4))
def test_a_class_is_left_out_where_another_is_above_it_everywhere(seed, low, high):
    """Up to a little more than the deepest that the other's sums fall below their chords between two nodes."""
    block = problem(seed, classes=8, images=40)
    if seed == 3:  # equal p_ZS do not leave a class out
        block = block._replace(zero_shot=block.zero_shot.round())
    out = 0
    groups = reduce(block, low, high)
    nodes = groups[0].nodes.tolist()
    betas = [a + (b - a) * i / 16 for a, b in itertools.pairwise(nodes) for i in range(16)] + nodes[-1:]
    dense = sums_of_phi(block, betas)
    at_nodes = dense[:, :, ::16]
    limits = at_nodes * (1 - 1e-5) - (1.2 * sag(dense, nodes, betas) if low < high else 0)
    for group in groups:
        for row, classes in zip((group.rows - 100).tolist(), kept_classes(block, group), strict=True):
            for j in set(range(8)) - {int(block.labels[row])}:
                others = [k for k in range(8) if block.zero_shot[row, k] > block.zero_shot[row, j]]
                above = [bool((dense[row, ..., k] >= dense[row, ..., j]).all()) for k in others]
                surely = [bool((limits[row, ..., k] > at_nodes[row, ..., j]).all()) for k in others]
                assert j in classes if not any(above) else j not in classes or not any(surely)
                out += any(surely)
    assert out > 60


def test_of_many_classes_each_is_compared_with_the_label_and_the_eight_that_are_likely_above_most():
    """Likely is what has the least sum of exp(-1.7 z), over p_ZS and every source's sums at both ends of the range."""
    block = problem(1, classes=23, images=40)
    ends = standardised(sums_of_phi(block, [LOW, HIGH]))
    above = torch.exp(-1.7 * torch.cat([standardised(block.zero_shot.double())[:, None], ends.flatten(1, 2)], dim=1))
    betas = [LOW + (HIGH - LOW) * i / 200 for i in range(201)]
    dense = sums_of_phi(block, betas)
    for group in reduce(block):
        for row, classes in zip((group.rows - 100).tolist(), kept_classes(block, group), strict=True):
            likely = above[row].sum(dim=0).argsort()[:8].tolist()
            for j in set(range(23)) - {int(block.labels[row])}:
                others = {
                    k for k in {int(block.labels[row]), *likely} if block.zero_shot[row, k] > block.zero_shot[row, j]
                }
                margins = [float((dense[row, ..., k] - dense[row, ..., j]).amin()) for k in others]
                assert (j in classes) or max(margins) > 0
                assert (j not in classes) or max(margins, default=0.0) < 0.05


def standardised(p):
    return (p - p.mean(dim=-1, keepdim=True)) / p.std(dim=-1, keepdim=True)


@pytest.mark.parametrize(("low", "high", "farthest"), [(LOW, HIGH, 0.9), (0.2, 4.0, 3.0), (0.01, 0.02, 9.0)])
def test_limits_are_less_than_sums_by_the_deepest_sag_beside_each_node(low, high, farthest):
    """And by a few roundings. Sums are less K, and those of single keys sag deepest."""
    nodes = beta_nodes(low, high, farthest)
    distances = farthest * torch.rand(5, 2, 3, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances[..., 0], distances[..., 1] = farthest, distances[..., :1, :, 1]
    betas = [a + (b - a) * i / 16 for a, b in itertools.pairwise(nodes.tolist()) for i in range(16)] + [high]
    sums = torch.expm1(-torch.tensor(betas, dtype=torch.float64)[:, None] * distances).sum(dim=2)  # (b, S, J, D)
    values, sags = sums[:, :, ::16], sag(sums, nodes.tolist(), betas)
    less = values - _below_everywhere(values, nodes, farthest)
    assert (less >= sags + 3.9e-6 * values.abs()).all()
    assert (less <= 1.1 * sags + 4.1e-6 * values.abs() + 1e-9).all()


@pytest.mark.parametrize("exponent", [0.0, 1e-4, 0.3, 1.0, 2.5, 6.0])
def test_the_deepest_sag_of_an_exponential_is_a_little_more_than_that_at_the_middle(exponent):
    deepest = 1.0
    for x in (exponent * i / 20 for i in range(1, 21) if exponent > 0.01):
        sags = [1 - t * -math.expm1(-x) - math.exp(-x * t) for t in (i / 1000 for i in range(1001))]
        deepest = max(deepest, max(sags) / sags[500])
    assert deepest <= _deepest_sag(exponent) <= deepest + 2e-3


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_lead_is_over_the_classes_that_compete_and_its_rounding_that_of_every_part(ensemble):
    """Each z(p) is rounded by 1e-5 of K / std(p) + max |z(p)|, and its share by the share's slope in w."""
    block = problem(4)
    exact = HeldOut(block.zero_shot.double(), {n: a.double() for n, a in block.affinities.items()}, *block[2:])
    for alpha, beta in ((0.7, 0.2), (5.0, 3.3)):
        base, term, shares, names = exact.combine(beta, ensemble)
        p = dict(zip(("clip", "dino"), sums_of_phi(block, [beta])[:, :, 0].unbind(1), strict=True))
        z = {name: standardised(each) for name, each in {"zero_shot": exact.zero_shot, **p}.items()}
        for group in reduce(block):
            leads = torch.stack(group.leads(("clip", "dino"), alpha, beta, ensemble)).T.tolist()
            rows = (group.rows - 100).tolist()
            for (lead, rounding), row, classes in zip(leads, rows, kept_classes(block, group), strict=True):
                label, logits = int(block.labels[row]), (base + alpha * term)[row].tolist()
                others = [logits[j] for j in classes if j != label]
                assert lead == pytest.approx(logits[label] - max(others), abs=1e-4) if others else lead == math.inf
                size = {name: float(each[row, classes].abs().max()) for name, each in z.items()}
                error = {name: 3 / float(p[name][row].std()) + size[name] for name in p} | {
                    "zero_shot": size["zero_shot"]
                }
                expected = error[ensemble.baseline] if ensemble.baseline in p else 0.0
                for share, name in zip(shares[row].tolist(), names, strict=True):
                    own = share if ensemble.rule == "adaptive" else 1.0
                    of_share = size[name] * (1 - own) * 7 / ensemble.temperature
                    expected += alpha * ensemble.scales.get(name, 1.0) * own * (error[name] + of_share)
                assert rounding == pytest.approx(1e-5 * expected, rel=1e-3)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_intervals_are_those_of_all_classes_in_float64(ensemble):
    block, betas = problem(6, classes=13, images=29), [LOW, 0.7, 3.3, 10.0, HIGH]
    exact = HeldOut(block.zero_shot.double(), {n: a.double() for n, a in block.affinities.items()}, *block[2:])
    expected = []
    for beta in betas:
        base, term, _, _ = exact.combine(beta, ensemble)
        expected.append(torch.stack(correct_intervals(label_margins(base, exact.labels), term, exact.labels)))
    low, high = torch.stack(expected, dim=1)  # (J, B)
    found = torch.full((2, 2, len(betas), 29), math.nan)
    for group in reduce(block):
        found[..., group.rows - 100] = group.intervals(("clip", "dino"), betas, [Ensemble(baseline=NOTHING), ensemble])
    never = (low >= high) | (high < 1e-30)  # a tie that is won at α = 0 alone
    got_never = found[0, 1] >= found[1, 1]
    assert torch.equal(never, got_never)
    assert 0 < int(never.sum()) < never.numel()
    torch.testing.assert_close(found[0, 1][~never].double(), low[~never], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(found[1, 1][~never].double(), high[~never], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("images", [1, 11])
def test_a_label_that_is_above_all_classes_wins_at_every_alpha(images):
    block = problem(0).images(torch.arange(images))
    best = block.zero_shot.argmax(dim=1)
    alike = torch.where(torch.arange(7)[:, None] == best, 0.9, 0.2)
    (group,) = reduce(HeldOut(block.zero_shot, {"clip": alike}, torch.arange(7), best))
    assert group.padding.tolist() == [[False, True]] * block.total
    low, high = group.intervals(("clip",), [LOW, 3.0, HIGH], [Ensemble()])
    assert torch.equal(low, torch.zeros(1, 3, block.total))
    assert torch.equal(high, torch.full((1, 3, block.total), math.inf))
