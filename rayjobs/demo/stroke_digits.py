"""The demo's image generator: digits as a pen writes them, from a few points that no two hands put in one place.

It knows how digits are written, and no scan: a stand-in for a text-to-image model, whose pictures cafo-generate finds
in a folder.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from rayjobs.demo.digits import save_picture
from rayjobs.demo.font_digits import LEVELS, RASTER, fitted, pictures
from rayjobs.demo.notes import NAMES

Point = tuple[float, float]
Stroke = tuple[Point, ...]
"""Points that the pen passes on a smooth line, x to the right and y down, in a box of 1 × 1."""

_LOOP = ((0.5, 0.0), (0.1, 0.25), (0.1, 0.7), (0.5, 1.0), (0.9, 0.7), (0.9, 0.25), (0.5, 0.0))
_THREE = ((0.2, 0.1), (0.6, 0.0), (0.8, 0.2), (0.4, 0.45), (0.85, 0.7), (0.6, 0.98), (0.1, 0.9))
_BELLY = ((0.25, 0.0), (0.2, 0.45), (0.6, 0.4), (0.85, 0.7), (0.55, 1.0), (0.15, 0.9))
_SEVEN = ((0.1, 0.05), (0.5, 0.05), (0.85, 0.05), (0.6, 0.5), (0.4, 1.0))
_HEAD = ((0.8, 0.15), (0.45, 0.0), (0.2, 0.2), (0.45, 0.45), (0.8, 0.2))

WRITINGS: dict[str, tuple[tuple[Stroke, ...], ...]] = {
    "zero": ((_LOOP,),),
    "one": (
        (((0.5, 0.0), (0.5, 1.0)),),
        (((0.2, 0.3), (0.55, 0.0)), ((0.55, 0.0), (0.55, 1.0))),
        (((0.25, 0.25), (0.5, 0.0)), ((0.5, 0.0), (0.5, 1.0)), ((0.15, 1.0), (0.85, 1.0))),
    ),
    "two": (
        (((0.15, 0.2), (0.5, 0.0), (0.8, 0.25), (0.55, 0.6), (0.15, 1.0)), ((0.15, 1.0), (0.9, 0.97))),
        (((0.15, 0.2), (0.5, 0.0), (0.75, 0.3), (0.3, 0.9), (0.2, 0.8), (0.5, 0.85), (0.9, 1.0)),),
    ),
    "three": ((_THREE,), (((0.2, 0.03), (0.8, 0.03)), ((0.8, 0.03), (0.45, 0.4), (0.85, 0.7), (0.6, 1.0), (0.1, 0.9)))),
    "four": (
        (((0.35, 0.0), (0.1, 0.6)), ((0.1, 0.6), (0.9, 0.55)), ((0.65, 0.25), (0.55, 1.0))),
        (((0.6, 0.0), (0.05, 0.65)), ((0.05, 0.65), (0.95, 0.65)), ((0.6, 0.0), (0.6, 1.0))),
    ),
    "five": ((_BELLY, ((0.25, 0.02), (0.85, 0.02))),),
    "six": ((((0.65, 0.0), (0.25, 0.4), (0.15, 0.75), (0.5, 1.0), (0.85, 0.75), (0.5, 0.52), (0.2, 0.75)),),),
    "seven": ((_SEVEN,), (_SEVEN, ((0.25, 0.5), (0.85, 0.48)))),
    "eight": (
        (((0.75, 0.1), (0.4, 0.0), (0.25, 0.25), (0.7, 0.65), (0.5, 1.0), (0.2, 0.75), (0.75, 0.3), (0.75, 0.1)),),
    ),
    "nine": (
        (_HEAD, ((0.8, 0.2), (0.8, 0.6), (0.65, 1.0))),
        (_HEAD, ((0.8, 0.2), (0.85, 0.65), (0.6, 1.0), (0.15, 0.9))),
    ),
}
"""The ways in which each digit is written."""

_PAGE = 128


def write_drawings(folder: Path, count: int, seed: int) -> None:
    """`count` pictures of each digit, in a folder of its name."""
    dice = random.Random(seed)
    for name in NAMES:
        for number in range(count):
            save_picture(drawing(name, dice), folder / name / f"{number:03d}.png")


def drawing(name: str, dice: random.Random) -> torch.Tensor:
    """One picture (S, S) of 0 to 1."""
    page = Image.new("L", (_PAGE, _PAGE))
    pen, ink = ImageDraw.Draw(page), round(_PAGE * dice.uniform(0.05, 0.1))
    slant, narrow = dice.uniform(-0.25, 0.15), dice.uniform(0.45, 0.8)
    for stroke in dice.choice(WRITINGS[name]):
        points = [(x + dice.gauss(0, 0.05), y + dice.gauss(0, 0.05)) for x, y in stroke]
        line = [(64 + 80 * ((x - 0.5) * narrow + slant * (y - 0.5)), 24 + 80 * y) for x, y in _smooth(points)]
        pen.line(line, fill=255, width=ink, joint="curve")
        for x, y in (line[0], line[-1]):
            pen.ellipse((x - ink / 2, y - ink / 2, x + ink / 2, y + ink / 2), fill=255)
    small = torch.from_numpy(np.asarray(fitted(page, 6 * RASTER), np.float32) / 255)
    counts = small.reshape(RASTER, 6, RASTER, 6).mean(dim=(1, 3)) * dice.uniform(1.0, 1.4)
    return pictures((counts.clamp(0, 1) * LEVELS).round()[None])[0]


def _smooth(points: list[Point]) -> list[Point]:
    """A Catmull-Rom curve through all points."""
    known = np.array([points[0], *points, points[-1]])
    curve = [points[0]]
    for before, start, end, after in zip(known, known[1:], known[2:], known[3:], strict=False):
        for t in np.linspace(0.1, 1, 10):
            straight, turning = end - before, 2 * before - 5 * start + 4 * end - after
            x, y = start + 0.5 * t * (straight + t * (turning + t * (3 * (start - end) + after - before)))
            curve.append((float(x), float(y)))
    return curve
