"""What is left of images that were read once is all that any choice of α, β and ensemble needs of them."""

import math

import pytest
import torch

import cafo.held_out
from cafo.alpha_intervals import correct_intervals, label_margins
from cafo.beta_nodes import beta_nodes, class_slots, class_sums, farthest_key, interpolation
from cafo.cache import Cache
from cafo.ensemble import NOTHING, ZERO_SHOT, Ensemble, table5
from cafo.errors import CafoError
from cafo.held_out import HeldOut, on_validation
from cafo.reduced import reduce_images
from cafo.search import search
from cafo.search_grid import BetaGrid
from tests.cafo import reference
from tests.cafo.test_search import GRID, setup

ENSEMBLES = [*table5(("clip", "dino")).values(), Ensemble(temperature=7.0, scales={"clip": 0.3})]


@pytest.mark.parametrize(("high", "width"), [(12.0, 0.2), (12.0, 1.9), (90.0, 0.7), (0.1, 0.5)])
def test_sums_at_any_beta_follow_from_those_at_the_nodes(high, width):
    rng = torch.Generator().manual_seed(0)
    affinity, labels = width * torch.rand(5, 37, generator=rng), torch.randint(7, (37,), generator=rng)
    affinity[1, 4] = affinity[3, 30] = -torch.inf  # keys that are left out
    nodes = beta_nodes(0.1, high, farthest_key(affinity))
    slots = class_slots(labels, 7)
    sums = class_sums(affinity, slots, nodes).double()  # (b, n, N)
    betas = [0.1 + (high - 0.1) * i / 28 for i in range(29)]
    got = torch.einsum("jn,bnc->bjc", interpolation(nodes, betas), sums) + len(slots)
    for image, row in enumerate(affinity.tolist()):
        nearest = max(row)
        for j, beta in enumerate(betas):
            expected = [0.0] * 7
            for x, label in zip(row, labels.tolist(), strict=True):
                expected[label] += math.exp(-beta * (nearest - x))
            assert got[image, j].tolist() == pytest.approx(expected, abs=3e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_intervals_are_those_of_all_classes(seed):
    """Only some of an image's classes are kept, and no other would have mattered at any β for any ensemble."""
    data = setup(seed, ragged=seed == 1, classes=61, images=47, noise=1.1)
    images = HeldOut(*data)
    reduced = reduce_images(images, 0.1, 12.0)
    assert sum(group.zero_shot.numel() for group in reduced.groups) < 0.7 * data[0].numel()
    betas = [0.1, 0.33, 1.7, 4.0, 7.77, 11.9, 12.0]
    exact = HeldOut(data[0].double(), {n: a.double() for n, a in data[1].items()}, *data[2:])
    for part in reduced.intervals(betas, ENSEMBLES):
        for e, ensemble in zip(part.ensembles, [ENSEMBLES[e] for e in part.ensembles], strict=True):
            for j in part.betas:
                base, term, _, _ = exact.combine(betas[j], ensemble)
                low, high = correct_intervals(label_margins(base, exact.labels), term, exact.labels)
                got_low, got_high = part.low[e, j], part.high[e, j]
                never = low >= high * (1 - 1e-3)
                never |= high < 1e-30  # a tie that is won at α = 0 alone
                got_never = (got_low >= got_high * (1 - 1e-3)) | (got_high < 1e-30)
                assert torch.equal(never, got_never)
                torch.testing.assert_close(got_low[~never].double(), low[~never], rtol=2e-3, atol=1e-5)
                torch.testing.assert_close(got_high[~never].double(), high[~never], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("at_once", "betas_at_once"), [(1, 64), (53, 64), (53 * 2, 64), (53 * 9, 2), (1 << 23, 3)])
def test_intervals_come_in_parts_of_a_bounded_size(at_once, betas_at_once, monkeypatch):
    """All ensembles together, if they fit at one β, and then as many values of β as fit and are allowed."""
    reduced, betas, ensembles = reduce_images(HeldOut(*setup(0)), 0.1, 12.0), [0.1, 0.3, 1.7, 4.0, 12.0], ENSEMBLES[:3]
    ((_, _, low, high),) = reduced.intervals(betas, ensembles)
    monkeypatch.setattr("cafo.reduced._INTERVALS", at_once)
    monkeypatch.setattr("cafo.reduced._BETAS", betas_at_once)
    some = min(3, max(1, at_once // 53))
    few = min(5, betas_at_once, max(1, at_once // (53 * some)))
    parts = list(reduced.intervals(betas, ensembles))
    places = [
        ([*range(e, min(e + some, 3))], [*range(j, min(j + few, 5))])
        for e in range(0, 3, some)
        for j in range(0, 5, few)
    ]
    assert [([*part.ensembles], [*part.betas]) for part in parts] == places
    for part, (of_ensembles, of_betas) in zip(parts, places, strict=True):
        torch.testing.assert_close(part.low, low[of_ensembles][:, of_betas], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(part.high, high[of_ensembles][:, of_betas], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["highest", "near_best"])
def test_images_with_features_are_chosen_on_as_with_affinities_but_in_blocks(rule, monkeypatch):
    keys, features, classifier, key_labels, labels = reference.problem(2)
    cache = Cache(keys=keys, labels=key_labels, classifier=classifier, class_names=tuple("abcdefg"))
    lazy = on_validation(cache, {n: f.double() for n, f in features.items()}, labels)
    whole = HeldOut(cache.zero_shot(features), cache.affinities(features), key_labels, labels)
    expected = search(whole, grid=GRID, ensembles=ENSEMBLES, rule=rule)
    product, sizes = cafo.held_out.affinity, []

    def counted(rows, keys):
        sizes.append(len(rows))
        return product(rows, keys)

    monkeypatch.setattr(cafo.held_out, "affinity", counted)
    monkeypatch.setattr("cafo.reduced.IMAGES_PER_BLOCK", 5)
    got = search(lazy, grid=GRID, ensembles=ENSEMBLES)
    assert max(sizes) <= 5
    assert sum(sizes) <= 2 * (53 + 16 * 5)  # every image once, and what is near an end of its interval
    got = search(lazy, grid=GRID, ensembles=ENSEMBLES, rule=rule)
    assert (got.correct, got.beta, got.ensemble) == (expected.correct, expected.beta, expected.ensemble)
    assert got.alpha == pytest.approx(expected.alpha, rel=1e-4)
    assert got.zero_shot_correct == int((whole.zero_shot.argmax(1) == labels).sum())


def test_a_temporary_file_changes_nothing(monkeypatch, tmp_path):
    data = setup(4, classes=31)
    expected = search(HeldOut(*data), grid=GRID, ensembles=ENSEMBLES)
    monkeypatch.setattr("cafo.spill._BYTES_IN_MEMORY", 0)
    assert search(HeldOut(*data), grid=GRID, ensembles=ENSEMBLES) == expected
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(CafoError, match="set TMPDIR"):
        search(HeldOut(*data), grid=GRID)


def ties(seed):
    """A problem whose p_ZS are small integers, so that many classes are equal."""
    zero_shot, *rest = setup(seed, noise=1.5, keys_per_class=1)
    return (zero_shot * 0.4).round(), *rest


@pytest.mark.parametrize("rounding", [1e-5, 0.05])
@pytest.mark.parametrize(
    "rows", [torch.arange(53), torch.arange(53).flip(0), torch.tensor([7, 50, 3, 3, 11, 20, 12, 29])]
)
def test_counts_are_those_of_float64_for_any_of_the_images(rows, rounding, monkeypatch):
    """With equal p_ZS, which the first class wins at α = 0, and with many images so near that all classes are read."""
    monkeypatch.setattr("cafo.competing_classes._ROUNDING", rounding)
    images = HeldOut(*ties(5))
    some, reduced = images.images(rows), reduce_images(images, 0.1, 12.0).subset(rows)
    assert torch.equal(reduced.labels, images.labels[rows])
    alphas, betas = [0.0, 0.3, 1.7, 8.0], [0.1, 4.0, 12.0]
    counts = torch.tensor([[some.count_correct(a, b, Ensemble()) for a in alphas] for b in betas])
    assert [[reduced.count_correct(a, b, Ensemble()) for a in alphas] for b in betas] == counts.tolist()
    got = reduced.count_correct_at(alphas[1:], betas, Ensemble())
    assert torch.equal(got, counts[:, 1:])
    plain = HeldOut(*setup(5))
    at_0 = reduce_images(plain, 0.1, 12.0).subset(rows).count_correct_at([0.0], betas, Ensemble())
    assert at_0.tolist() == [[int((plain.zero_shot[rows].argmax(1) == plain.labels[rows]).sum())]] * 3
    (part,) = reduced.intervals(betas, [Ensemble()])
    (whole,) = reduce_images(images, 0.1, 12.0).intervals(betas, [Ensemble()])
    assert torch.equal(part.low, whole.low[..., rows])
    assert torch.equal(part.high, whole.high[..., rows])


@pytest.mark.parametrize("rule", ["highest", "near_best"])
def test_alpha_0_is_a_candidate_where_p_zs_has_ties(rule):
    """At α = 0 argmax takes the first of equal classes; for any α > 0 the cache decides, and often wrongly."""
    chosen = 0
    for seed in range(12):
        data = ties(seed)
        at_0 = int((data[0].argmax(1) == data[3]).sum())
        alphas = [0.0, *(10 ** (i / 8) for i in range(-32, 25))]
        best = max(reference.grid_loop(*data, alphas, GRID.values()[::3]).values())
        result = search(HeldOut(*data), grid=GRID, rule=rule)
        if rule == "highest":
            assert result.correct >= max(best, at_0)
            chosen += result.alpha == 0
        assert result.correct == HeldOut(*data).count_correct(result.alpha, result.beta, result.ensemble)
        assert result.zero_shot_correct == at_0
    # a step of α that begins at 0 is worse than 0 itself in the problem below: class 0 is right, and only by its place
    zero_shot, affinities = torch.zeros(1, 3), {"clip": torch.tensor([[0.1], [0.9], [0.2]])}
    result = search(HeldOut(zero_shot, affinities, torch.arange(3), torch.tensor([0])), grid=GRID, rule=rule)
    assert (result.alpha, result.correct) == (0.0, 1)


@pytest.mark.parametrize("seed", range(6))
def test_every_count_is_that_of_float64(seed):
    """Random shapes; at every β of every ensemble, the best count over all steps of α that float32 can tell apart."""
    rng = torch.Generator().manual_seed(seed)
    classes, images, keys = (int(torch.randint(2, top, (1,), generator=rng)) for top in (40, 200, 6))
    data = reference.problem(seed, classes=classes, images=images, keys_per_class=keys, noise=0.5 + 0.3 * seed)
    cache = Cache(keys=data[0], labels=data[3], classifier=data[2] / 5, class_names=tuple(map(str, range(classes))))
    whole = HeldOut(cache.zero_shot(data[1]), cache.affinities(data[1]), data[3], data[4])
    exact = HeldOut(whole.zero_shot.double(), {n: a.double() for n, a in whole.affinities.items()}, *whole[2:])
    ensembles = [Ensemble(), Ensemble(baseline=NOTHING, sources=("dino",)), Ensemble(rule="maximum")]
    assert ensembles[0].baseline == ZERO_SHOT
    result = search(whole, grid=BetaGrid(low=0.1, high=12.0, steps=17, refinements=1), ensembles=ensembles)
    for ensemble, landscape in zip(ensembles, result.landscapes, strict=True):
        for beta, correct in zip(landscape.betas, landscape.correct, strict=True):
            base, term, _, _ = exact.combine(beta, ensemble)
            alphas, counts = reference.accuracy_path(base, term, exact.labels)
            after = torch.cat([alphas[1:], torch.tensor([torch.inf], dtype=torch.float64)])
            fewest, most = (int(counts[after - alphas > width * (1 + alphas)].max()) for width in (1e-4, 1e-6))
            assert fewest <= correct <= most
