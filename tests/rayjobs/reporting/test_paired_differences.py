"""Differences paired by seed, against SciPy's paired test."""

import re

import pytest

from rayjobs.reporting.paired_differences import differences_table, mean_and_interval, student_t975

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 9, 10, 11, 19, 53, 1000])
def test_students_quantile_is_scipys(freedom: int) -> None:
    assert student_t975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=3e-4)


def test_the_interval_is_that_of_the_paired_test() -> None:
    own, others = [0.912, 0.905, 0.931, 0.917], [0.902, 0.907, 0.909, 0.911]
    rows = [
        {"method": method, "shots": 4, "seed": seed, "accuracy": value}
        for method, values in (("CaFo", others), ("GDA", own))
        for seed, value in enumerate(values)
    ]
    columns, ((method, cell),) = differences_table(rows[::-1], "CaFo")
    assert (columns, method) == (["method", "4 shots"], "GDA")
    interval = stats.ttest_rel(own, others).confidence_interval(0.95)
    mean = sum(own) / 4 - sum(others) / 4
    got = [float(number) for number in re.findall(r"[+-][\d.]+", cell)]
    assert got == pytest.approx([100 * mean, 100 * interval.low, 100 * interval.high], abs=0.051)


def test_each_row_is_compared_where_the_reference_has_the_same_seed() -> None:
    def row(method: str, shots: int | None, seed: int | None, accuracy: float) -> dict[str, object]:
        return {"method": method, "shots": shots, "seed": seed, "accuracy": accuracy}

    rows = [row("zero-shot", None, None, 0.5), row("GDA", 2, 1, 0.75), row("CaFo", 1, 1, 0.625)]
    rows += [row("CaFo", 2, 1, 0.5), row("CaFo", 2, 2, 0.75), row("other", 16, 1, 0.5)]
    assert differences_table(rows, "CaFo") == (
        ["method", "1 shot", "2 shots"],
        [["zero-shot", "-12.50", "-12 [-171, +146]"], ["GDA", "", "+25.00"]],
    )
    assert differences_table(rows[2:3], "CaFo")[1] == []
    assert mean_and_interval([]) == ""
