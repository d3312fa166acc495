"""The page in a real browser, on a desk and on a phone, in light and in dark: nothing overflows, nothing is fetched."""

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
from rayjobs.reporting.html import Fold, Gallery, Page, Plot, Section, Table, write_page
from tests.waiting import PATIENCE_S

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
FRAMES = """<meta name="color-scheme" content="light dark">
<body>{frames}<script>onload = () => {{
  document.body.dataset.seen = JSON.stringify(Array.from(document.querySelectorAll("iframe"), one => {{
    const frame = one.contentWindow, page = frame.document;
    for (const fold of page.querySelectorAll("details")) fold.open = true;
    const style = what => frame.getComputedStyle(page.querySelector(what));
    const named = part => `${{part.tagName}} of ${{part.closest("[aria-label]")?.ariaLabel}}: ${{part.textContent}}`;
    const parts = Array.from(page.body.querySelectorAll("*"));
    const outside = part => part.getBoundingClientRect().right > frame.innerWidth + 1;
    const scrolls = part => part.scrollWidth > part.clientWidth + 1 && !part.closest("svg") &&
      ["auto", "scroll", "hidden"].includes(frame.getComputedStyle(part).overflowX);
    return {{
      window: frame.innerWidth, page: page.documentElement.scrollWidth,
      overflowing: parts.filter(part => outside(part) || scrolls(part)).map(named),
      smallest: Math.min(...Array.from(page.querySelectorAll("svg text"), text => text.getBoundingClientRect())
        .map(box => Math.max(box.width, box.height))),  // a turned letter is as wide as others are high
      ground: style("body").backgroundColor, ink: style("body").color, lines: style("svg text").fill,
      curve: style("svg [id^=line2d] path[style*=var]").stroke,
      fetched: frame.performance.getEntriesByType("resource").map(entry => entry.name),
    }};
  }}));
}};</script></body>"""
"""The page in frames of each width, since no window of a browser is as narrow as a phone."""


def seen(page: Path, folder: Path, scheme: str) -> list[dict[str, Any]]:
    """Measurements of a page in a browser at each of WIDTHS, with all its folds open."""
    assert BROWSER
    text = escape(page.read_text())
    frames = [
        f'<iframe srcdoc="{text}" style="width: {width}px; height: 844px; border: 0"></iframe>' for width in WIDTHS
    ]
    framed = folder / "framed.html"
    framed.write_text(FRAMES.format(frames="".join(frames)))
    flags = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--disable-quic", *["--no-sandbox"] * (os.geteuid() == 0)]
    flags += [f"--user-data-dir={folder / scheme}"]
    flags += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", framed.as_uri()], capture_output=True, text=True, timeout=PATIENCE_S
    )
    measured = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert measured, done.stderr
    return json.loads(unescape(measured[1]))


def curves(title: str) -> Plot:
    """The loss curves of two runs with long names."""
    rows = [{"step": step, "loss": 2.0 - step / 9, "val_loss": 1.5} for step in range(1, 9)]
    title_of, (figure, caption) = next(plots.training_curves({"a" * 40: rows, "定性評価の実行": rows}))
    return Plot(f"{title}{title_of}", figure_svg(figure, title), caption)


