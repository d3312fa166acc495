"""The choice near the highest accuracy: eligible by count, cheapest by loss, and never below a single part."""

import math
from dataclasses import replace

import pytest
import torch

import cafo.near_best
from cafo.calibration import free_temperature_loss
from cafo.ensemble import NOTHING, ZERO_SHOT, Ensemble
from cafo.held_out import HeldOut
from cafo.near_best import choose_near_best
from cafo.prior import BETA, expect
from cafo.reduced import reduce_images
from cafo.search import search, weight_grid
from cafo.search_grid import BetaGrid, search_grid
from tests.cafo.test_search import N, right, setup

GRID = BetaGrid(low=0.1, high=12.0, steps=24, refinements=0)
EVERY = weight_grid(Ensemble(), ("clip", "dino"), scales=(1.0, 0.0), drop_zero_shot=True)


def reduced(data):
    return reduce_images(HeldOut(*data), GRID.low, GRID.high)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_cheapest_of_those_within_one_standard_error(seed):
    data = setup(seed)
    result = search(HeldOut(*data), grid=GRID, ensembles=EVERY, rule="near_best")
    highest = search(HeldOut(*data), grid=GRID, ensembles=EVERY)
    total = len(data[3])
    share = highest.correct / total
    enough = highest.correct - math.sqrt(total * share * (1 - share))
    assert result.correct >= enough
    assert result.correct == right(*data, result.alpha, result.beta, result.ensemble)
    # no value of a naive grid that is accurate enough costs less, up to the distance between values
    images, prior = HeldOut(*data), expect(data[0], data[3], len(data[2]) / N)

    def cost(alpha, beta, ensemble):
        loss = float(free_temperature_loss(images.combine(beta, ensemble).logits(alpha), data[3]))
        return total * loss + prior.penalty(alpha, beta, zero_shot=ensemble.baseline != NOTHING)

    got = cost(result.alpha, result.beta, result.ensemble)
    for ensemble in EVERY:
        for beta in GRID.values()[::4]:
            for alpha in [prior.alpha * 1.7**i for i in range(-6, 7, 2)]:
                if right(*data, alpha, beta, ensemble) >= enough:
                    assert got <= cost(alpha, beta, ensemble) + 0.5


