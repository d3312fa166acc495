"""Plots as matplotlib figures, made from plain data; nothing here reads or writes a file.

A caption says what is drawn and of how many images, steps or seeds.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from cafo.wilson import wilson_interval
from rayjobs.reporting.canvas import FONT, LineEnd, name_ends, panel, plain_text
from rayjobs.reporting.palette import GREY, INK, LINES, ON_MAP

NAMED_CLASSES = 25
"""A figure names its classes up to this number; of more it shows the hardest, or no names."""
NAMED_RUNS = 12
"""A figure names its curves up to this number; of more it names those that end lowest."""
BAR, MARGIN = 0.17, 0.8
"""Heights in inches: of a bar with its gap, and of a figure of bars without its bars."""
DASHES = ((6, 2), (2, 2), (8, 2, 2, 2), (1, 1))
"""Dash patterns: lengths of line and gap, in line widths."""


class Drawing(NamedTuple):
    """A figure with its caption."""

    figure: Figure
    caption: str


class _Curve(NamedTuple):
    """Columns of `metrics.jsonl` that one figure shows, and what they are."""

    columns: Mapping[str, str]
    """column → what tells it from the others of the figure"""
    caption: str


_CURVES = {
    "loss": _Curve(
        {"loss": "training", "val_loss": "validation"},
        "Cross-entropy per labelled token: of each step's global batch, and, dashed, of all held-out records.",
    ),
    "learning rate": _Curve({"lr": ""}, "Learning rate of each step."),
    "tokens per second": _Curve({"tokens_per_s": ""}, "Tokens of all workers in each step, padding left out."),
    "workers at work rather than waiting for data, %": _Curve(
        {"busy": ""}, "Share of each step's time that was not spent waiting for data, averaged over workers."
    ),
}


def training_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, logarithmic: bool = False
) -> Iterator[tuple[str, Drawing]]:
    """(title, drawing) of loss, learning rate, throughput and use over steps, from the rows of each run's metrics.

    logarithmic: draw the loss on a logarithmic scale.
    """
    for title, (columns, caption) in _CURVES.items():
        figure, axes = panel("step", title.partition(" rather")[0])
        ends = []
        for number, (run, rows) in enumerate(runs.items()):
            for column, kind in columns.items():
                points = [(row["step"], row[column]) for row in rows if column in row]
                if not points:
                    continue
                name = ", ".join(part for part in (run if len(runs) > 1 else "", kind) if part)
                colour = LINES[number % len(LINES)]
                _plot_curve(axes, points, colour, dashed=column == "val_loss")
                ends.append(LineEnd(*points[-1], name, colour))
        if not ends:
            continue
        if logarithmic and title == "loss":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        if len(ends) > NAMED_RUNS:
            caption += f" The {NAMED_RUNS} of {len(ends)} curves that end lowest are named."
            ends = sorted(ends, key=lambda end: end.y)[:NAMED_RUNS]
        if len(ends) > 1:
            name_ends(figure, axes, ends)
        steps = max(row["step"] for rows in runs.values() for row in rows)
        yield title, Drawing(figure, f"{caption} {steps:,} steps{_of_runs(len(runs))}.")


def _of_runs(count: int) -> str:
    return f", {count} runs" if count > 1 else ""


def _plot_curve(axes: Axes, points: Sequence[tuple[float, float]], colour: str, *, dashed: bool) -> None:
    """One column of metrics over steps; a dashed one has a marker at each measurement."""
    steps, values = zip(*points, strict=True)
    style = {"linestyle": "--", "marker": "o", "markersize": 3} if dashed else {"linestyle": "-"}
    axes.plot(steps, values, color=colour, linewidth=1.1, **style)


class Accuracies(NamedTuple):
    """The test accuracies of one run on one test set, in percent."""

    few_shot: Mapping[str, Mapping[int, Sequence[float]]]
    """{method: {shots: accuracies, one for each seed}}"""
    zero_shot: Mapping[str, float]
    """{method that uses no shots: accuracy}"""
    images: int
    """number of test images"""

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "Accuracies":
        """Read them from rows {method, shots, accuracy, images} of one test set, in the order of its table."""
        few_shot: dict[str, dict[int, list[float]]] = {}
        zero_shot: dict[str, float] = {}
        for row in sorted(rows, key=lambda row: -math.inf if row["shots"] is None else -row["shots"]):
            if row["shots"] is None:
                zero_shot[row["method"]] = 100 * row["accuracy"]
            else:
                few_shot.setdefault(row["method"], {}).setdefault(row["shots"], []).append(100 * row["accuracy"])
        return cls(few_shot, zero_shot, max((row["images"] for row in rows), default=0))


def accuracy_over_shots(
    runs: Mapping[str, Accuracies], published: Mapping[str, Mapping[int, float]] | None = None
) -> Drawing:
    """A line for each method of each run, with one sample standard deviation over seeds.

    Args:
        runs: accuracies by run. Among several, a run has its own dash pattern and marker, and a method its colour.
        published: {name: {shots: accuracy}}, dotted; only at shots that some method has.
    """
    figure, axes = panel("labelled images of each class", "accuracy, %")
    shots = sorted({k for run in runs.values() for cells in run.few_shot.values() for k in cells})
    position = {k: i for i, k in enumerate(shots)}  # 1, 2, 4, 8 and 16 at equal distances
    ends = _plot_few_shot(axes, runs, position)
    for name, row in (published or {}).items():
        if at := [k for k in shots if k in row]:
            axes.plot([position[k] for k in at], [row[k] for k in at], marker="x", linestyle=":", color=GREY)
            ends.append(LineEnd(position[at[-1]], row[at[-1]], name, GREY))
    ends += _plot_zero_shot(axes, {name: run.zero_shot for name, run in runs.items()})
    axes.set_xticks(range(len(shots)), [str(k) for k in shots])
    name_ends(figure, axes, ends)
    return Drawing(figure, _describe_accuracies(list(runs.values())))


def _describe_accuracies(runs: Sequence[Accuracies]) -> str:
    cells = [accuracies for run in runs for of_method in run.few_shot.values() for accuracies in of_method.values()]
    seeds, images = max(map(len, cells), default=1), sorted({run.images for run in runs})
    few = "Points are means" if seeds > 1 else "Each point is the accuracy of one seed"
    over = f" over {seeds} seeds, and bars one sample standard deviation over them" if seeds > 1 else ""
    numbers = " and ".join(f"{count:,}" for count in images)
    return f"{few}{over}. {numbers} test images.{_describe_interval([a for c in cells for a in c], images)}"


def _describe_interval(accuracies: Sequence[float], images: Sequence[int]) -> str:
    """Say how wide Wilson's interval is in the middle of the accuracies; nothing where the images differ."""
    if len(images) != 1 or not accuracies or not images[0]:
        return ""
    low, high = wilson_interval(statistics.median(accuracies) / 100, images[0])
    return f" With as many, an accuracy of {statistics.median(accuracies):.0f}% has a 95% interval (Wilson) of " + (
        f"{100 * low:.1f} to {100 * high:.1f}%."
    )


