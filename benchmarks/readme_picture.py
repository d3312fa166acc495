"""Draw the picture of README.md from the tables of docs/results.md: `python -m benchmarks.readme_picture`.

Left: test accuracy of the demo's classifiers over the number of labelled images of each class. Right: what adapters
changed. The picture takes the light or dark colours of whoever looks at it.
"""

import io
import re
from pathlib import Path

import matplotlib.pyplot as plt

from rayjobs.reporting import palette

ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "docs" / "results.md", ROOT / "docs" / "images" / "results.svg"
BLUE, ORANGE = palette.LINES[:2]
CURVES = {"all of CaFo": (BLUE, 2), "CLIP cache": (ORANGE, 3), "raw pixels, nearest keys": (palette.GREY, -9)}
"""{row of the table: (colour, height of its label above its end in points)}."""
BASE, ADAPTED = palette.GREY, BLUE


def read_curve(text: str, row: str) -> list[tuple[int, float, float]]:
    """(shots, mean, spread over seeds) of a row of the demo's table."""
    header = next(line for line in text.splitlines() if line.startswith("| | 0 shots"))
    cells = next(line for line in text.splitlines() if line.startswith(f"| {row} |")).split("|")[2:-1]
    shots = [int(re.sub(r"\D", "", cell)) for cell in header.split("|")[2:-1]]
    numbers = [[float(number) for number in re.findall(r"[\d.]+", cell)] for cell in cells]
    return [(k, n[0], n[1] if len(n) > 1 else 0.0) for k, n in zip(shots, numbers, strict=True) if n and k]


def read_adapters(text: str) -> list[tuple[str, float, float]]:
    """(task, percent without an adapter, percent with it) of adapters of the demo, and of one for photos."""
    json_answers = re.search(
        r"held-out questions in JSON; [^|]* \| ([\d.]+)% → [\d., ]+ and [\d.]+%, mean ([\d.]+)%", text
    )
    photos = re.search(r"photos shuffled \| ([\d.]+), [\d.]+, \*\*([\d.]+)\*\*", text)
    scans = re.search(r"scans ([\d.]+) → \*\*([\d.]+)%\*\*", text)
    if json_answers is None or photos is None or scans is None:
        raise ValueError(f"{RESULTS}: the table's rows about adapters are not there")
    pairs = {
        "SmolLM2 answers in JSON": json_answers,
        "SmolLM2 answers questions about photos": photos,
        "a tiny LLaMA answers questions about scans": scans,
    }
    return [(title, float(found[1]), float(found[2])) for title, found in pairs.items()]


def main() -> None:
    """Draw and write the picture."""
    text = RESULTS.read_text(encoding="utf-8")
    plt.rcParams.update({"svg.hashsalt": "results", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.1), layout="constrained", width_ratios=(1.05, 1))
    for row, (colour, height) in CURVES.items():
        shots, means, spreads = zip(*read_curve(text, row), strict=True)
        left.errorbar(shots, means, spreads, color=colour, marker="o", markersize=4, capsize=3)
        left.annotate(
            row.partition(",")[0],
            (shots[-1], means[-1]),
            (6, height),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    left.set(xscale="log", xticks=[1, 4, 16], xticklabels=["1", "4", "16"], xlim=(0.85, 40), ylim=(60, 100))
    left.minorticks_off()
    left.set(xlabel="labelled images of each class", title="CaFo: test accuracy on handwritten digits, %")
    for y, (title, before, after) in enumerate(reversed(read_adapters(text))):
        right.plot([before, after], [y, y], color=palette.GREY, alpha=0.4, linewidth=3, zorder=1)
        right.scatter([before], [y], color=BASE, s=45, zorder=2)
        right.scatter([after], [y], color=ADAPTED, s=45, zorder=2)
        right.annotate(title, (0, y), (0, 9), textcoords="offset points")
        right.annotate(f"{before:g} → {after:g}", (100, y), (0, 9), textcoords="offset points", ha="right")
    right.set(yticks=[], ylim=(-0.5, 2.75), xlim=(-4, 104), xlabel="base → with the adapter")
    right.set_title("LLaMA-Adapter: answers, held out, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = palette.themed(text.getvalue())
    start = drawing.index(">", drawing.index("<svg")) + 1
    style = f"<style>{palette.css()}:root{{color:var(--text)}}svg text{{fill:currentColor}}</style>"
    PICTURE.write_text(drawing[:start] + style + drawing[start:], encoding="utf-8")


if __name__ == "__main__":
    main()
