"""Save matplotlib figures: a PNG to look at, an SVG for the report, and their titles in `figures.json`."""

import html
import io
import re
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayjobs.errors import DataError
from rayjobs.reporting.canvas import FONT, every_script, plain_text
from rayjobs.reporting.palette import themed
from rayjobs.reporting.plots import Drawing
from rayjobs.storage.files import atomic_path, read_json, write_json, write_text
from rayjobs.storage.paths import inside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANIFEST = "figures.json"


@dataclass(frozen=True, kw_only=True)
class SavedFigure:
    """One entry of `figures.json`, which lists a folder's figures in the order of the report."""

    file: str
    """Name of the SVG."""
    title: str
    caption: str = ""
    """Sentences below the figure: what is drawn, of how many images and seeds."""
    group: str = ""
    """Subject of several figures, such as one trial; it comes before the title."""
    folded: bool = False
    """True to show the figure only when the reader opens its group."""

    @property
    def full_title(self) -> str:
        return f"{self.group}: {self.title}" if self.group else self.title


def save_plot(path: Path, title: str, drawing: Drawing, *, group: str = "", folded: bool = False) -> None:
    """Write a figure to `path`, a PNG, and as an SVG beside it, and enter it into the folder's `figures.json`."""
    saved = SavedFigure(file=f"{path.stem}.svg", title=title, caption=drawing.caption, group=group, folded=folded)
    _add_figure(path.parent, saved, figure_svg(drawing.figure, saved.full_title))
    heading = "\n".join(textwrap.wrap(saved.full_title, 64))
    drawing.figure.suptitle(plain_text(heading), fontsize=FONT)
    with every_script(drawing.figure), atomic_path(path) as temporary:
        drawing.figure.savefig(temporary, format="png", dpi=200)


def read_figures(folder: Path) -> list[SavedFigure]:
    """The figures of a folder, in the order in which they were first saved; none without `figures.json`.

    Raises DataError for a `figures.json` that is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return []
    try:
        saved = [SavedFigure(**entry) for entry in read_json(path)]
        for figure in saved:
            inside(folder, figure.file)
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path} is no list of figures: {error}") from error
    return saved


def unlisted_figures(folder: Path) -> list[SavedFigure]:
    """The SVGs of a folder without `figures.json`, as earlier releases left them, in the order of their names."""
    if not folder.is_dir() or (folder / MANIFEST).is_file():
        return []
    files = sorted(path for path in folder.iterdir() if path.suffix == ".svg")
    return [SavedFigure(file=path.name, title=_own_title(path)) for path in files]


def _own_title(path: Path) -> str:
    """The title within an SVG that `save_plot` wrote, or the file's name."""
    title = re.search(r"<title>(.*?)</title>", path.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    return html.unescape(title[1]) if title else path.stem


def copy_figure(source: Path, saved: SavedFigure, target: Path) -> None:
    """Copy the SVG of a figure to another folder, and enter it there."""
    _add_figure(target, saved, (source / saved.file).read_text(encoding="utf-8"))


def _add_figure(folder: Path, saved: SavedFigure, drawing: str) -> None:
    write_text(folder / saved.file, drawing)
    entries = {entry.file: entry for entry in read_figures(folder)}
    entries[saved.file] = saved
    write_json(folder / MANIFEST, [asdict(entry) for entry in entries.values()])


def figure_svg(figure: "Figure", title: str) -> str:
    """A matplotlib figure as SVG whose text, lines and ground take the colours of the page.

    title: names the figure to those who do not see it, and keeps its ids apart from those of others on the page.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}), every_script(figure):
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", dpi=200, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = themed(drawing[drawing.index("<svg") :])
    start = drawing.index(">") + 1
    return f"{drawing[:start]}<title>{html.escape(title)}</title>{drawing[start:]}"