def _plot_zero_shot(axes: Axes, zero_shot: Mapping[str, Mapping[str, float]]) -> list[LineEnd]:
    """A grey dashed line for each accuracy; runs that share it share the line."""
    runs_of: dict[tuple[str, float], list[str]] = {}
    for run, methods in zero_shot.items():
        for method, accuracy in methods.items():
            runs_of.setdefault((method, accuracy), []).append(run)
    ends = []
    for number, ((method, accuracy), runs) in enumerate(runs_of.items()):
        axes.axhline(accuracy, linestyle=(0, DASHES[number % len(DASHES)]), color=GREY, linewidth=1)
        name = method if len(runs) == len(zero_shot) else f"{method}, {', '.join(runs)}"
        ends.append(LineEnd(axes.get_xlim()[1], accuracy, name, GREY))
    return ends


def _plot_few_shot(axes: Axes, runs: Mapping[str, Accuracies], position: Mapping[int, int]) -> list[LineEnd]:
    order = list(dict.fromkeys(method for run in runs.values() for method in run.few_shot))
    ends = []
    for number, (name, run) in enumerate(runs.items()):
        for method, cells in run.few_shot.items():
            shots = sorted(cells)
            means = [statistics.mean(cells[k]) for k in shots]
            colour = LINES[(order.index(method) if len(order) > 1 else number) % len(LINES)]
            axes.errorbar(
                [position[k] for k in shots],
                means,
                yerr=[statistics.stdev(cells[k]) if len(cells[k]) > 1 else 0.0 for k in shots],
                color=colour,
                linestyle=("-", "--", "-.", ":")[number % 4],
                marker="os^D"[number % 4],
                markersize=3.5,
                linewidth=1.1,
                capsize=2,
            )
            ends.append(
                LineEnd(position[shots[-1]], means[-1], f"{method}, {name}" if len(runs) > 1 else method, colour)
            )
    return ends


