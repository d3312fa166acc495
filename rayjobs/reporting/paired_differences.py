"""Tables of differences from one method, paired by seed, with 95% intervals.

The methods of one seed have the same training images and the same test images, so that their difference varies less
from seed to seed than their accuracies do.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cafo.wilson import Z95
from rayjobs.reporting.tables import supported_decimals

_T975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
"""the 97.5% quantiles of Student's t with 1, 2, … degrees of freedom"""

DIFFERENCES_NOTE = (
    "Those of accuracies are in points of percent. In brackets is the 95% interval over seeds (Student's t). The "
    "differences are paired by seed: both methods have the same training and test examples."
)
"""A sentence below a table of differences."""


def differences_table(rows: Sequence[Mapping[str, Any]], reference: str) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table of differences from a method, in points of percent.

    Args:
        rows: {method, shots, seed, accuracy} of one target; a method without shots, such as zero-shot, is compared at
            all K.
        reference: name of the method that the others are compared with.

    Returns:
        No lines if there is no other method.
    """
    accuracies = {(row["method"], row["shots"], row["seed"]): row["accuracy"] for row in rows}
    known = {(shots, seed): value for (method, shots, seed), value in accuracies.items() if method == reference}
    columns = sorted({shots for shots, _ in known})
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != reference):
        cells = [list(_differences(accuracies, known, method, shots)) for shots in columns]
        if any(cells):
            lines.append([method, *map(mean_and_interval, cells)])
    return ["method", *[f"{k} shots" if k != 1 else "1 shot" for k in columns]], lines


def _differences(
    accuracies: Mapping[tuple[Any, ...], float], reference: Mapping[tuple[Any, Any], float], method: str, shots: int
) -> Iterator[float]:
    for (at, seed), value in reference.items():
        own = accuracies.get((method, shots, seed), accuracies.get((method, None, None)))
        if at == shots and own is not None:
            yield 100 * (own - value)


def mean_and_interval(differences: Sequence[float]) -> str:
    """The mean of differences with its 95% interval, such as `+0.5 [-1.1, +2.1]`; the mean alone of one.

    It has the decimals that half the interval's width supports.
    """
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}"
    half = student_t975(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    decimals = supported_decimals(half, 2)
    return f"{mean:+.{decimals}f} [{mean - half:+.{decimals}f}, {mean + half:+.{decimals}f}]"


def student_t975(freedom: int) -> float:
    """The 97.5% quantile of Student's t, to 3e-4.

    Args:
        freedom: degrees of freedom. From 10 on it is Cornish and Fisher's expansion of the normal quantile.
    """
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z, n = Z95, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
