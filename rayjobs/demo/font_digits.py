"""Printed digits, rendered from the fonts that come with matplotlib: what the demo's CLIP is trained on.

The handwritten scans are 8 × 8 counts of ink. Printed digits are brought to the same raster, so that CLIP meets scans
as a new style of writing rather than as another medium.

Legend: B images, S side of a picture in pixels.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

RASTER, LEVELS, SIDE = 8, 16, 32
"""A scan's side and its levels of grey; S of a picture made of one."""

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10"),
)
"""Those with digits; others of matplotlib's claim them and show boxes or brackets."""

_MASTER = 48


def masters() -> Tensor:
    """Every digit in every font, upright: (fonts, 10, 48, 48) of 0 to 1, as high as its square and centred in it."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn = [[_master(folder / f"{font}.ttf", str(digit)) for digit in range(10)] for font in FONTS]
    return torch.from_numpy(np.array(drawn, np.float32) / 255)


def _master(font: Path, digit: str) -> np.ndarray:
    page = Image.new("L", (128, 128))
    ImageDraw.Draw(page).text((64, 64), digit, fill=255, font=ImageFont.truetype(font, 80), anchor="mm")
    return np.asarray(fitted(page, _MASTER))


def fitted(page: Image.Image, side: int) -> Image.Image:
    """What is drawn on a page, as high as its new square and centred in it."""
    cut = page.crop(page.getbbox())
    width = min(side, max(1, round(side * cut.width / cut.height)))
    square = Image.new("L", (side, side))
    square.paste(cut.resize((width, side), Image.Resampling.BILINEAR), ((side - width) // 2, 0))
    return square


def printed(masters: Tensor, digits: Tensor, dice: torch.Generator) -> Tensor:
    """Pictures (B, S, S) of the digits (B,) in random fonts, turned, slanted, stretched, bent, thickened and soiled."""
    fonts = torch.randint(len(masters), (len(digits),), generator=dice)
    ink = bent(
        masters[fonts, digits],
        dice,
        turn=0.25,
        slant=(-0.4, 0.3),
        width=(0.9, 1.6),
        height=(0.95, 1.2),
        move=(0.15, 0.08),
        wobble=0.15,
    )
    bold = F.max_pool2d(ink, 5, stride=1, padding=2)
    ink = torch.lerp(ink, bold, torch.rand(len(ink), 1, 1, generator=dice))
    counts = F.avg_pool2d(ink, _MASTER // RASTER) * (torch.rand(len(ink), 1, 1, generator=dice) * 0.5 + 0.9)
    counts = counts + 0.06 * torch.randn(counts.shape, generator=dice)
    return pictures((counts.clamp(0, 1) * LEVELS).round())


def bent(
    images: Tensor,
    dice: torch.Generator,
    *,
    turn: float,
    slant: tuple[float, float],
    width: tuple[float, float],
    height: tuple[float, float],
    move: tuple[float, float],
    wobble: float,
) -> Tensor:
    """Images (B, S, S), each under a random map of its own, as another hand would have written it.

    Args:
        turn: at most, in radians, either way.
        slant: of the uprights, per unit of height.
        width, height: what the axes are multiplied by; more than 1 makes the image smaller.
        move: at most, sideways and up or down, either way, in half sides.
        wobble: spread of a slow bending, in half sides.
    """
    count, side = images.shape[:2]

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=dice) * (high - low) + low

    angle, lean, wide, high = draw(-turn, turn), draw(*slant), draw(*width), draw(*height)
    rows = [
        torch.stack([angle.cos() * wide, (lean - angle.sin()) * wide, draw(-move[0], move[0])], dim=1),
        torch.stack([angle.sin() * high, angle.cos() * high, draw(-move[1], move[1])], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, side, side], align_corners=False)
    slow = wobble * torch.randn(count, 2, 3, 3, generator=dice)
    slow = F.interpolate(slow, size=(side, side), mode="bicubic", align_corners=True)
    return F.grid_sample(images[:, None], grid + slow.permute(0, 2, 3, 1), align_corners=False)[:, 0]


def pictures(counts: Tensor) -> Tensor:
    """Scans (B, 8, 8) with levels from 0 to 16, enlarged to (B, S, S) of 0 to 1 as an image viewer would."""
    smooth = F.interpolate(counts[:, None] / LEVELS, size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return smooth[:, 0].clamp(0, 1)
