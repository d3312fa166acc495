"""The loss at a free temperature against scipy's minimiser, and what it must not depend on."""

import pytest
import torch
from scipy.optimize import minimize_scalar

from cafo.calibration import free_temperature_loss

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
