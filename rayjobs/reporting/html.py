"""One self-contained HTML page of tables, plots and images: no network, light and dark, readable on a phone.

A page may hold other pages, such as the reports of a run's steps, so that one file can be sent to others.
"""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rayjobs.reporting import palette
from rayjobs.storage.files import write_text

TEMPLATE = "page.html.jinja"
PHONE_CHARS, DESK_CHARS = 36, 108
"""Characters of a table's line that fit on a phone and on a desk."""
TOKEN = 16
"""Longest word that is never broken; a path breaks after its separators."""
LONG_TABLE = 25
"""Rows up to which a table is shown whole; a longer one scrolls under its header."""


@dataclass(frozen=True)
class Table:
    """Rows of text; a table without column names has no header. The first cell of a row is the row's header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    bad_rows: frozenset[int] = frozenset()
    """Numbers of rows that tell of a failure and are red."""
    kind: str = field(default="table", init=False)

    @cached_property
    def layout(self) -> Literal["grid", "cards on phones", "cards"]:
        """The narrowest screen decides: a row becomes a card where the columns do not fit beside one another."""
        lines = [self.columns, *self.rows]
        widths = [max((_needed(row[i]) for row in lines if i < len(row)), default=0) for i in range(len(self.columns))]
        needed = sum(widths) + 2.5 * len(widths)
        return "grid" if needed <= PHONE_CHARS else "cards on phones" if needed <= DESK_CHARS else "cards"

    @property
    def long(self) -> bool:
        """True if the table is too long to be shown whole."""
        return len(self.rows) > LONG_TABLE


@dataclass(frozen=True)
class Plot:
    """A figure as SVG, with its caption."""

    title: str
    svg: str
    note: str = ""
    kind: str = field(default="plot", init=False)

    @property
    def drawing(self) -> Markup:
        """The SVG with a description for those who do not see it."""
        label = html.escape(" ".join(filter(None, (f"{self.title}.", self.note))))
        return Markup(self.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


@dataclass(frozen=True)
class Gallery:
    """Images with their captions; an image is the content of a PNG or JPEG file."""

    title: str
    images: Sequence[tuple[bytes, str]]
    note: str = ""
    wide: bool = False
    """The images are twice as wide as high, such as pairs."""
    kind: str = field(default="gallery", init=False)

    @property
    def sources(self) -> list[tuple[str, str]]:
        """(data URL, caption) of each image."""
        return [(_data_url(image), caption) for image, caption in self.images]


@dataclass(frozen=True)
class Fold:
    """Sections that the reader can open."""

    title: str
    sections: Sequence["Section"]
    kind: str = field(default="fold", init=False)


Section = Table | Plot | Gallery | Fold


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that a page says."""

    title: str
    headline: str = ""
    failure: str = ""
    """The reason why a run failed, which the page begins with."""
    facts: Sequence[str] = ()
    """Short texts below the headline."""
    command: str = ""
    """The command line of the run."""
    about: str = ""
    """A paragraph before the sections."""
    sections: Sequence[Section] = ()
    steps: Sequence["Page"] = ()
    """Pages of the run's steps, which are folded behind the sections."""


def write_page(path: Path, page: Page) -> Path:
    """Write the page to `path` and return it."""
    environment = Environment(
        loader=PackageLoader("rayjobs.reporting", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["cell"] = _cell
    text = environment.get_template(TEMPLATE).render(page=page, colours=Markup(palette.css()))
    write_text(path, text.encode(errors="replace").decode())  # a run's files may hold half a surrogate pair
    return path


def _data_url(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _cell(text: str) -> Markup:
    """Text that breaks between words, but not in `mean ± deviation` and `[low, high]`; long words break too."""
    return Markup("").join(map(_word, re.split(r"(\s)", _unbroken(text))))


def _word(word: str) -> Markup:
    """A word that stays whole, also at a hyphen, where a browser would break it; a long one may break."""
    if len(word) > TOKEN:
        return _breakable(word)
    return Markup('<span class="word">{}</span>').format(word) if "-" in word else escape(word)


def _unbroken(text: str) -> str:
    text = text.replace(" ± ", "\u00a0±\u00a0")
    return re.sub(r"\[[-+\d.]+, [-+\d.]+\]", lambda found: found[0].replace(" ", "\u00a0"), text)


def _breakable(word: str) -> Markup:
    """A long word that may break after separators, or anywhere if its parts are long too."""
    parts = [part for part in re.split(r"(?<=[/._,=:&?-])", word) if part]
    pieces = [part[i : i + TOKEN] for part in parts for i in range(0, len(part), TOKEN)]
    return Markup("<wbr>").join(pieces)


def _needed(text: str) -> int:
    """The characters that a column needs for a cell: its longest word, and room for a few words of a text."""
    words = [piece for word in re.split(r"\s", _unbroken(text)) for piece in str(_breakable(word)).split("<wbr>")]
    return max(min(len(text), 14), *map(len, words))
