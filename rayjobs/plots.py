"""Plots, as matplotlib figures made from plain data; nothing here reads or writes a file."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

CURVES = {
    "loss": (("loss", "loss in training"), ("val_loss", "loss on validation")),
    "learning rate": (("lr", ""),),
    "tokens per second": (("tokens_per_s", ""),),
    "workers at work rather than waiting for data, %": (("busy", ""),),
}
"""Plot → the columns of `metrics.jsonl` it shows, and what each is called."""


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, Figure]]:
    """(title, figure) of loss, learning rate and throughput over steps, from the rows of each run's metrics."""
    for title, columns in CURVES.items():
        figure, axes = panel("step", title)
        for number, (name, rows) in enumerate(runs.items()):
            for column, told in columns:
                points = [(row["step"], row[column]) for row in rows if column in row]
                if points:
                    steps, values = zip(*points, strict=True)
                    validation = column == "val_loss"
                    axes.plot(
                        steps,
                        values,
                        color=f"C{number}",
                        linewidth=1.2,
                        linestyle="--" if validation else "-",
                        marker="o" if validation else None,
                        label=" ".join(part for part in (name if len(runs) > 1 else "", told) if part),
                    )
        if axes.has_data():
            if any(not label.startswith("_") for label in axes.get_legend_handles_labels()[1]):
                axes.legend(frameon=False)
            yield title, figure


def accuracy_over_shots(
    methods: Mapping[str, Mapping[int, Sequence[float]]],
    *,
    level: Mapping[str, float] | None = None,
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> Figure:
    """A line per method, with one sample standard deviation over seeds; all accuracies in percent.

    Args:
        methods: {method: {shots: accuracies, one per seed}}.
        level: {method: accuracy} of what has no shots, dashed across.
        published: {name: {shots: accuracy}}, dotted; only at shots that some method has.
    """
    figure, axes = panel("shots per class", "accuracy, %", width=9.0)
    shots = sorted({k for cells in methods.values() for k in cells})
    place = {k: i for i, k in enumerate(shots)}  # 1, 2, 4, 8, 16 stand evenly
    for name, cells in methods.items():
        known = sorted(cells)
        means = [statistics.mean(cells[k]) for k in known]
        spread = [statistics.stdev(cells[k]) if len(cells[k]) > 1 else 0.0 for k in known]
        axes.errorbar([place[k] for k in known], means, yerr=spread, label=name, marker="o", capsize=3)
    for name, accuracy in (level or {}).items():
        axes.axhline(accuracy, label=name, linestyle="--", color="grey")
    for name, row in (published or {}).items():
        if known := [k for k in shots if k in row]:
            axes.plot([place[k] for k in known], [row[k] for k in known], label=name, marker="x", linestyle=":")
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")  # lines leave no room inside
    return figure


def search_landscape(
    alphas: Sequence[float], betas: Sequence[float], accuracy: Sequence[Sequence[float]], chosen: tuple[float, float]
) -> Figure:
    """Accuracy in percent as a map, a row for each β and a column for each α; a star at the chosen (α, β)."""
    figure, axes = panel("α", "β")
    lowest, highest = min(map(min, accuracy)), max(map(max, accuracy))
    # the ten points below the best hold what matters; the fall at the edges would take up all colours
    scale = Normalize(max(lowest, highest - 10), highest)
    colours = axes.pcolormesh(alphas, betas, accuracy, shading="nearest", norm=scale, cmap="viridis")
    figure.colorbar(colours, label="accuracy, %", extend="min" if lowest < highest - 10 else "neither")
    axes.plot([chosen[0]], [chosen[1]], marker="*", markersize=14, color="red", linestyle="", label="chosen")
    axes.legend(frameon=False, fontsize="small")
    return figure


def winning_sources(classes: Sequence[str], wins: Mapping[str, Sequence[float]]) -> Figure:
    """For each class, the share of its images at which each source weighs most, in percent, as stacked bars.

    Args:
        wins: {source: a share per class}; the classes are ordered by the first source's.
    """
    figure, axes = panel("class", "images, %")
    first = next(iter(wins.values()))
    order = sorted(range(len(classes)), key=lambda i: -first[i])
    below = [0.0] * len(order)
    for name, shares in wins.items():
        heights = [shares[i] for i in order]
        axes.bar(range(len(order)), heights, bottom=below, width=1.0, label=name)
        below = [low + high for low, high in zip(below, heights, strict=True)]
    named = len(order) <= 50
    axes.set_xticks(range(len(order)) if named else [], [classes[i] for i in order] if named else [], rotation=90)
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.legend(frameon=True, fontsize="small")
    return figure


def class_accuracy(classes: Sequence[str], accuracy: Sequence[float]) -> Figure:
    """Accuracy of each class in percent, the worst first."""
    order = sorted(range(len(classes)), key=lambda i: accuracy[i])
    figure, axes = panel("class", "accuracy, %")
    axes.bar(range(len(order)), [accuracy[i] for i in order], width=0.8)
    named = len(order) <= 50
    axes.set_xticks(range(len(order)) if named else [], [classes[i] for i in order] if named else [], rotation=90)
    axes.set_xlim(-0.6, len(order) - 0.4)
    return figure


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """Images by true class (down) and predicted class (across), as shares of the true class."""
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in counts]
    figure, axes = panel("predicted", "true", width=6.0, height=5.2)
    axes.grid(False)
    colours = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(colours, label="of the true class, %")
    if len(classes) <= 50:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    return figure


def panel(x: str, y: str, *, width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in the house's manner. Width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes
