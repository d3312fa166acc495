"""Digits that an uncertainty supports, by the Particle Data Group's rule, and cells of accuracies."""

import re

import pytest
from scipy.stats import binomtest

from rayjobs.reporting.tables import accuracy_cell, mean_and_deviation, supported_decimals


@pytest.mark.parametrize(
    ("uncertainty", "decimals"),
    # The three highest digits of the error: 100 to 354 keep two digits, 355 to 949 one, 950 to 999 become 1.0.
    [(0.827, 1), (0.119, 2), (0.367, 1), (0.0354, 3), (0.0356, 2), (0.968, 1), (3.5, 1), (3.6, 0), (12.0, 0), (0.0, 2)],
)
def test_the_groups_own_examples(uncertainty: float, decimals: int) -> None:
    assert supported_decimals(uncertainty, 2 if uncertainty == 0 else 4) == decimals


def test_a_value_has_no_more_digits_than_its_seeds_support() -> None:
    assert mean_and_deviation([1.2345, 1.2312], 4) == "1.2329 ± 0.0023"
    assert mean_and_deviation([1.3, 2.0], 4) == "1.6 ± 0.5"
    assert mean_and_deviation([1.23456], 4) == "1.2346"


@pytest.mark.parametrize(("correct", "images"), [(560, 597), (39, 40), (0, 40), (40, 40), (32_720, 50_000)])
def test_an_accuracy_has_wilsons_interval(correct: int, images: int) -> None:
    cell = accuracy_cell([correct / images], images)
    low, high = binomtest(correct, images).proportion_ci(0.95, method="wilson")
    told = [float(number) for number in re.findall(r"[\d.]+", cell)]
    step = 10 ** -len(cell.partition(" ")[0].partition(".")[2])
    assert told == pytest.approx([100 * correct / images, 100 * low, 100 * high], abs=step / 2 + 1e-9)


def test_seeds_decide_over_the_digits_and_equal_ones_do_not_vary() -> None:
    assert accuracy_cell([0.92, 0.95, 0.945], 597) == "93.8 ± 1.6 [91.6, 95.5]"
    assert accuracy_cell([0.5, 0.5], 100) == "50 [40, 60]"
    assert accuracy_cell([0.92, 0.95], None, unit="%") == "93.5 ± 2.1%"
