from dataclasses import replace

import pytest
import torch

import cafo.search
from cafo.cache import affinity, class_logits, zero_shot_logits
from cafo.ensemble import NOTHING, ZERO_SHOT, Ensemble, combine, table5
from cafo.held_out import HeldOut
from cafo.parts import Part
from cafo.prior import expect
from cafo.reduced import ReducedImages
from cafo.search import search, weight_grid
from cafo.search_grid import BetaGrid
from tests.cafo import reference
from tests.cafo.reference import accuracy_path

N = 7
GRID = BetaGrid(low=0.1, high=12.0, steps=31, refinements=2, refined_steps=5)


def setup(seed=0, **kwargs):
    keys, features, classifier, key_labels, labels = reference.problem(seed, **kwargs)
    zero_shot = zero_shot_logits(features["clip"], classifier) / 8  # so that neither half drowns the other
    return zero_shot, {n: affinity(keys[n], features[n]) for n in keys}, key_labels, labels


def right(zero_shot, affinities, key_labels, labels, alpha, beta, ensemble=None):
    p = {n: class_logits(a, key_labels, N, beta) for n, a in affinities.items()}
    return int((combine(zero_shot, p, ensemble or Ensemble()).logits(alpha).argmax(1) == labels).sum())


def test_the_steps_are_the_accuracy_at_every_alpha():
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        base, term = torch.randn(53, N, generator=g), torch.randn(53, N, generator=g)
        labels = torch.randint(N, (53,), generator=g)
        alphas, correct = accuracy_path(base, term, labels)
        assert alphas[0] == 0
        assert (alphas[1:] > alphas[:-1]).all()
        edges = [*alphas.tolist(), 2 * alphas[-1].item() + 1]
        for low, high, count in zip(edges, edges[1:], correct.tolist(), strict=False):
            alpha = (low + high) / 2
            assert int(((base.double() + alpha * term.double()).argmax(1) == labels).sum()) == count


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ragged", [False, True])
def test_never_below_a_dense_grid_and_the_count_is_exact(seed, ragged):
    data = setup(seed, ragged=ragged)
    result = search(HeldOut(*data), grid=GRID)
    alphas = [0.25 * i for i in range(41)]
    grid = reference.grid_loop(*data, alphas, GRID.values())
    assert result.correct >= max(grid.values())
    assert result.correct == right(*data, result.alpha, result.beta)
    assert result.correct == reference.grid_loop(*data, [result.alpha], [result.beta])[result.alpha, result.beta]
    assert result.accuracy == result.correct / 53
    assert result.correct > right(*data, 0.0, 1.0)  # the problem is one where the cache helps


def test_the_landscape_is_the_best_alpha_of_every_beta():
    data = setup(3)
    result = search(HeldOut(*data), grid=BetaGrid(low=0.5, high=9.0, steps=60, refinements=0))
    (landscape,) = result.landscapes
    assert landscape.betas == pytest.approx(BetaGrid(low=0.5, high=9.0, steps=60, refinements=0).values())
    for beta, alpha, correct in zip(landscape.betas, landscape.alphas, landscape.correct, strict=True):
        assert correct == right(*data, alpha, beta)  # 60 values of β fill several chunks
        p = {n: class_logits(a, data[2], N, beta) for n, a in data[1].items()}
        combination = combine(data[0], p, Ensemble())
        _, counts = accuracy_path(combination.base, combination.term, data[3])
        assert correct == int(counts.max())


def test_ties_go_to_the_smaller_alpha():
    zero_shot = torch.tensor([[2.0, 0.0, 1.0]])
    affinities = {"clip": torch.tensor([[0.9], [0.1], [0.2]])}
    result = search(HeldOut(zero_shot, affinities, torch.arange(3), torch.tensor([0])), grid=GRID)
    assert result.alpha == 0
    assert result.correct == 1
    assert result.beta == GRID.low
    # class 2 overtakes class 0 at one α and stays ahead: the answer sits beyond it, and as near as the path's step
    # allows
    affinities = {"clip": torch.tensor([[0.1], [0.2], [0.9]])}
    result = search(HeldOut(zero_shot, affinities, torch.arange(3), torch.tensor([2])), grid=GRID)
    assert result.correct == 1
    assert 0 < result.alpha < 3


