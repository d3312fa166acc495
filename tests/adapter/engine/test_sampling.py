"""Draws against the probabilities of the nucleus, one row at a time."""

from collections import Counter

import pytest
import torch

from adapter.engine import sampling
from adapter.engine.sampling import SamplingSettings, choose, random_generator, sample
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
