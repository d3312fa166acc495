"""Test accuracies as tables in the paper's shape and as plots."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cafo import published
from rayjobs.imagery import EncoderConfig
from rayjobs.tables import atomic_path, write_text

ZERO_SHOT = "CLIP zero-shot"


def summary(accuracies: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent."""
    mean = f"{100 * statistics.mean(accuracies):.2f}"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else mean


def published_row(data_set: str, encoders: Mapping[str, EncoderConfig]) -> dict[int, float]:
    """{shots: the paper's accuracy in percent}, where data set and encoders are the paper's; else nothing."""
    clips = {e.name.removesuffix("-quickgelu") for e in encoders.values() if e.kind == "clip" and e.weights == "openai"}
    dinos = [
        e for e in encoders.values() if e.kind == "dino" and e.name in ("", "resnet50") and "random:" not in e.weights
    ]
    if not dinos or len(clips) != 1 or len(encoders) != 2:
        return {}
    clip = clips.pop()
    if clip == "RN50" and data_set in published.RN50:
        return dict(zip(published.SHOTS, published.RN50[data_set], strict=True))
    if data_set == "imagenet" and clip in published.IMAGENET_16_SHOT:
        return {16: published.IMAGENET_16_SHOT[clip]}
    return {}


def table(rows: Sequence[Mapping[str, Any]], paper: Mapping[int, float]) -> tuple[list[str], list[list[str]]]:
    """Shots across, methods down: (columns, lines) from rows {method, shots, accuracy} of one target.

    A row without shots holds at all of them.
    """
    shots = sorted({row["shots"] for row in rows if row["shots"] is not None})
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        cells = [[row["accuracy"] for row in mine if row["shots"] in (None, k)] for k in shots]
        lines.append([name, *[summary(cell) if cell else "" for cell in cells]])
    if paper:
        lines.append(["CaFo, published", *[f"{paper[k]:.2f}" if k in paper else "" for k in shots]])
    return ["method", *[f"{k} shots" if k != 1 else "1 shot" for k in shots]], lines


def write_tables(folder: Path, tables: Mapping[str, tuple[list[str], list[list[str]]]]) -> None:
    """`table.md` with all targets, and a CSV for each."""
    text = []
    for target, (columns, lines) in tables.items():
        cells = [columns, ["---"] + ["---:"] * (len(columns) - 1), *lines]
        text.append(f"### {target}: test accuracy, %\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells))
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows([columns, *lines])
        write_text(folder / f"table-{target}.csv", written.getvalue())
    write_text(folder / "table.md", "\n".join(text))


def plot_shots(path: Path, title: str, rows: Sequence[Mapping[str, Any]], paper: Mapping[int, float]) -> None:
    """Accuracy over shots, a line per method, with one standard deviation over seeds."""
    figure, axes = _figure(title, "shots per class", "test accuracy, %")
    shots = sorted({row["shots"] for row in rows if row["shots"] is not None})
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        points = [(k, [100 * row["accuracy"] for row in mine if row["shots"] in (None, k)]) for k in shots]
        points = [(k, cell) for k, cell in points if cell]
        means = [statistics.mean(cell) for _, cell in points]
        spread = [statistics.stdev(cell) if len(cell) > 1 else 0.0 for _, cell in points]
        style = "--" if name == ZERO_SHOT else "-"
        axes.errorbar([k for k, _ in points], means, yerr=spread, label=name, marker="o", linestyle=style, capsize=3)
    if known := {k: paper[k] for k in shots if k in paper}:
        axes.plot(list(known), list(known.values()), label="published", marker="x", color="black", linestyle=":")
    axes.set_xticks(shots)
    axes.legend()
    _save(figure, path)


def plot_landscape(
    path: Path, title: str, landscape: Mapping[str, Any], total: int, chosen: tuple[float, float]
) -> None:
    """Validation accuracy and the best α at every β that the search tried."""
    figure, axes = _figure(title, "β", "val accuracy at the best α, %")
    axes.plot(landscape["betas"], [100 * c / total for c in landscape["correct"]], color="tab:blue")
    right = axes.twinx()
    right.plot(landscape["betas"], landscape["alphas"], color="tab:orange", linewidth=0.8)
    right.plot([chosen[1]], [chosen[0]], marker="*", color="black", linestyle="", label="chosen")
    right.set_ylabel("best α")
    right.legend()
    _save(figure, path)


def can_plot() -> bool:
    """Whether matplotlib, the `plots` extra, is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # drawn without pyplot, which would want a display

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
