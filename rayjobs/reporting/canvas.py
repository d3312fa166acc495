"""Matplotlib figures in this project's style: small enough for a phone, named at the lines instead of in legends.

A figure is as wide as a phone's screen; on a desk the page enlarges it, text included.
"""

import logging
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import NamedTuple
from warnings import catch_warnings, filterwarnings

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

WIDTH = 4.6
"""Width of a figure in inches."""
FONT = 8
"""Size of text in points."""
LABEL_CHARS = 19
"""Characters of a line of a label beside the axes."""
LINE_HEIGHT = 0.125
"""Height of a line of text in inches."""
MARGINS = 0.75
"""Height in inches that a figure needs besides its axes."""


class LineEnd(NamedTuple):
    """The last point of a line, in data coordinates, with the line's name and colour."""

    x: float
    y: float
    name: str
    colour: str


def panel(x: str, y: str, *, height: float = 2.9) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, labelled `x` and `y`. The height is in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.yaxis.get_offset_text().set_fontsize(FONT)
    axes.xaxis.get_offset_text().set_fontsize(FONT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def plain_text(name: str) -> str:
    """A name that matplotlib shows as it is. It would read text between dollar signs as a formula."""
    return name.replace("$", r"\$")


def name_ends(figure: Figure, axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Write each line's name right of the axes, as near to the line's end as the other names leave room.

    The figure grows as high as the names need. Call this when the limits and scales of the axes are final.
    """
    texts = [textwrap.wrap(end.name, LABEL_CHARS) or [""] for end in ends]
    needed = sum(len(text) * LINE_HEIGHT + 0.04 for text in texts)
    figure.set_figheight(max(figure.get_figheight(), needed + MARGINS))
    height = figure.get_figheight() - MARGINS
    axes.get_xlim(), axes.get_ylim()  # settles the limits, which the transforms below read
    points = axes.transAxes.inverted().transform(axes.transData.transform([(end.x, end.y) for end in ends]))
    sizes = [(len(text) * LINE_HEIGHT + 0.04) / height for text in texts]
    places = spread([float(y) for _, y in points], sizes)
    for end, text, place in zip(ends, texts, places, strict=True):
        axes.annotate(
            plain_text("\n".join(text)),
            xy=(end.x, end.y),
            xytext=(1.06, place),
            textcoords="axes fraction",
            color=end.colour,
            fontsize=FONT,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.colour, "linewidth": 0.6, "alpha": 0.5, "relpos": (0, 0.5)},
        )


def spread(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres of intervals of these sizes that do not overlap, each as near to its height as the order allows.

    They lie within [0, 1] if the sizes add up to at most 1.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    places = dict.fromkeys(order, 0.0)
    lowest = 0.0
    for i in order:
        places[i] = max(heights[i], lowest + sizes[i] / 2)
        lowest = places[i] + sizes[i] / 2
    highest = 1.0
    for i in reversed(order):
        places[i] = min(places[i], highest - sizes[i] / 2)
        highest = places[i] - sizes[i] / 2
    return [places[i] for i in range(len(heights))]


@contextmanager
def every_script(figure: Figure) -> Iterator[None]:
    """Draw the figure with fonts that have its characters; those that no font has are boxes, without a warning.

    A browser that shows the SVG takes its own fonts.
    """
    drawn = {character for text in figure.findobj(Text) for character in text.get_text()}
    families = ["DejaVu Sans", *_other_families(frozenset(c for c in drawn if c.isprintable() and c != " "))]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    log = logging.getLogger("matplotlib.font_manager")  # tells of every font that lacks a weight
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with catch_warnings():
            filterwarnings("ignore", message=r"Glyph .* missing from")
            yield
    finally:
        log.setLevel(level)


@lru_cache
def _other_families(characters: frozenset[str]) -> tuple[str, ...]:
    """Names of installed fonts that have what DejaVu Sans lacks, the one with the most of it first."""
    lacking = {ord(character) for character in characters} - _known(font_manager.findfont("DejaVu Sans"))
    families: list[str] = []
    fonts = _installed_fonts() if lacking else []
    regular = {font.name: font.fname for font in fonts if "last resort" not in font.name.lower()}
    while lacking:
        has = {name: lacking & _known(file) for name, file in regular.items()}
        best = max(has, key=lambda name: len(has[name]), default="")
        if not best or not has[best]:
            break
        families.append(best)
        lacking -= has[best]
    return tuple(families)


def _installed_fonts() -> list[font_manager.FontEntry]:
    """All fonts, also those that were installed after matplotlib had listed them."""
    manager = font_manager.fontManager
    for file in set(font_manager.findSystemFonts()) - {font.fname for font in manager.ttflist}:
        with suppress(OSError, RuntimeError):  # no font, or of a kind that matplotlib does not read
            manager.addfont(file)
    return manager.ttflist


@lru_cache(maxsize=64)
def _known(file: str) -> frozenset[int]:
    """Code points of the characters that a font file has."""
    return frozenset(FT2Font(file).get_charmap())
