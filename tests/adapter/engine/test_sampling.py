"""Draws against the probabilities of the nucleus, one row at a time."""

from collections import Counter

import pytest
import torch

from adapter.engine import sampling
from adapter.engine.sampling import SamplingSettings, choose, log_probabilities, random_generator, sample
from tests.adapter import reference


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.75), (0.5, 0.9), (2.0, 1.0), (1.0, 0.01)])
@pytest.mark.parametrize("candidates", [256, 2])
def test_draws_follow_the_nucleus(temperature, top_p, candidates, monkeypatch):
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)  # with 2, most rows need the whole vocabulary
    logits, n = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, 1.0, -3.0]), 10_007
    draws = (torch.arange(n) + 0.5) / n  # evenly spaced, so shares are probabilities
    chosen = sample(logits.expand(n, 7), [temperature] * n, [top_p] * n, [0] * n, draws)
    shares = {token: count / n for token, count in Counter(chosen.tolist()).items()}
    expected = reference.nucleus(logits.tolist(), temperature, top_p)
    assert shares.keys() == expected.keys()
    assert all(abs(shares[token] - expected[token]) < 2e-4 for token in expected)


def test_top_k_leaves_the_likeliest_and_their_proportions():
    logits, n = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, 1.0, -3.0]), 10_007
    draws = (torch.arange(n) + 0.5) / n
    chosen = sample(logits.expand(n, 7), [1.0] * n, [1.0] * n, [3] * n, draws)
    expected = logits[[1, 3, 5]].softmax(0).tolist()
    shares = [float((chosen == token).float().mean()) for token in (1, 3, 5)]
    assert shares == pytest.approx(expected, abs=2e-4)
    assert set(sample(logits.expand(n, 7), [1.0] * n, [0.5] * n, [3] * n, draws).tolist()) == {1, 3}, "both limits hold"


def test_the_largest_draw_stays_in_the_nucleus():
    logits = torch.randn(997, 101, generator=torch.Generator().manual_seed(0))
    chosen = sample(logits, [1.0] * 997, [0.75] * 997, [0] * 997, torch.full((997,), 1 - 2**-24))
    for row, token in zip(logits.tolist(), chosen.tolist(), strict=True):
        assert token in reference.nucleus(row, 1.0, 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_the_likeliest_first_changes_nothing(dtype, monkeypatch):
    """With many ties, of which bf16 logits are full, at every breadth of the nucleus."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(499, 1009, generator=generator).to(dtype) * torch.linspace(0.1, 6, 499, dtype=dtype)[:, None]
    draws = torch.rand(499, generator=generator)
    settings = [[1.0] * 499, [[0.3, 0.75, 0.99][i % 3] for i in range(499)], [[0, 5, 300][i % 3] for i in range(499)]]
    monkeypatch.setattr(sampling, "CANDIDATES", 37)
    by_candidates = sample(logits, *settings, draws)
    monkeypatch.setattr(sampling, "CANDIDATES", 1009)
    assert torch.equal(by_candidates, sample(logits, *settings, draws))


def test_each_row_has_its_own_settings():
    logits = torch.randn(5, 101, generator=torch.Generator().manual_seed(0))
    settings = [
        SamplingSettings(0.0),
        SamplingSettings(1.0),
        SamplingSettings(0.3, 0.9),
        SamplingSettings(2.0, 1.0, 4),
        SamplingSettings(1e-38, 1.0),
    ]
    generators = [random_generator(3, [row], 0) for row in range(5)]
    together = choose(logits, settings, generators)
    for row in range(5):
        alone = choose(logits[row : row + 1], settings[row : row + 1], [random_generator(3, [row], 0)])
        assert together[row] == alone[0]
    assert together[0] == logits[0].argmax()
    assert together[4] == logits[4].argmax()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_warm_sequence_is_drawn_with_its_own_generator(temperature):
    logits = torch.randn(97, 101, generator=torch.Generator().manual_seed(0))
    chosen = choose(logits, [SamplingSettings(temperature)] * 97, [random_generator(3, [row], 0) for row in range(97)])
    draws = torch.stack([torch.rand((), generator=random_generator(3, [row], 0)) for row in range(97)])
    assert torch.equal(chosen, sample(logits, [temperature] * 97, [1.0] * 97, [0] * 97, draws))
    assert (chosen != logits.argmax(-1)).sum() > 20


def test_a_draw_on_a_border_takes_the_next_token_and_a_full_nucleus_no_further_one():
    logits, ones = torch.zeros(1, 4), [1.0]  # probabilities of a quarter, without rounding
    picked = [int(sample(logits, ones, ones, [0], torch.tensor([draw]))) for draw in (0.0, 0.25, 0.5, 0.75)]
    assert picked == [0, 1, 2, 3]
    assert [int(sample(logits, ones, [0.5], [0], torch.tensor([draw]))) for draw in (0.25, 0.5, 0.99)] == [0, 1, 1]


def test_log_probabilities_are_the_models_with_as_many_rivals_as_asked():
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    expected = (logits.double().exp() / logits.double().exp().sum(1, keepdim=True)).log()
    rows = log_probabilities(logits, [4, 0, 10], [0, 2, 5])
    for row, (token, n) in enumerate([(4, 0), (0, 2), (10, 5)]):
        assert rows[row].id == token
        assert rows[row].logprob == pytest.approx(float(expected[row, token]), rel=1e-5)
        likeliest = sorted(range(11), key=lambda id: -float(expected[row, id]))[:n]
        assert [id for id, _ in rows[row].top] == likeliest
        assert [value for _, value in rows[row].top] == pytest.approx(expected[row, likeliest].tolist(), rel=1e-5)
    assert [one.top for one in log_probabilities(logits, [4, 0, 10], [0, 0, 0])] == [[], [], []]
    with pytest.raises(ValueError, match="shorter"):
        log_probabilities(logits, [4, 0, 10], [0, 2])


def test_a_seed_stands_for_the_same_numbers_in_every_version():
    assert random_generator(3, [5, 7], 0).initial_seed() == 22_498_531_649_603_473
    others = [random_generator(4, [5, 7], 0), random_generator(3, [7, 5], 0), random_generator(3, [5, 7], 1)]
    assert len({22_498_531_649_603_473, *(one.initial_seed() for one in others)}) == 4
