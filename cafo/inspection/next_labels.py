"""Choose the images of an unlabelled set that are worth labelling next: uncertain ones that differ from one another.

Images are taken one after the other, each time the one with the largest product of two factors:

- its uncertainty: 1 less the difference of its two largest probabilities, or the entropy of all of them;
- its distance, 1 - cosine, from the nearest image that was taken before, and from the nearest labelled one.

Without the second factor, ten copies of one hard image would be the first ten. With several encoders the cosine is the
mean of theirs.

Legend: n unlabelled images, M labelled ones, N classes, C width of a source's features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cafo.errors import CafoError

Uncertainty = Literal["margin", "entropy"]

_ROWS_AT_ONCE = 4096


class NextLabel(NamedTuple):
    """An image that is worth labelling."""

    image: int
    label: int
    """the likeliest class"""
    rival: int
    """the second most likely class"""
    probability: float
    """of the likeliest class"""
    uncertainty: float
    cosine: float
    """to the nearest image that was labelled or taken before; 0 if there is none"""


@torch.no_grad()
def choose_next_labels(
    probabilities: Tensor,
    features: Mapping[str, Tensor],
    count: int,
    *,
    labelled: Mapping[str, Tensor] | None = None,
    by: Uncertainty = "margin",
) -> list[NextLabel]:
    """Return the images to label next, the most useful first.

    Args:
        probabilities: (n, N), best calibrated: `cafo.calibration.Calibration.probabilities`.
        features: {source: (n, C)}.
        count: the number of images to take; all if there are fewer.
        labelled: {source: (M, C)}, features of the labelled images, such as a cache's keys; None for none.
        by: the measure of uncertainty.

    Raises:
        CafoError: fewer than two classes, an unknown measure, or labelled images without one of the sources.
    """
    if by not in get_args(Uncertainty):
        raise CafoError(f"uncertainty is measured by {' or '.join(get_args(Uncertainty))}, not by {by!r}")
    if probabilities.shape[1] < 2:
        raise CafoError("an image is uncertain between two classes or more, and there is one")
    top = probabilities.topk(2, dim=1)
    if by == "margin":
        uncertainty = 1 - (top.values[:, 0] - top.values[:, 1])
    else:
        uncertainty = torch.special.entr(probabilities).sum(dim=1)
    unit = {name: F.normalize(f.float(), dim=1) for name, f in features.items()}
    nearest = _nearest(unit, labelled)
    taken: list[NextLabel] = []
    left = torch.ones(len(probabilities), dtype=torch.bool, device=probabilities.device)
    for _ in range(min(count, len(probabilities))):
        worth = (uncertainty * (1 - nearest.nan_to_num(nan=0.0)).clamp_min(0)).masked_fill(~left, -1)
        image = int(worth.argmax())
        label, rival = top.indices[image].tolist()
        known = 0.0 if nearest[image].isnan() else float(nearest[image])
        taken.append(NextLabel(image, label, rival, float(top.values[image, 0]), float(uncertainty[image]), known))
        left[image] = False
        nearest = torch.fmax(
            nearest, _mean_cosine(unit, {name: f[image : image + 1] for name, f in unit.items()})[:, 0]
        )
    return taken


def _nearest(unit: Mapping[str, Tensor], labelled: Mapping[str, Tensor] | None) -> Tensor:
    """Return the cosine of each image to the nearest labelled one, (n,); NaN if there is none."""
    values = next(iter(unit.values()))
    nearest = values.new_full((len(values),), torch.nan)
    if labelled is None:
        return nearest
    if missing := set(unit) - set(labelled):
        raise CafoError(f"the labelled images lack features of {', '.join(sorted(missing))}")
    known = {name: F.normalize(labelled[name].float(), dim=1) for name in unit}
    if not len(next(iter(known.values()))):
        return nearest
    for start in range(0, len(values), _ROWS_AT_ONCE):
        block = {name: f[start : start + _ROWS_AT_ONCE] for name, f in unit.items()}
        nearest[start : start + _ROWS_AT_ONCE] = _mean_cosine(block, known).amax(dim=1)
    return nearest


def _mean_cosine(unit: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([f @ others[name].T for name, f in unit.items()]).mean(dim=0)
