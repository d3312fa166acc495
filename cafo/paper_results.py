"""Accuracies that the CaFo paper (arXiv 2303.02151) and its rivals' authors report, in percent, for tables beside
measured ones."""

from __future__ import annotations

from collections.abc import Mapping

SHOTS = (1, 2, 4, 8, 16)
"""K, the columns of `RN50`."""

RN50: Mapping[str, tuple[float, ...]] = {
    "imagenet": (63.80, 64.34, 65.64, 66.86, 68.79),
    "stanford_cars": (61.98, 63.36, 65.69, 70.31, 76.73),
    "ucf101": (68.60, 70.45, 72.96, 78.06, 79.94),
    "caltech101": (91.85, 92.37, 93.14, 93.83, 94.60),
    "oxford_flowers": (80.88, 84.94, 90.95, 92.98, 95.86),
    "sun397": (64.89, 66.81, 69.17, 70.34, 72.60),
    "dtd": (53.43, 56.32, 60.99, 66.19, 69.62),
    "eurosat": (69.00, 72.86, 83.90, 86.48, 88.68),
    "fgvc_aircraft": (24.96, 26.04, 32.94, 40.38, 49.05),
    "oxford_pets": (89.21, 89.10, 90.11, 90.52, 91.55),
    "food101": (77.99, 78.10, 78.32, 78.84, 79.30),
}
"""Accuracy of CLIP RN50 with DINO ResNet-50 on each data set, at `SHOTS`."""

IMAGENET_ZERO_SHOT = 62.99
"""Accuracy of RN50 on ImageNet with generated images only."""

IMAGENET_16_SHOT: Mapping[str, float] = {"RN50": 68.79, "RN101": 70.86, "ViT-B-32": 70.82, "ViT-B-16": 74.48}
"""Accuracy at 16 shots by CLIP encoder; training takes ten minutes on one A100."""

CASCADE_SHOTS = (1, 4, 16)
"""K, the columns of `IMAGENET_CASCADE`."""

IMAGENET_CASCADE: Mapping[str, tuple[float, float, float]] = {
    "CLIP cache": (61.32, 62.52, 65.51),
    "DINO cache": (34.14, 40.47, 53.27),
    "CLIP + DINO": (61.39, 63.96, 68.08),
    "CLIP + DINO + DALL-E": (63.24, 65.23, 68.42),
    "CLIP + DINO + GPT-3": (62.32, 64.64, 68.51),
    "all": (63.80, 65.64, 68.79),
}
"""Accuracy of RN50 on ImageNet by what is combined, at `CASCADE_SHOTS`."""


RIVALS_RN50: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "Tip-Adapter": {
        "caltech101": (87.18, 88.44, 89.39, 89.83, 90.18),
        "dtd": (46.22, 49.47, 53.96, 58.63, 60.93),
        "eurosat": (54.38, 61.68, 65.32, 67.95, 70.54),
    },
    "Tip-Adapter-F": {
        "caltech101": (89.33, 89.74, 90.56, 91.44, 92.86),
        "dtd": (49.65, 53.72, 57.39, 62.71, 66.55),
        "eurosat": (59.53, 66.15, 74.12, 77.93, 84.54),
    },
    "APE": {
        "caltech101": (90.47, 90.99, 91.81, 91.93, 92.49),
        "dtd": (52.66, 58.63, 60.70, 66.08, 67.73),
        "eurosat": (59.79, 62.86, 70.33, 74.51, 78.16),
    },
    "APE-T": {
        "caltech101": (90.47, 90.79, 91.67, 93.02, 93.14),
        "dtd": (54.61, 58.81, 65.48, 67.02, 69.66),
        "eurosat": (65.85, 71.62, 74.72, 80.73, 86.70),
    },
    "GDA": {
        "caltech101": (87.28, 88.63, 90.62, 91.35, 92.55),
        "dtd": (46.26, 51.26, 57.47, 62.77, 66.51),
        "eurosat": (58.30, 67.88, 75.40, 81.70, 86.12),
    },
    "TIMO": {
        "caltech101": (90.34, 90.85, 91.47, 92.63, 93.06),
        "dtd": (54.35, 55.91, 60.54, 65.43, 68.68),
        "eurosat": (63.92, 67.09, 75.76, 80.87, 86.09),
    },
    "TIMO-S": {
        "caltech101": (90.26, 91.10, 91.76, 92.81, 93.29),
        "dtd": (54.39, 57.57, 60.86, 65.35, 68.64),
        "eurosat": (64.42, 68.63, 76.01, 80.99, 86.22),
    },
}
"""Accuracy of the rivals with CLIP RN50 on some data sets, at `SHOTS`, from the logs of their authors' repositories."""

RIVALS_CHOSE_ON: Mapping[str, str] = {"Tip-Adapter-F": "all of val, the epoch on test"}
"""Images that the authors chose hyperparameters on, where they are not the whole validation split alone."""


def cascade_row(*, clip: bool, dino: bool, generated: bool, sentences: bool) -> str:
    """Return the row of `IMAGENET_CASCADE` for a combination of sources; empty if the paper has no such row."""
    if clip and dino:
        parts = ["CLIP + DINO", *["DALL-E"] * generated, *["GPT-3"] * sentences]
        return "all" if len(parts) == 3 else " + ".join(parts)
    if generated or sentences or not (clip or dino):
        return ""
    return "CLIP cache" if clip else "DINO cache"


SHIFT: Mapping[str, float] = {"imagenet_v2": 57.99, "imagenet_sketch": 39.43}
"""Accuracy of RN50 on shifted test sets, with a cache made on ImageNet at 16 shots."""
