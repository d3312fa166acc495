"""One self-contained HTML page of tables, plots and images: no network, light and dark, readable on a phone."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from rayjobs.storage.files import write_text

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Table:
    """Rows of text; a table without column names has no header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    linked: str = ""
    """The column whose cells are addresses of pages."""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Plot:
    """A figure as SVG."""

    title: str
    svg: str
    note: str = ""
    kind: str = field(default="plot", init=False)


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


def _data_url(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _unbroken_deviation(text: str) -> str:
    """Text whose `mean ± deviation` stays on one line."""
    return text.replace(" ± ", "\u00a0±\u00a0")


def write_page(
    path: Path,
    title: str,
    headline: str,
    facts: Sequence[str],
    sections: Sequence[Section],
    *,
    command: str = "",
    about: str = "",
) -> Path:
    """Write the page to `path` and return it.

    Args:
        facts: short texts below the headline.
        command: the command line of the run, below the facts.
        about: a paragraph before the sections.
    """
    environment = Environment(
        loader=PackageLoader("rayjobs.reporting", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["whole"] = _unbroken_deviation
    page = environment.get_template(TEMPLATE).render(
        title=title, headline=headline, facts=facts, command=command, about=about, sections=sections
    )
    write_text(path, page)
    return path
