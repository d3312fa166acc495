"""Write a table as Markdown and CSV, and its cells: means, deviations and intervals, with the digits they support.

`console.show_table` prints a table.
"""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from cafo.wilson import wilson_interval
from rayjobs.storage.files import write_text

Rows = Sequence[Sequence[str]]


def markdown_table(columns: Sequence[str], rows: Rows) -> str:
    """A Markdown table, its first column aligned left and the others right."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    lines = [[_cell(text) for text in columns], rule, *([_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def supported_decimals(uncertainty: float, most: int) -> int:
    """Decimals that a value with this uncertainty is shown with, from 0 to `most`.

    The rule is the Particle Data Group's: an uncertainty has two significant digits if it begins with less than 3.55,
    else one, and the value has as many decimals as its uncertainty. So 93.86 ± 1.68 becomes 93.9 ± 1.7.
    """
    if uncertainty <= 0:
        return most
    power = math.floor(math.log10(uncertainty))
    leading = uncertainty / 10**power
    digits = 1 if 3.55 <= leading < 9.5 else 2
    return min(max(digits - 1 - power - (leading >= 9.5), 0), most)


def mean_and_deviation(values: Sequence[float], most_decimals: int, factor: float = 1) -> str:
    """Mean ± sample standard deviation, both times `factor` (100 for percent); the mean alone of a single value.

    It has the decimals that the deviation supports, at most `most_decimals`.
    """
    mean, deviation = factor * statistics.mean(values), factor * _deviation(values)
    decimals = supported_decimals(deviation, most_decimals)
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}" if len(values) > 1 else f"{mean:.{decimals}f}"


def accuracy_cell(shares: Sequence[float], images: int | None, *, unit: str = "") -> str:
    """An accuracy in percent, such as `93.9 ± 1.7 [91.6, 95.5]`: mean, deviation over seeds, Wilson's 95% interval.

    The deviation says what other training images would change, the interval what other test images would change. The
    decimals are those that the deviation supports or, without seeds that differ, the interval.

    Args:
        shares: the share of right answers of each seed, from 0 to 1.
        images: test images, the same for every seed; None if they are not known, which leaves the interval out.
        unit: what stands behind the deviation, such as `%` in a headline.
    """
    mean, deviation = statistics.mean(shares), _deviation(shares)
    bounds = wilson_interval(mean, images) if images else None
    uncertainty = deviation or (0.5 * (bounds[1] - bounds[0]) if bounds else 0.0)
    decimals = supported_decimals(100 * uncertainty, 2)
    text = f"{100 * mean:.{decimals}f}" + (f" ± {100 * deviation:.{decimals}f}" if deviation else "")
    return text + unit + (f" [{100 * bounds[0]:.{decimals}f}, {100 * bounds[1]:.{decimals}f}]" if bounds else "")


INTERVAL_NOTE = (
    "In percent. ± is the sample standard deviation over seeds. In brackets is Wilson's 95% interval: what as many "
    "other test examples might have given."
)
"""A sentence below a table of `accuracy_cell`."""


def write_csv(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Write a table as a CSV file, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