def test_equal_logits_are_decided_as_argmax_decides_them():
    base, term = torch.tensor([[1.0, 1.0, 0.0]]).repeat(3, 1), torch.tensor([[2.0, 2.0, 2.0]]).repeat(3, 1)
    _, correct = accuracy_path(base, term, torch.tensor([0, 1, 2]))
    assert correct.tolist() == [1]
    base = torch.zeros(2, 3)
    term = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    # image 0 is correct at α = 0 alone, image 1 everywhere else
    _, correct = accuracy_path(base, term, torch.tensor([0, 1]))
    assert correct.tolist()[-1] == 1


def test_all_ensembles_can_be_searched_together():
    data = setup(1)
    ensembles = [*table5(("clip", "dino")).values()]
    result = search(HeldOut(*data), grid=GRID, ensembles=ensembles)
    singles = [search(HeldOut(*data), grid=GRID, ensembles=[e]).correct for e in ensembles]
    assert result.correct >= max(singles)
    assert result.correct == right(*data, result.alpha, result.beta, result.ensemble)
    assert len(result.landscapes) == len(ensembles)


def test_weight_grid_leaves_out_multiples():
    grid = weight_grid(Ensemble(sources=("clip", "dino")), ("clip", "dino"), (1.0, 10.0), (0.5, 1.0, 2.0))
    ratios = {(e.temperature, e.scales["clip"] / e.scales["dino"]) for e in grid}
    assert len(grid) == len(ratios) == 2 * 5
    assert all(e.sources == ("clip", "dino") for e in grid)
    data = setup(2)
    assert search(HeldOut(*data), grid=GRID, ensembles=grid).correct >= search(HeldOut(*data), grid=GRID).correct


def test_weight_grid_leaves_out_sources_and_zero_shot_with_the_whole_ensemble_first():
    grid = weight_grid(Ensemble(), ("clip", "dino"), (2.0, 10.0), (0.0, 1.0), drop_zero_shot=True)
    both, clip, dino = {"clip": 1.0, "dino": 1.0}, {"clip": 1.0}, {"dino": 1.0}
    assert [(e.baseline, e.temperature, e.sources, dict(e.scales)) for e in grid] == [
        (ZERO_SHOT, 2.0, None, both),
        (ZERO_SHOT, 2.0, ("dino",), dino),
        (ZERO_SHOT, 2.0, ("clip",), clip),
        (ZERO_SHOT, 10.0, None, both),
        (NOTHING, 2.0, None, both),
        (NOTHING, 2.0, ("dino",), dino),
        (NOTHING, 2.0, ("clip",), clip),
    ]
    (only,) = weight_grid(Ensemble(baseline="clip"), ("clip", "dino"), scales=(0.0, 1.0), drop_zero_shot=True)
    assert only == Ensemble(baseline="clip", scales=both)


def test_no_key_at_all_and_three_sources():
    zero_shot, affinities, key_labels, labels = setup(0, widths=(11, 13, 17))
    result = search(HeldOut(zero_shot, affinities, key_labels, labels), grid=GRID)
    assert result.correct == right(zero_shot, affinities, key_labels, labels, result.alpha, result.beta)
    result = search(HeldOut(zero_shot, {n: a[:0] for n, a in affinities.items()}, key_labels[:0], labels), grid=GRID)
    assert result.alpha == 0
    assert result.correct == int((zero_shot.argmax(1) == labels).sum())


def test_small_blocks_give_the_same_answer(monkeypatch):
    data = setup(0)
    whole = search(HeldOut(*data), grid=GRID)
    monkeypatch.setattr("cafo.reduced.IMAGES_PER_BLOCK", 5)
    monkeypatch.setattr("cafo.reduced._INTERVALS", 200)
    blocks = search(HeldOut(*data), grid=GRID)
    assert (blocks.correct, blocks.beta) == (whole.correct, whole.beta)
    assert blocks.alpha == pytest.approx(whole.alpha, rel=1e-5)
    assert blocks.landscapes[0].correct == whole.landscapes[0].correct


def test_a_part_hurts_if_one_image_more_is_correct_without_it():
    parts = (Part("dino", 50, 51, 40), Part("clip", 50, 50, 40), Part("zero_shot", 50, None, 40))
    result = replace(search(HeldOut(*setup(0)), grid=GRID), parts=parts)
    (told,) = result.hurtful_parts()
    assert told == "dino hurts: 51 of 53 images are correct at the best values without it, 50 with it"


