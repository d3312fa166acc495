"""The best temperature and its loss against scipy's minimiser, and what they must not depend on."""

import pytest
import torch
from scipy.optimize import minimize_scalar

from cafo.calibration import best_temperature, calibrate, free_temperature_loss

B, N = 13, 7


def problem(seed):
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(N, (B,), generator=rng)
    logits = 3 * torch.randn(5, B, N, generator=rng)
    logits[1:, torch.arange(B), labels] += torch.tensor([1.0, 2.0, 4.0, 30.0])[:, None]  # the last: all correct
    return logits, labels


def smoothed_loss(logits, labels, temperature):
    """The mean cross-entropy with targets as if one more image had been seen, of which nothing is known."""
    total = 0.0
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        log_p = torch.log_softmax(row / temperature, dim=0)
        total -= float(log_p[label]) * B / (B + 1) + float(log_p.mean()) / (B + 1)
    return total / B


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_lowest_loss_over_all_temperatures(seed):
    logits, labels = problem(seed)
    for one, loss in zip(logits, free_temperature_loss(logits, labels), strict=True):
        found = minimize_scalar(
            lambda log_t, one=one: smoothed_loss(one, labels, 10**log_t), bounds=(-3, 4), method="bounded"
        )
        assert float(loss) == pytest.approx(found.fun, rel=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_calibrated_probabilities_are_those_of_the_best_temperature(seed):
    logits, labels = problem(seed)
    some = logits[1:4]  # the first says nothing, the last is right everywhere: their temperatures have no bound
    for one, temperature in zip(some, best_temperature(some, labels), strict=True):
        found = minimize_scalar(
            lambda log_t, one=one: smoothed_loss(one, labels, 10**log_t), bounds=(-3, 4), method="bounded"
        )
        assert float(temperature) == pytest.approx(10**found.x, rel=0.01)
        made = calibrate(one, labels)
        assert made.temperature == pytest.approx(float(temperature))
        expected = torch.softmax(one.double() / made.temperature, dim=-1)
        torch.testing.assert_close(made.probabilities(one).double(), expected)
        own = sorted(1 - float(row[label]) for row, label in zip(expected, labels, strict=True))
        assert made.scores.tolist() == pytest.approx(own, abs=1e-6)


def test_logits_of_a_known_temperature_are_calibrated_back_to_it():
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(25_000, N, generator=rng)  # more images than the temperature is fitted on
    labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=rng)[:, 0]
    made = calibrate(5 * logits, labels)
    assert made.temperature == pytest.approx(5, rel=0.03)
    assert len(made.scores) == 25_000


def test_the_size_of_the_logits_and_a_constant_per_image_do_not_matter():
    logits, labels = problem(0)
    loss = free_temperature_loss(logits, labels)
    torch.testing.assert_close(free_temperature_loss(logits * 37, labels), loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        free_temperature_loss(logits + 9 * torch.randn(B, 1), labels), loss, rtol=1e-3, atol=1e-4
    )


def test_logits_that_say_nothing_have_the_loss_of_a_guess():
    labels = torch.arange(B) % N
    flat = free_temperature_loss(torch.zeros(B, N), labels)
    assert float(flat) == pytest.approx(float(torch.tensor(float(N)).log()))
