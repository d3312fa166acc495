"""One self-contained HTML page of tables, plots and pictures: no network, light and dark, readable on a phone."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from rayjobs.storage.files import write_text

if TYPE_CHECKING:
    pass


TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Table:
    """Rows of text; a table without column names has no header."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    linked: str = ""
    """The column whose cells are the addresses of pages."""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Plot:
    """A drawing, as `svg` makes it."""

    title: str
    svg: str
    note: str = ""
    kind: str = field(default="plot", init=False)


@dataclass(frozen=True)
class Gallery:
    """Pictures with a caption each; a picture is a PNG or JPEG file's bytes."""

    title: str
    pictures: Sequence[tuple[bytes, str]]
    note: str = ""
    kind: str = field(default="gallery", init=False)

    @property
    def sources(self) -> list[tuple[str, str]]:
        """(data URL, caption)."""
        return [(_data_url(picture), caption) for picture, caption in self.pictures]


@dataclass(frozen=True)
class Fold:
    """Sections that are shown when the reader opens them."""

    title: str
    sections: Sequence["Section"]
    kind: str = field(default="fold", init=False)


Section = Table | Plot | Gallery | Fold


def _data_url(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


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
    """Writes the page, whole or not at all. command: what was typed, told beneath the facts; about: the paragraph that
    the page opens with."""
    environment = Environment(
        loader=PackageLoader("rayjobs.reporting", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["whole"] = lambda text: text.replace(" ± ", "\u00a0±\u00a0")  # a line does not end within it
    told = {"title": title, "headline": headline, "facts": facts, "command": command, "about": about}
    page = environment.get_template(TEMPLATE).render(told, sections=sections)
    write_text(path, page)
    return path
