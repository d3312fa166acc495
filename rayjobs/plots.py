"""Plots, as matplotlib figures made from plain data; nothing here reads or writes a file."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

CURVES = {
    "loss": (("loss", "loss in training"), ("val_loss", "loss on validation")),
    "learning rate": (("lr", ""),),
    "tokens per second": (("tokens_per_s", ""),),
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


def panel(x: str, y: str, *, width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in the house's manner. Width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes
