"""The code blocks and commands of README.md and docs/, in the order in which a reader meets them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

FIRST = ("README.md", "docs/quickstart.md", "docs/adapter.md", "docs/cafo.md")
"""Pages whose blocks leave runs that blocks of the others use."""
OURS = ["python", "-m", "rayjobs"]

_BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", flags=re.M | re.S
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    needs: str
    """what the comment before it says that it needs and a test lacks; empty for a block that runs as it stands"""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The pages in order; those that a program writes are left out."""
    others = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return [ROOT / name for name in (*FIRST, *(name for name in others if name not in FIRST))]


def blocks(*languages: str) -> list[Block]:
    """All blocks in these languages, in order."""
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            name = page.relative_to(ROOT).as_posix()
            found.append(Block(name, line, match["language"], match["text"], match["needs"] or ""))
    return [block for block in found if block.language in languages]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, as words."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def inline_commands() -> list[list[str]]:
    """Our commands within sentences, as words, without those that leave something out."""
    found = [command for page in pages() for command in re.findall(r"`(python -m [^`]+)`", page.read_text("utf-8"))]
    return [shlex.split(command) for command in found if "…" not in command and "JOB" not in command]
