"""Wilson's interval of a share: the uncertainty of an accuracy that was measured on a number of images.

Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
"""

import math

Z95 = 1.959963984540054
"""The 97.5% quantile of the normal distribution."""


def wilson_interval(share: float, total: float) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share that was seen in `total` independent cases.

    Unlike the normal interval it keeps its coverage with few cases and near 0 and 1, and never leaves [0, 1].
    """
    z2 = Z95**2 / total
    centre = (share + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(share * (1 - share) / total + z2 / (4 * total))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding keeps the share inside