def search_landscape(
    alphas: Sequence[float],
    betas: Sequence[float],
    correct: Sequence[Sequence[int]],
    images: int,
    chosen: tuple[float, float],
) -> Drawing:
    """A map of accuracy in percent, a row of `correct` images per β and a column per α, with a star at the choice."""
    figure, axes = panel("α", "β")
    accuracy = [[100 * count / images for count in line] for line in correct]
    lowest, highest = min(map(min, accuracy)), max(map(max, accuracy))
    # Colours show the ten points below the best: the low accuracies at the edges would take up all of them.
    scale = Normalize(max(lowest, highest - 10), highest)
    colours = axes.pcolormesh(alphas, betas, accuracy, shading="nearest", norm=scale, cmap="viridis", rasterized=True)
    bar = figure.colorbar(colours, extend="min" if lowest < highest - 10 else "neither")
    bar.set_label("accuracy, %", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    axes.plot([chosen[0]], [chosen[1]], "*", color=LINES[3], markeredgecolor=ON_MAP[0], markersize=12, clip_on=False)
    caption = (
        f"Accuracy on the {images:,} images of the choice at each of {len(alphas)} × {len(betas)} values of α and β. "
        f"The star marks the chosen pair, α = {chosen[0]:.3g} and β = {chosen[1]:.3g}; the best has {highest:.1f}%."
    )
    return Drawing(figure, caption)


def winning_sources(classes: Sequence[str], images: Sequence[int], wins: Mapping[str, Sequence[int]]) -> Drawing:
    """Stacked bars of each class: the share of its images at which each source weighs most, in percent.

    Args:
        images: test images of each class.
        wins: {source: images of each class at which it weighs most}; classes are ordered by the first source's shares.
    """
    first = next(iter(wins.values()))
    order = sorted(range(len(classes)), key=lambda i: first[i] / max(images[i], 1))
    shown = order if len(order) <= NAMED_CLASSES else order[:: -(-len(order) // NAMED_CLASSES)]
    figure, axes = panel("share of the class's images, %", "", height=MARGIN + BAR * len(shown))
    left = [0.0] * len(shown)
    for number, (name, counts) in enumerate(wins.items()):
        widths = [100 * counts[i] / max(images[i], 1) for i in shown]
        colour = LINES[number % len(LINES)]
        axes.barh(range(len(shown)), widths, left=left, height=0.8, color=colour, label=plain_text(name))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    _name_bars(axes, [classes[i] for i in shown])
    axes.set_xlim(0, 100)
    columns = 2 if max(map(len, wins)) > 20 else 3
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=FONT, handlelength=1)
    caption = (
        f"For each class, the share of its test images on which each source's term weighs most; {sum(images):,} images"
        f" of {len(classes)} classes. {_describe_selection(len(shown), len(order), 'evenly drawn')}"
    )
    return Drawing(figure, caption.strip())


def _describe_selection(shown: int, all: int, how: str) -> str:
    return f"Shown are {shown} of {all} classes, {how}." if shown < all else ""


def class_accuracy(classes: Sequence[str], correct: Sequence[int], images: Sequence[int]) -> Drawing:
    """Bars of each class's accuracy in percent, the worst on top, with Wilson's 95% interval.

    Args:
        correct: of each class, the test images that are classified right.
        images: of each class, all its test images; a class without any is left out.
    """
    known = [i for i in range(len(classes)) if images[i]]
    order = sorted(known, key=lambda i: correct[i] / images[i])
    shown = order[:NAMED_CLASSES][::-1]  # bars are drawn from below
    figure, axes = panel("accuracy, %", "", height=MARGIN + BAR * len(shown))
    shares = [correct[i] / images[i] for i in shown]
    bounds = [wilson_interval(share, images[i]) for share, i in zip(shares, shown, strict=True)]
    axes.barh(range(len(shown)), [100 * share for share in shares], height=0.8, color=LINES[0])
    errors = [
        [100 * max(share - low, 0) for share, (low, _) in zip(shares, bounds, strict=True)],
        [100 * max(high - share, 0) for share, (_, high) in zip(shares, bounds, strict=True)],
    ]
    axes.errorbar(
        [100 * share for share in shares],
        range(len(shown)),
        xerr=errors,
        fmt="none",
        ecolor=INK,
        elinewidth=0.9,
        capsize=2,
    )
    for place, i in enumerate(shown):
        axes.annotate(f"{correct[i]} of {images[i]}", (101, place), fontsize=FONT, va="center", annotation_clip=False)
    _name_bars(axes, [classes[i] for i in shown])
    axes.set_xlim(0, 100)
    caption = (
        "Each bar is the share of a class's test images that are classified right; whiskers are Wilson's 95% interval."
        f" {sum(images):,} images. {_describe_selection(len(shown), len(order), 'those with the lowest accuracy')}"
    )
    return Drawing(figure, caption.strip())


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Drawing:
    """Images by true class (down) and predicted class (across), as shares of the true class."""
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in counts]
    named = len(classes) <= NAMED_CLASSES
    figure, axes = panel("predicted", "true", height=4.0)
    axes.grid(False)
    colours = axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
    bar = figure.colorbar(colours, shrink=0.7)
    bar.set_label("of the true class, %", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    names = [plain_text(name) for name in classes] if named else []
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    if len(classes) <= 12:
        for true, row in enumerate(counts):
            for predicted, count in enumerate(row):
                ink = ON_MAP[int(shares[true][predicted] > 60)]
                if count:
                    axes.annotate(str(count), (predicted, true), fontsize=7, ha="center", va="center", color=ink)
    total = sum(map(sum, counts))
    return Drawing(
        figure, f"{total:,} test images by true and predicted class. {_most_confused(classes, counts)}".strip()
    )


def _most_confused(classes: Sequence[str], counts: Sequence[Sequence[int]], most: int = 3) -> str:
    """Name the pairs of classes with the most mistakes."""
    pairs = [(n, t, p) for t, row in enumerate(counts) for p, n in enumerate(row) if t != p and n]
    worst = sorted(pairs, key=lambda pair: -pair[0])[:most]
    named = "; ".join(f"{classes[p]} for {classes[t]}, {n} of {sum(counts[t])}" for n, t, p in worst)
    return f"Most often wrong: {named}." if named else ""


def _name_bars(axes: Axes, classes: Sequence[str]) -> None:
    """Class names beside horizontal bars."""
    axes.set_yticks(range(len(classes)), [plain_text(name) for name in classes])
    axes.set_ylim(-0.6, len(classes) - 0.4)
    axes.grid(False, axis="y")
