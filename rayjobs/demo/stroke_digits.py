"""The demo's image generator: digits drawn as strokes through a few randomly moved points.

It takes the place of a text-to-image model: cafo-generate reads its images from a folder. It has the shapes of written
digits, but no scan.
"""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from rayjobs.demo.digits import save_image
from rayjobs.demo.font_digits import LEVELS, RASTER, crop_to_square, enlarge
from rayjobs.demo.notes import NAMES

Point = tuple[float, float]
Stroke = tuple[Point, ...]
"""Points on a smooth line, x to the right and y down, in a box of 1 × 1."""

_LOOP = ((0.5, 0.0), (0.1, 0.25), (0.1, 0.7), (0.5, 1.0), (0.9, 0.7), (0.9, 0.25), (0.5, 0.0))
_THREE = ((0.2, 0.1), (0.6, 0.0), (0.8, 0.2), (0.4, 0.45), (0.85, 0.7), (0.6, 0.98), (0.1, 0.9))
_BELLY = ((0.25, 0.0), (0.2, 0.45), (0.6, 0.4), (0.85, 0.7), (0.55, 1.0), (0.15, 0.9))
_SEVEN = ((0.1, 0.05), (0.5, 0.05), (0.85, 0.05), (0.6, 0.5), (0.4, 1.0))
_HEAD = ((0.8, 0.15), (0.45, 0.0), (0.2, 0.2), (0.45, 0.45), (0.8, 0.2))

VARIANTS: dict[str, tuple[tuple[Stroke, ...], ...]] = {
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
"""Each digit's variants, each a tuple of strokes."""

_PAGE = 128
"""Side of the page in pixels."""


def write_drawings(folder: Path, count: int, seed: int) -> None:
    """Write `count` images of each digit into a folder with its name."""
    rng = random.Random(seed)
    for name in NAMES:
        for number in range(count):
            save_image(draw_digit(name, rng), folder / name / f"{number:03d}.png")


def draw_digit(name: str, rng: random.Random) -> torch.Tensor:
    """An image (S, S) from 0 to 1."""
    page = Image.new("L", (_PAGE, _PAGE))
    canvas, width = ImageDraw.Draw(page), round(_PAGE * rng.uniform(0.05, 0.1))
    slant, narrowing = rng.uniform(-0.25, 0.15), rng.uniform(0.45, 0.8)
    for stroke in rng.choice(VARIANTS[name]):
        points = [(x + rng.gauss(0, 0.05), y + rng.gauss(0, 0.05)) for x, y in stroke]
        line = [(64 + 80 * ((x - 0.5) * narrowing + slant * (y - 0.5)), 24 + 80 * y) for x, y in _smooth(points)]
        canvas.line(line, fill=255, width=width, joint="curve")
        for x, y in (line[0], line[-1]):
            canvas.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    small = torch.from_numpy(np.asarray(crop_to_square(page, 6 * RASTER), np.float32) / 255)
    levels = small.reshape(RASTER, 6, RASTER, 6).mean(dim=(1, 3)) * rng.uniform(1.0, 1.4)
    return enlarge((levels.clamp(0, 1) * LEVELS).round()[None])[0]


def _smooth(points: list[Point]) -> list[Point]:
    """Points of a Catmull-Rom curve through all points."""
    known = np.array([points[0], *points, points[-1]])
    curve = [points[0]]
    for before, start, end, after in zip(known, known[1:], known[2:], known[3:], strict=False):
        for t in np.linspace(0.1, 1, 10):
            straight, turning = end - before, 2 * before - 5 * start + 4 * end - after
            x, y = start + 0.5 * t * (straight + t * (turning + t * (3 * (start - end) + after - before)))
            curve.append((float(x), float(y)))
    return curve