def wide_page(folder: Path) -> Path:
    """A page with all that can be too wide: names, paths, tables of many columns, figures, pictures, steps."""
    word, path = "long" * 40, "/" + "folder-with-a-name/" * 9 + "records.jsonl"
    Image.new("RGB", (160, 90), "red").save(folder / "red.png")
    accuracies = plots.Accuracies({f"method {i} of ours": {1: [60.0, 61.0], 16: [70.0]} for i in range(9)}, {}, 97)
    shots = plots.accuracy_over_shots({"": accuracies})
    classes = [f"a class with a long name {i}" for i in range(12)]
    counts = [[9 if i == j else int(i == j + 1) for j in range(12)] for i in range(12)]
    table = Table("wide", ["method", *(f"{k} shots" for k in range(12))], [["ours", *["93.9 ± 1.7 [91.2, 95.8]"] * 12]])
    values = Table("values", ["", ""], [["adapter", path], [word, "12,345"]], note=f"A note {word}.")
    sections: list[Section] = [
        table,
        Table("rows", ["file", "reason", "text"], [[path, "why", "some words " * 30], ["a", "", "b"]] * 30),
        values,
        Plot("shots", figure_svg(shots.figure, "shots"), shots.caption),
        Gallery("examples", [((folder / "red.png").read_bytes(), "caption" * 20)] * 5),
        Fold(
            word, [table, Plot("classes", figure_svg(plots.class_accuracy(classes, [9] * 12, [10] * 12).figure, "c"))]
        ),
        Fold("more", [Plot("confusion", figure_svg(plots.confusion(classes, counts).figure, "confusion")), values]),
    ]
    settings = Table("", ["", ""], [[f"section.key_{i}", f"/tmp/0123456789abcdef{path}"] for i in range(30)])
    inner = Page(title="inner", sections=[Fold("settings", [settings])])
    parts = [table, curves("of the step: ")]
    step = Page(title=f"step {word}", failure=f"ValueError: {path}", sections=parts, steps=[inner])
    page = Page(
        title=word,
        headline=f"{word} ± 1",
        facts=[word, "done"],
        command=f"rayjobs data={path}",
        sections=[curves(""), *sections],
        steps=[step, step],
    )
    return write_page(folder / "page.html", page)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine: apt-get install chromium")
def test_nothing_overflows_on_a_desk_or_on_a_phone_in_light_or_in_dark(tmp_path: Path) -> None:
    page = wide_page(tmp_path)
    light, dark = (seen(page, tmp_path, scheme) for scheme in ("light", "dark"))
    for look in (*light, *dark):
        assert look["overflowing"] == []
        assert look["page"] <= look["window"]
        assert look["smallest"] > 7, "text of figures stays readable"
        assert look["lines"] == look["ink"]
        assert look["fetched"] == []
    assert [look["window"] for look in light] == list(WIDTHS)
    assert [light[0]["ground"], dark[0]["ground"]] == ["rgb(255, 255, 255)", "rgb(21, 23, 26)"]
    assert [light[0]["curve"], dark[0]["curve"]] == ["rgb(26, 111, 176)", "rgb(108, 178, 235)"]


def test_a_page_describes_itself_to_those_who_do_not_see_it(tmp_path: Path) -> None:
    text = wide_page(tmp_path).read_text()
    assert text.count('<svg role="img" aria-label="') == text.count("<svg")
    assert 'aria-label="of the step: loss. Cross-entropy per labelled token' in text
    assert "<th>" not in text, "every header says of what"
    assert text.count('scope="col"') == 13 * 4 + 3
    assert len(re.findall(r'<th scope="row" role="rowheader">', text)) == 4 + 60 + 2 * 2 + 2 * 30
    assert text.count("<img ") == text.count('alt="caption')
    links = re.findall(r'<a href="#([^"]+)">', text)
    assert len(links) == 2 + 2
    assert all(text.count(f'id="{link}"') == 1 for link in links), "a link leads to the step on the same page"
    assert '<p class="failure">ValueError: /folder' in text


def test_what_a_table_needs_decides_how_it_is_laid_out() -> None:
    narrow = Table("", ["", ""], [["headline", "some words " * 9]])
    numbers = Table("", ["method", "1 shot", "16 shots"], [["ours", "93.9 ± 1.7 [91.2, 95.8]", "95.1"]] * 26)
    many = Table("", [f"{k} shots" for k in range(12)], [["93.9 ± 1.7"] * 12])
    assert [table.layout for table in (narrow, numbers, many)] == ["grid", "grid", "cards"]
    assert Table("", ["a", *"bcdef"], [["x", *["93.9 ± 1.7"] * 5]]).layout == "cards on phones"
    assert [narrow.long, numbers.long] == [False, True]
