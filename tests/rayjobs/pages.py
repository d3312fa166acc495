"""The text of a report, as a reader sees it."""

import html
import re
from pathlib import Path


def page_text(folder: Path) -> str:
    """The text of a run's report, without tags, and with single blanks between words."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<!--.*?-->|<[^>]*>", "", page, flags=re.S)).split())
