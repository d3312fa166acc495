"""The page in a real browser, as on a phone: it fetches nothing, never scrolls sideways as a whole, knows the dark."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.reporting import plots
from rayjobs.reporting.figures import figure_svg
from rayjobs.reporting.html import Fold, Gallery, Plot, Section, Table, write_page
from tests.waiting import PATIENCE_S

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRAME = """<meta name="color-scheme" content="light dark">
<iframe srcdoc="{page}" style="width: 390px; height: 844px; border: 0"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe").contentWindow, page = frame.document;
  for (const fold of page.querySelectorAll("details")) fold.open = true;
  const wide = what => Array.from(page.querySelectorAll(what), one => one.getBoundingClientRect().width);
  const style = what => frame.getComputedStyle(page.querySelector(what));
  document.body.textContent = JSON.stringify({{
    window: frame.innerWidth, page: page.documentElement.scrollWidth, drawn: wide(".plot svg"), shown: wide(".plot"),
    ground: style("body").backgroundColor, ink: style("body").color, lines: style("svg text").fill,
    fetched: frame.performance.getEntriesByType("resource").map(entry => entry.name),
  }});
}};</script>"""
"""In a frame, since no window of a browser is as narrow as a phone."""


def seen(page: Path, folder: Path, scheme: str) -> dict[str, Any]:
    """What a browser makes of a page, 390 pixels wide, with all its folds open."""
    assert BROWSER
    framed = folder / "framed.html"
    framed.write_text(FRAME.format(page=escape(page.read_text())))
    flags = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", *["--no-sandbox"] * (os.geteuid() == 0)]
    flags += [f"--user-data-dir={folder / scheme}"]
    flags += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", framed.as_uri()], capture_output=True, text=True, timeout=PATIENCE_S
    )
    measured = re.search(r"<body>(\{.*?\})\s*</body>", done.stdout, flags=re.S)
    assert measured, done.stderr
    return json.loads(unescape(measured[1]))


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
def test_on_a_phone(tmp_path: Path) -> None:
    word = "long" * 40
    Image.new("RGB", (160, 90), "red").save(tmp_path / "red.png")
    shots = plots.accuracy_over_shots({"": {f"method {i}": {1: [60.0, 61.0], 16: [70.0]} for i in range(9)}}, {})
    table = Table("wide", [f"{k} shots" for k in range(12)], [["93.86 ± 1.68"] * 12], "A note of some words.")
    sections: list[Section] = [
        table,
        Plot("shots", figure_svg(shots)),
        Gallery("examples", [((tmp_path / "red.png").read_bytes(), "caption" * 20)] * 5),
        Fold(word, [table, Plot("classes", figure_svg(plots.class_accuracy(["a", "b"], [1.0, 2.0]))), table]),
    ]
    page = write_page(
        tmp_path / "page.html", word, f"{word} ± 1", [word, "done"], sections, command=f"rayjobs data={word}"
    )
    light, dark = (seen(page, tmp_path, scheme) for scheme in ("light", "dark"))
    for look in (light, dark):
        assert look["page"] <= look["window"] == 390, "the page as a whole does not scroll sideways"
        assert min(look["drawn"]) > 500 > 390 >= max(look["shown"]), "a plot stays readable, and scrolls by itself"
        assert look["lines"] == look["ink"]
        assert look["fetched"] == []
    assert [light["ground"], dark["ground"]] == ["rgb(255, 255, 255)", "rgb(21, 23, 26)"]
