"""Plots, as matplotlib figures made from plain data; nothing here reads or writes a file."""

import itertools
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
COLOURS = (*(f"C{i}" for i in range(7)), "C8", "C9", "black")
"""Of methods: matplotlib's but for grey, which is what has no shots."""
DASHES = ((6, 2), (2, 2), (8, 2, 2, 2), (1, 1))
"""Lengths of ink and gap, in line widths."""
NAMED_CLASSES = 50
"""More class names than that are not readable on an axis."""


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
                        label=plain_text(" ".join(part for part in (name if len(runs) > 1 else "", told) if part)),
                    )
        if axes.has_data():
            if len(runs) > 1:
                legend_outside(figure)
            elif any(not label.startswith("_") for label in axes.get_legend_handles_labels()[1]):
                axes.legend(frameon=False)
            yield title, figure


def accuracy_over_shots(
    runs: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    levels: Mapping[str, Mapping[str, float]],
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> Figure:
    """A line per method, with one sample standard deviation over seeds; all accuracies in percent.

    Args:
        runs: {run: {method: {shots: accuracies, one per seed}}}; where there are several, a method keeps its colour and
            each run has a dash of its own.
        levels: {run: {method: accuracy}} of what has no shots, in grey dashes across.
        published: {name: {shots: accuracy}}, dotted; only at shots that some method has.
    """
    figure, axes = panel("shots per class", "accuracy, %", width=9.0)
    shots = sorted({k for methods in runs.values() for cells in methods.values() for k in cells})
    place = {k: i for i, k in enumerate(shots)}  # 1, 2, 4, 8, 16 stand evenly

    def told(method: str, run: str) -> str:
        return plain_text(f"{method}, {run}" if len(runs) > 1 else method)

    across: dict[tuple[str, float], list[str]] = {}
    for run, level in levels.items():
        for method, accuracy in level.items():
            across.setdefault((method, accuracy), []).append(run)
    for dash, ((method, accuracy), of) in zip(itertools.cycle(DASHES), across.items(), strict=False):
        name = plain_text(method) if len(of) == len(runs) else told(method, ", ".join(of))
        axes.axhline(accuracy, label=name, linestyle=(0, dash), color="grey")
    order = list(dict.fromkeys(method for methods in runs.values() for method in methods))
    for number, (run, methods) in enumerate(runs.items()):
        for method, cells in methods.items():
            known = sorted(cells)
            axes.errorbar(
                [place[k] for k in known],
                [statistics.mean(cells[k]) for k in known],
                yerr=[statistics.stdev(cells[k]) if len(cells[k]) > 1 else 0.0 for k in known],
                label=told(method, run),
                color=COLOURS[(order.index(method) if len(order) > 1 else number) % len(COLOURS)],
                linestyle=("-", "--", "-.", ":")[number % 4],
                marker="os^D"[number % 4],
                capsize=3,
            )
    for name, row in (published or {}).items():
        if known := [k for k in shots if k in row]:
            axes.plot(
                [place[k] for k in known], [row[k] for k in known], label=plain_text(name), marker="x", linestyle=":"
            )
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    legend_outside(figure)
    return figure


def search_landscape(
    alphas: Sequence[float], betas: Sequence[float], accuracy: Sequence[Sequence[float]], chosen: tuple[float, float]
) -> Figure:
    """Accuracy in percent as a map, a row for each β and a column for each α; a star at the chosen (α, β)."""
    figure, axes = panel("α", "β")
    lowest, highest = min(map(min, accuracy)), max(map(max, accuracy))
    # the ten points below the best hold what matters; the fall at the edges would take up all colours
    scale = Normalize(max(lowest, highest - 10), highest)
    colours = axes.pcolormesh(alphas, betas, accuracy, shading="nearest", norm=scale, cmap="viridis", rasterized=True)
    figure.colorbar(colours, label="accuracy, %", extend="min" if lowest < highest - 10 else "neither")
    axes.plot([chosen[0]], [chosen[1]], "r*", markersize=14, label="chosen", clip_on=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")  # not on the map
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
        axes.bar(range(len(order)), heights, bottom=below, width=1.0, label=plain_text(name))
        below = [low + high for low, high in zip(below, heights, strict=True)]
    _name_classes(axes, [classes[i] for i in order])
    axes.set_xlim(-0.5, len(order) - 0.5)
    axes.legend(frameon=True, fontsize="small")
    return figure


def class_accuracy(classes: Sequence[str], accuracy: Sequence[float]) -> Figure:
    """Accuracy of each class in percent, the worst first."""
    order = sorted(range(len(classes)), key=lambda i: accuracy[i])
    figure, axes = panel("class", "accuracy, %")
    axes.bar(range(len(order)), [accuracy[i] for i in order], width=0.8)
    _name_classes(axes, [classes[i] for i in order])
    axes.set_xlim(-0.6, len(order) - 0.4)
    return figure


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """Images by true class (down) and predicted class (across), as shares of the true class."""
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in counts]
    figure, axes = panel("predicted", "true", width=6.0, height=5.2)
    axes.grid(False)
    colours = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
    figure.colorbar(colours, label="of the true class, %")
    _name_classes(axes, classes)
    if len(classes) <= NAMED_CLASSES:
        axes.set_yticks(range(len(classes)), [plain_text(name) for name in classes])
    return figure


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    """Under their places, where there is room for names."""
    named = [plain_text(name) for name in classes] if len(classes) <= NAMED_CLASSES else []
    axes.set_xticks(range(len(named)), named, rotation=90)


def plain_text(name: str) -> str:
    """A name as it is: matplotlib reads what stands between dollar signs as a formula."""
    return name.replace("$", r"\$")


def legend_outside(figure: Figure) -> None:
    """The legend right of the axes, where many lines leave it no room inside, and as high as it needs."""
    lines = sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes)
    figure.set_figheight(max(figure.get_figheight(), 0.4 + 0.2 * lines))
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")


def panel(x: str, y: str, *, width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in the house's manner. Width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes
