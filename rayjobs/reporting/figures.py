"""Save matplotlib figures as PNG for people and as SVG for the report."""

import html
from pathlib import Path
from typing import TYPE_CHECKING

from rayjobs.reporting import plots
from rayjobs.storage.files import atomic_path, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
import io
from typing import TYPE_CHECKING


def save_plot(path: Path, title: str, figure: "Figure") -> None:
    """Writes a figure twice under its title: `path`, a PNG to show, and an SVG beside it for the report.

    A name that ends in a number, as `classes-03.png`, is of one of several things of a kind; the report folds all but
    the first, 00, under what their titles have before the last colon.
    """
    drawn = figure_svg(figure)
    start = drawn.index(">") + 1
    write_text(path.with_suffix(".svg"), f"{drawn[:start]}<title>{html.escape(title)}</title>{drawn[start:]}")
    figure.suptitle(plots.plain_text(title))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def figure_svg(figure: "Figure") -> str:
    """A matplotlib figure as SVG that takes on the page's own colours for text, lines and ground."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rayjobs"}):
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", dpi=200, metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :].replace("#000000", "currentColor").replace("#ffffff", "var(--page)")