@pytest.mark.parametrize(("pairs", "judged"), [(24, 256), (5, 10), (1000, 20)])
@pytest.mark.parametrize(("factor", "strict"), [(1, False), (1, True), (1e9, True)])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_cheapest_of_a_plain_list_of_costs(monkeypatch, seed, pairs, judged, factor, strict):
    """strict: the floor is the highest accuracy. factor: of the expected α, which may be far from any good one."""
    monkeypatch.setattr(cafo.near_best, "_PAIRS", pairs)
    monkeypatch.setattr(cafo.near_best, "_IMAGES_OF_LOSS", judged)
    monkeypatch.setattr(cafo.near_best, "_LOGITS_OF_LOSS", 3)
    monkeypatch.setattr(cafo.near_best, "_LOGITS_AT_ONCE", 1)
    data = setup(seed)
    images, prior = reduced(data), expect(data[0], data[3], 3)
    prior = replace(prior, alpha=factor * prior.alpha)
    candidates, total = search_grid(images, GRID, EVERY), len(data[3])
    highest = total - min(candidates).wrong
    enough = highest if strict else math.ceil(highest - math.sqrt(highest * (total - highest) / total))
    near = sorted((c for c in candidates if total - c.wrong >= enough), key=lambda c: (c.ensemble, c.beta))
    every, rows = max(1, len(near) // pairs), torch.arange(0, total, max(1, total // judged))
    costs = []
    for one in {min(near), *near[every // 2 :: every]}:
        ensemble, alphas = EVERY[one.ensemble], [one.alpha]
        if ensemble.baseline != NOTHING:
            others = [prior.alpha * 1.7**i for i in range(-6, 7)]
            alphas += [alpha for alpha in others if right(*data, alpha, one.beta, ensemble) >= enough]
        for alpha in alphas:
            logits = HeldOut(*data).images(rows).combine(one.beta, ensemble).logits(alpha)
            loss = float(free_temperature_loss(logits, data[3][rows]))
            penalty = prior.penalty(alpha, one.beta, zero_shot=ensemble.baseline != NOTHING)
            costs.append((total * loss + penalty, alpha, one.beta, one.ensemble))
    got = choose_near_best(candidates, images, EVERY, prior, floor=highest if strict else 0)
    expected = min(costs)
    assert (got.beta, got.ensemble) == expected[2:]
    assert got.alpha == pytest.approx(expected[1], rel=1e-5)
    assert got.correct == right(*data, got.alpha, got.beta, EVERY[got.ensemble]) >= enough


def useless_source(seed):
    """A problem whose first source, also that of p_ZS, says nothing, and whose second one is good."""
    rng = torch.Generator().manual_seed(seed)
    classes, keys, images = 11, 3, 71
    key_labels, labels = torch.arange(classes).repeat_interleave(keys), torch.randint(classes, (images,), generator=rng)
    affinities = {name: 0.2 * torch.rand(classes * keys, images, generator=rng) for name in ("clip", "dino")}
    affinities["dino"] += 0.15 * (key_labels[:, None] == labels[None])
    return torch.randn(images, classes, generator=rng), affinities, key_labels, labels


@pytest.mark.parametrize("rule", ["near_best", "highest"])
@pytest.mark.parametrize("seed", range(3))
def test_no_cascade_is_below_its_best_part(rule, seed):
    for data in (setup(seed), useless_source(seed)):
        ensembles = weight_grid(Ensemble(), ("clip", "dino"), scales=(1.0, 0.0), drop_zero_shot=True)
        result = search(HeldOut(*data), grid=GRID, ensembles=ensembles, rule=rule)
        alone = [
            search(HeldOut(*data), grid=GRID, ensembles=[Ensemble(baseline=NOTHING, sources=(name,))]).correct
            for name in ("clip", "dino")
        ]
        zero_shot = int((data[0].argmax(1) == data[3]).sum())
        assert result.correct >= max(*alone, zero_shot)


@pytest.mark.parametrize("seed", range(3))
def test_a_useless_source_is_left_out_and_told(seed):
    data = useless_source(seed)
    whole = search(HeldOut(*data), grid=GRID)
    ensembles = weight_grid(Ensemble(), ("clip", "dino"), scales=(1.0, 0.0), drop_zero_shot=True)
    result = search(HeldOut(*data), grid=GRID, ensembles=ensembles, rule="near_best")
    assert result.correct > whole.correct
    assert result.ensemble.sources == ("dino",)
    parts = {part.name: part for part in result.parts}
    assert parts["clip"].gain < 0 < parts["dino"].gain
    assert any(text.startswith("clip hurts: ") for text in result.hurtful_parts())
    # each count is that of a search among the candidates with, or without, the part
    for name, part in parts.items():
        having = [e for e in ensembles if (e.baseline == ZERO_SHOT if name == ZERO_SHOT else _uses(e, name))]
        lacking = [e for e in ensembles if e not in having]
        assert part.with_it == search(HeldOut(*data), grid=GRID, ensembles=having).correct
        zero_shot = int((data[0].argmax(1) == data[3]).sum()) if name != ZERO_SHOT else 0
        assert part.without == max(search(HeldOut(*data), grid=GRID, ensembles=lacking).correct, zero_shot)


def _uses(ensemble, name):
    return ensemble.sources is None or name in ensemble.sources


def test_old_choices_know_no_part_without_another():
    result = search(HeldOut(*setup(0)), grid=GRID)
    assert all(part.gain is None for part in result.parts if part.name == ZERO_SHOT)
    assert result.hurtful_parts() == []


def test_a_candidate_that_is_not_confirmed_is_not_chosen():
    data = setup(0)
    images, prior = reduced(data), expect(data[0], data[3], 3)
    candidates = search_grid(images, GRID, [Ensemble()])
    impossible = [candidate._replace(wrong=0) for candidate in candidates]
    assert choose_near_best(impossible, images, [Ensemble()], prior, floor=0) is None


def test_weights_of_zero_leave_a_source_out():
    assert len(EVERY) == 6
    assert EVERY[0] == Ensemble(scales={"clip": 1.0, "dino": 1.0})
    assert {(e.baseline, e.sources) for e in EVERY} == {
        (baseline, sources) for baseline in (ZERO_SHOT, NOTHING) for sources in (None, ("clip",), ("dino",))
    }
    for rule in ("average", "maximum"):
        grid = weight_grid(Ensemble(rule=rule), ("clip", "dino"), scales=(1.0, 0.0), drop_zero_shot=True)
        assert [e.sources for e in grid] == [None, ("clip",), ("dino",)]
    swapped = weight_grid(Ensemble(baseline="clip"), ("clip", "dino"), scales=(1.0, 0.0), drop_zero_shot=True)
    assert [e.sources for e in swapped] == [None]
    with pytest.raises(ValueError, match="at least one scale must be positive"):
        weight_grid(Ensemble(), ("clip",), scales=(0.0,))


def test_the_prior_is_its_formula():
    rng = torch.Generator().manual_seed(0)
    zero_shot, labels = 5 * torch.randn(37, N, generator=rng), torch.randint(N, (37,), generator=rng)
    correct = sum(int(row.argmax()) == label for row, label in zip(zero_shot, labels.tolist(), strict=True))
    scale = sum(float(row.double().std()) for row in zero_shot) / 37
    prior = expect(zero_shot, labels, 8)
    assert prior.alpha == pytest.approx(0.5 * scale * 8**0.5 / ((correct + 1) / 39))
    assert prior.beta == BETA
    assert prior.penalty(prior.alpha, prior.beta) == 0
    assert prior.penalty(prior.alpha * math.e, prior.beta) == pytest.approx(0.5)
    assert prior.penalty(prior.alpha, prior.beta / math.e) == pytest.approx(0.5)
    assert math.isfinite(prior.penalty(0.0, prior.beta))


def test_the_floor_holds_where_the_loss_alone_would_go_below_it():
    lower = 0
    for seed in range(8):
        data = setup(seed)
        images, prior = reduced(data), expect(data[0], data[3], 3)
        candidates = search_grid(images, GRID, [Ensemble()])
        highest = len(images.labels) - min(candidates).wrong
        free = choose_near_best(candidates, images, [Ensemble()], prior, floor=0)
        held = choose_near_best(candidates, images, [Ensemble()], prior, floor=highest)
        assert held.correct == highest >= free.correct
        lower += free.correct < highest
    assert lower > 0


def test_the_expected_values_count_among_equals():
    moved = 0
    for seed in range(4):
        data = setup(seed)
        images = reduced(data)
        prior, candidates = expect(data[0], data[3], 3), search_grid(images, GRID, [Ensemble()])
        low, high = (
            choose_near_best(candidates, images, [Ensemble()], replace(prior, beta=beta), floor=0).beta
            for beta in (0.2, 11.0)
        )
        assert low <= high
        moved += low < high
    assert moved > 0
