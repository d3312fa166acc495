"""Colours of pages and figures, each for a light and for a dark page.

Figures are drawn in the light colours. In an SVG, CSS variables take their place, so that a page that shows the SVG
decides; outside a page the light ones are the fallback.
"""

import re

LINES = ("#1a6fb0", "#b35900", "#1f7a33", "#c22f3a", "#7a4fb0", "#80553f", "#b03a8a", "#0f7580")
"""Colours of lines and bars, in the order of use."""
GREY = "#6b7078"
"""Colour of what the lines are compared with."""
INK, PAGE = "#000000", "#ffffff"
"""Colours of text and of the ground."""
ON_MAP = ("#fdfdfd", "#141414")
"""Colours of text on a dark and on a light spot of a map, which looks the same on every page."""

_DARK_LINES = ("#6cb2eb", "#ffa04d", "#6fd083", "#ff8088", "#b99be6", "#cfa18b", "#f29bd0", "#5fd0d8")
_PAGE = {
    "page": (PAGE, "#15171a"),
    "text": ("#1c2024", "#e6e8eb"),
    "quiet": ("#60646c", "#9ba1a8"),
    "line": ("#e0e1e6", "#2f343a"),
    "band": ("#f6f7f9", "#1d2024"),
    "accent": (LINES[0], _DARK_LINES[0]),
    "bad": ("#b3261e", "#ff8a80"),
    "grey": (GREY, "#9ba1a8"),
}
_VARIABLES = {**_PAGE, **{f"c{i}": pair for i, pair in enumerate(zip(LINES, _DARK_LINES, strict=True))}}


def css() -> str:
    """The style rules that set all variables, `--page`, `--text`, `--c0` and so on, by the reader's colour scheme."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in _VARIABLES.items()) for i in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def themed(drawing: str) -> str:
    """An SVG whose colours are the page's: text and axes take the text's, the ground and all lines their variables."""
    names = {PAGE: "page", GREY: "grey", **{colour: f"c{i}" for i, colour in enumerate(LINES)}}

    def variable(found: re.Match[str]) -> str:
        colour = found[0].lower()
        return "currentColor" if colour == INK else f"var(--{names[colour]}, {colour})"

    return re.sub("|".join([INK, *names]), variable, drawing, flags=re.IGNORECASE)
