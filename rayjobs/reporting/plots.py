"""Plots as matplotlib figures, made from plain data; nothing here reads or writes a file."""

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
"""Title of each plot → the columns of `metrics.jsonl` that it shows, each with its label."""
COLOURS = (*(f"C{i}" for i in range(7)), "C8", "C9", "black")
"""Colours of methods: matplotlib's without grey, which marks methods that use no shots."""
DASHES = ((6, 2), (2, 2), (8, 2, 2, 2), (1, 1))
"""Dash patterns: lengths of line and gap, in line widths."""
NAMED_CLASSES = 50
"""An axis shows class names up to this number; more are not readable."""

Accuracies = Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
"""{run: {method: {shots: accuracies in percent, one per seed}}}"""


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, Figure]]:
    """(title, figure) of loss, learning rate and throughput over steps, from the rows of each run's metrics."""
    for title, columns in CURVES.items():
        figure, axes = panel("step", title)
        for number, (run, rows) in enumerate(runs.items()):
            for column, label in columns:
                name = " ".join(part for part in (run if len(runs) > 1 else "", label) if part)
                _plot_curve(axes, rows, column, name, f"C{number}")
        if not axes.has_data():
            continue
        if len(runs) > 1:
            legend_outside(figure)
        elif any(not label.startswith("_") for label in axes.get_legend_handles_labels()[1]):
            axes.legend(frameon=False)
        yield title, figure


def _plot_curve(axes: Axes, rows: Sequence[Mapping[str, Any]], column: str, label: str, colour: str) -> None:
    """One column of metrics over steps; validation loss is dashed, with a marker at each measurement."""
    points = [(row["step"], row[column]) for row in rows if column in row]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    validation = column == "val_loss"
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=1.2,
        linestyle="--" if validation else "-",
        marker="o" if validation else None,
        label=plain_text(label),
    )


def accuracy_over_shots(
    few_shot: Accuracies,
    zero_shot: Mapping[str, Mapping[str, float]],
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> Figure:
    """A line per method with one sample standard deviation over seeds; all accuracies in percent.

    Args:
        few_shot: {run: {method: {shots: accuracies, one per seed}}}. Among several runs, a method keeps its colour and
            each run has its own dash pattern.
        zero_shot: {run: {method: accuracy}} of the methods that use no shots, as grey dashed lines.
        published: {name: {shots: accuracy}}, dotted; only at shots that some method has.
    """
    figure, axes = panel("shots per class", "accuracy, %", width=9.0)
    shots = sorted({k for methods in few_shot.values() for cells in methods.values() for k in cells})
    position = {k: i for i, k in enumerate(shots)}  # 1, 2, 4, 8 and 16 at equal distances
    _plot_zero_shot(axes, zero_shot, len(few_shot))
    _plot_few_shot(axes, few_shot, position)
    for name, row in (published or {}).items():
        if at := [k for k in shots if k in row]:
            axes.plot(
                [position[k] for k in at], [row[k] for k in at], label=plain_text(name), marker="x", linestyle=":"
            )
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    legend_outside(figure)
    return figure


def _plot_zero_shot(axes: Axes, zero_shot: Mapping[str, Mapping[str, float]], n_runs: int) -> None:
    """A grey line for each accuracy; runs that share it share the line."""
    runs_of: dict[tuple[str, float], list[str]] = {}
    for run, methods in zero_shot.items():
        for method, accuracy in methods.items():
            runs_of.setdefault((method, accuracy), []).append(run)
    for dash, ((method, accuracy), runs) in zip(itertools.cycle(DASHES), runs_of.items(), strict=False):
        label = method if len(runs) == n_runs else f"{method}, {', '.join(runs)}"
        axes.axhline(accuracy, label=plain_text(label), linestyle=(0, dash), color="grey")


def _plot_few_shot(axes: Axes, few_shot: Accuracies, position: Mapping[int, int]) -> None:
    order = list(dict.fromkeys(method for methods in few_shot.values() for method in methods))
    for number, (run, methods) in enumerate(few_shot.items()):
        for method, cells in methods.items():
            shots = sorted(cells)
            axes.errorbar(
                [position[k] for k in shots],
                [statistics.mean(cells[k]) for k in shots],
                yerr=[statistics.stdev(cells[k]) if len(cells[k]) > 1 else 0.0 for k in shots],
                label=plain_text(f"{method}, {run}" if len(few_shot) > 1 else method),
                color=COLOURS[(order.index(method) if len(order) > 1 else number) % len(COLOURS)],
                linestyle=("-", "--", "-.", ":")[number % 4],
                marker="os^D"[number % 4],
                capsize=3,
            )


def search_landscape(
    alphas: Sequence[float], betas: Sequence[float], accuracy: Sequence[Sequence[float]], chosen: tuple[float, float]
) -> Figure:
    """A map of accuracy in percent, a row per β and a column per α, with a star at the chosen (α, β)."""
    figure, axes = panel("α", "β")
    lowest, highest = min(map(min, accuracy)), max(map(max, accuracy))
    # Colours show the ten points below the best: the low accuracies at the edges would take up all of them.
    scale = Normalize(max(lowest, highest - 10), highest)
    colours = axes.pcolormesh(alphas, betas, accuracy, shading="nearest", norm=scale, cmap="viridis", rasterized=True)
    figure.colorbar(colours, label="accuracy, %", extend="min" if lowest < highest - 10 else "neither")
    axes.plot([chosen[0]], [chosen[1]], "r*", markersize=14, label="chosen", clip_on=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")  # above the map
    return figure


def winning_sources(classes: Sequence[str], wins: Mapping[str, Sequence[float]]) -> Figure:
    """Stacked bars of each class: the share of its images at which each source weighs most, in percent.

    Args:
        wins: {source: one share per class}; classes are ordered by the first source's shares.
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
    """Bars of each class's accuracy in percent, the worst first."""
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
    """Class names below the axis, if there is room for them."""
    named = [plain_text(name) for name in classes] if len(classes) <= NAMED_CLASSES else []
    axes.set_xticks(range(len(named)), named, rotation=90)


def plain_text(name: str) -> str:
    """A name that matplotlib shows as it is.

    It would read text between dollar signs as a formula, and leave a name that begins with `_` out of legends.
    """
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def legend_outside(figure: Figure) -> None:
    """Place the legend right of the axes, and make the figure as high as the legend needs."""
    lines = sum(len(axes.get_legend_handles_labels()[1]) for axes in figure.axes)
    figure.set_figheight(max(figure.get_figheight(), 0.4 + 0.2 * lines))
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")


def panel(x: str, y: str, *, width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure with one pair of axes in this project's style. Width and height are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes
