"""The α and β to expect before any image is held out, learned on other data sets.

Where a class has one labelled image, none can be held out: its class would have no key. There α and β are these, and
with few held-out images they weigh in the choice. On any data set they depend on two things that are known: how far
apart p_ZS holds the classes, and how often p_ZS alone is right on the labelled images, which it was not trained on.

    α₀ = 0.5 · s · √k / a          β₀ = 6

with s the standard deviation of p_ZS over the classes (mean over images), k the keys of a class, and a the share of
images that p_ZS alone gets right, (correct + 1) / (images + 2).

How the numbers were made (`python -m benchmarks.selection FEATURES WORLD --prior` repeats it): test accuracy was
measured at one and four shots, 5 seeds each, over α/s from 0.05 to 50 at β = 6, with keys trained as the paper does, on
features of photos (54 classes of Caltech-101, EfficientNet-Lite0) and of handwritten digits (the demo's CLIP, alone and
with its DINO), each with the zero-shot classifier as it is and with noise that lowers its accuracy in five steps to
chance: 36 conditions. Of scales, powers of k and powers of a, the ones above lose least of each condition's best
accuracy: 0.5 points in the mean. The best α/s at one shot was 0.4 to 1.1 with the classifiers as they are (78% and
89%), 0.7 to 1.3 at 40 to 60%, and 1.3 to 25 at chance. Fitted on the digits alone, the formula loses 0.6 points on the
photos; fitted on the photos alone, 2.4 points on the digits. β matters less: at one shot, the best accuracy over α was
within half a point of the highest at β = 6 and at β = 12 alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from cafo.cache import count_correct

SCALE, SHOTS_POWER, ACCURACY_POWER = 0.5, 0.5, 1.0
BETA = 6.0

_SMALLEST_RATIO = 1e-3
_WITHOUT_ZERO_SHOT = 50.0
"""α₀/s that leaving p_ZS out stands for"""


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The expected α and β of one problem. Each is expected within a factor of e (one standard deviation)."""

    alpha: float
    beta: float
    scale: float
    """s: the standard deviation of the baseline over the classes, the unit of α"""

    def penalty(self, alpha: float, beta: float, *, zero_shot: bool = True) -> float:
        """Return the negative log-density of α and β, up to a constant, in nats.

        Args:
            alpha, beta: the values.
            zero_shot: whether the logits have p_ZS; without it, α has no meaning and counts as very large.
        """
        alpha = alpha if zero_shot else _WITHOUT_ZERO_SHOT * self.scale
        ratios = (alpha / self.alpha, beta / self.beta)
        return sum(0.5 * math.log(max(ratio, _SMALLEST_RATIO)) ** 2 for ratio in ratios)


def expect(zero_shot: Tensor, labels: Tensor, keys_per_class: float) -> Prior:
    """Return the expected α and β of a cache.

    Args:
        zero_shot: p_ZS of labelled images, (B, N).
        labels: (B,) int64.
        keys_per_class: mean number of keys of a class.
    """
    return expect_from(count_correct(zero_shot, labels), zero_shot.float().std(dim=-1), keys_per_class)


def expect_from(correct: int, deviation: Tensor, keys_per_class: float) -> Prior:
    """Return the expected α and β of a cache, where p_ZS has been read before.

    Args:
        correct: labelled images that p_ZS alone gets right.
        deviation: the standard deviation of p_ZS over the classes, of each labelled image: (B,).
        keys_per_class: as for `expect`.
    """
    images = len(deviation)
    share = (correct + 1) / (images + 2)
    scale = max(float(deviation.mean()), 1e-12) if images else 1.0
    factor = SCALE * max(keys_per_class, 1.0) ** SHOTS_POWER / share**ACCURACY_POWER
    return Prior(alpha=factor * scale, beta=BETA, scale=scale)
