"""The learning rate's course: warm-up, peak and fall, whatever the length of the training."""

import math

import pytest

from rayjobs.train.config import TrainConfig


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "steps_per_epoch", "warmup"),
    [
        (5, 2, 10, 20),
        (2, 2, 10, 20),  # as long as the training: the last step has the peak
        (1, 2, 10, 4),  # longer: 40% of the steps
        (3, 5, 7, 8),
        (0.1, 2, 10, 1),
        (0.001, 2, 10, 1),
    ],
)
def test_the_peak_is_reached_at_the_end_of_the_warmup(
    epochs: float, warmup_epochs: float, steps_per_epoch: int, warmup: int
) -> None:
    config = TrainConfig(epochs=epochs, warmup_epochs=warmup_epochs)
    rates = [config.learning_rate(step, steps_per_epoch, 0.3) for step in range(config.total_steps(steps_per_epoch))]
    assert config.warmup_steps(steps_per_epoch) == warmup
    assert rates[:warmup] == pytest.approx([0.3 * (step + 1) / warmup for step in range(warmup)])
    assert max(rates) == pytest.approx(0.3)
    fall = len(rates) - warmup
    expected = [0.3 * 0.5 * (1 + math.cos(math.pi * step / max(1, fall))) for step in range(fall)]
    assert rates[warmup:] == pytest.approx(expected)


def test_a_shortened_warmup_is_told() -> None:
    told = TrainConfig(epochs=1, warmup_epochs=2).describe_short_warmup()
    assert told == "train.warmup_epochs=2 is longer than train.epochs=1: 40% of the steps are warm-up instead"
    assert TrainConfig().describe_short_warmup() == ""