def test_wrong_input_is_an_error():
    zero_shot, affinities, key_labels, labels = setup(0)
    with pytest.raises(ValueError, match="at least one image"):
        search(HeldOut(zero_shot[:0], affinities, key_labels, labels[:0]))
    with pytest.raises(ValueError, match=r"21 keys and 53 images need affinities of shape \(21, 53\)"):
        search(HeldOut(zero_shot, {n: a.T for n, a in affinities.items()}, key_labels, labels))
    with pytest.raises(ValueError, match="at least one source"):
        search(HeldOut(zero_shot, {}, key_labels, labels))
    with pytest.raises(ValueError, match="7 classes"):
        search(HeldOut(zero_shot, affinities, key_labels, labels + 1))
    with pytest.raises(ValueError, match="from -1 to"):
        search(HeldOut(zero_shot, affinities, key_labels, labels - 1))
    with pytest.raises(ValueError, match="at least two classes"):
        search(HeldOut(zero_shot[:, :1], affinities, key_labels * 0, labels * 0))
    assert search(HeldOut(zero_shot[:, :2], affinities, key_labels % 2, labels % 2), grid=GRID).total == 53
    for scales in ((0.0,), (0.0, -0.5)):
        with pytest.raises(ValueError, match="at least one scale must be positive"):
            weight_grid(Ensemble(), ("clip", "dino"), scales=scales)
    with pytest.raises(ValueError, match="low"):
        BetaGrid(low=0.0)


def test_a_candidate_that_float32_does_not_confirm_gives_way(monkeypatch):
    data = setup(0)
    honest = search(HeldOut(*data), grid=GRID)
    candidates = cafo.search.search_grid

    def with_a_false_one(*args):
        return [*candidates(*args), cafo.search.Candidate(0, 1e6, 0.1, 0)]

    monkeypatch.setattr(cafo.search, "search_grid", with_a_false_one)
    assert search(HeldOut(*data), grid=GRID).correct >= honest.correct > right(*data, 1e6, 0.1)


def test_of_candidates_that_are_equal_when_confirmed_the_first_is_chosen(monkeypatch):
    data = setup(0)
    count = right(*data, 1.0, 2.0)
    false_ones = [cafo.search.Candidate(wrong, alpha, 2.0, 0) for wrong, alpha in ((0, 1.0), (1, 1.0 + 1e-7))]
    monkeypatch.setattr(cafo.search, "search_grid", lambda *_: list(false_ones))
    result = search(HeldOut(*data), grid=GRID)
    assert (result.alpha, result.beta, result.correct) == (1.0, 2.0, count)
    assert count < 52


def test_a_candidate_that_is_confirmed_ends_the_search(monkeypatch):
    """No other claims more, so that no other is counted again."""
    counted, count = [], ReducedImages.count_correct
    monkeypatch.setattr(ReducedImages, "count_correct", lambda *args: counted.append(args) or count(*args))
    search(HeldOut(*setup(0)), grid=GRID)
    assert len(counted) == 1


def test_the_rule_near_best_is_given_the_prior_and_the_best_single_part(monkeypatch):
    data, given = setup(0), []
    ensembles = weight_grid(Ensemble(), ("clip", "dino"), scales=(1.0, 0.0), drop_zero_shot=True)
    highest = search(HeldOut(*data), grid=GRID, ensembles=ensembles)
    monkeypatch.setattr(cafo.search, "choose_near_best", lambda *args: given.append(args[3:]))
    assert search(HeldOut(*data), grid=GRID, ensembles=ensembles, rule="near_best") == highest  # as it chose none
    ((prior, floor),) = given
    assert vars(prior) == pytest.approx(vars(expect(data[0], data[3], 3)))
    assert floor == max(part.alone for part in highest.parts)


@pytest.mark.parametrize("seed", range(3))
def test_every_value_of_beta_on_the_finer_grids_has_its_own_accuracy(seed):
    data = setup(seed)
    (landscape,) = search(HeldOut(*data), grid=BetaGrid(low=0.1, high=12.0, steps=20, refinements=3)).landscapes
    assert len(landscape.betas) == len(set(landscape.betas)) > 20 + 2 * 3
    for beta, alpha, correct in zip(landscape.betas, landscape.alphas, landscape.correct, strict=True):
        assert correct == right(*data, alpha, beta)
