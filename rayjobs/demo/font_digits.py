"""Printed digits, rendered from the fonts that come with matplotlib, on which the demo's CLIP is trained.

The handwritten scans are 8 × 8 grids of grey levels. Printed digits are reduced to the same grid, so that scans differ
from them in the style of writing only.

Legend: B images, S side of an image in pixels.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

RASTER, LEVELS, SIDE = 8, 16, 32
"""Side of a scan and its number of grey levels; S of an image that is made from a scan."""

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"),
)
"""matplotlib's fonts that have digits; some others show boxes or brackets in their place."""

_GLYPH = 48
"""Side of a rendered glyph in pixels."""


def render_fonts() -> Tensor:
    """Every digit in every font: (fonts, 10, 48, 48) from 0 to 1, as high as its square and centred in it."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    glyphs = [[_render(folder / f"{font}.ttf", str(digit)) for digit in range(10)] for font in FONTS]
    return torch.from_numpy(np.array(glyphs, np.float32) / 255)


def _render(font: Path, digit: str) -> np.ndarray:
    page = Image.new("L", (128, 128))
    ImageDraw.Draw(page).text((64, 64), digit, fill=255, font=ImageFont.truetype(font, 80), anchor="mm")
    return np.asarray(crop_to_square(page, _GLYPH))


def crop_to_square(page: Image.Image, side: int) -> Image.Image:
    """The drawing on a page, scaled to the height of a square and centred in it."""
    drawing = page.crop(page.getbbox())
    width = min(side, max(1, round(side * drawing.width / drawing.height)))
    square = Image.new("L", (side, side))
    square.paste(drawing.resize((width, side), Image.Resampling.BILINEAR), ((side - width) // 2, 0))
    return square


def printed_digits(glyphs: Tensor, digits: Tensor, rng: torch.Generator) -> Tensor:
    """Images (B, S, S) of the digits (B,) in random fonts: distorted, thickened, and with noise."""
    fonts = torch.randint(len(glyphs), (len(digits),), generator=rng)
    ink = distort(
        glyphs[fonts, digits],
        rng,
        turn=0.25,
        slant=(-0.4, 0.3),
        width=(0.9, 1.6),
        height=(0.95, 1.2),
        move=(0.15, 0.08),
        wobble=0.15,
    )
    bold = F.max_pool2d(ink, 5, stride=1, padding=2)
    ink = torch.lerp(ink, bold, torch.rand(len(ink), 1, 1, generator=rng))
    levels = F.avg_pool2d(ink, _GLYPH // RASTER) * (torch.rand(len(ink), 1, 1, generator=rng) * 0.5 + 0.9)
    levels = levels + 0.06 * torch.randn(levels.shape, generator=rng)
    return enlarge((levels.clamp(0, 1) * LEVELS).round())


def distort(
    images: Tensor,
    rng: torch.Generator,
    *,
    turn: float,
    slant: tuple[float, float],
    width: tuple[float, float],
    height: tuple[float, float],
    move: tuple[float, float],
    wobble: float,
) -> Tensor:
    """Distort each image (B, S, S) by its own random map, as if another hand had written it.

    Args:
        turn: largest rotation either way, in radians.
        slant: range of the horizontal shear per unit of height.
        width, height: ranges of the factors on the sampling grid; more than 1 makes the drawing smaller.
        move: largest horizontal and vertical shift either way, in half sides.
        wobble: standard deviation of a smooth displacement field, in half sides.
    """
    count, side = images.shape[:2]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=rng) * (high - low) + low

    angle, lean, wide, high = uniform(-turn, turn), uniform(*slant), uniform(*width), uniform(*height)
    rows = [
        torch.stack([angle.cos() * wide, (lean - angle.sin()) * wide, uniform(-move[0], move[0])], dim=1),
        torch.stack([angle.sin() * high, angle.cos() * high, uniform(-move[1], move[1])], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, side, side], align_corners=False)
    field = wobble * torch.randn(count, 2, 3, 3, generator=rng)
    field = F.interpolate(field, size=(side, side), mode="bicubic", align_corners=True)
    return F.grid_sample(images[:, None], grid + field.permute(0, 2, 3, 1), align_corners=False)[:, 0]


def enlarge(levels: Tensor) -> Tensor:
    """Scans (B, 8, 8) with grey levels from 0 to 16, enlarged bicubically to images (B, S, S) from 0 to 1."""
    smooth = F.interpolate(levels[:, None] / LEVELS, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return smooth[:, 0].clamp(0, 1)
