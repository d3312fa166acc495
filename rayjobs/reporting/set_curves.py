"""The held-out loss of each set of a mixture over the steps of a training run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rayjobs.reporting.canvas import LineEnd, name_ends, panel
from rayjobs.reporting.palette import LINES
from rayjobs.reporting.plots import NAMED_RUNS, Drawing


def held_out_sets(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """A line for each set, from the rows of a run's metrics; None if no row has the losses of several sets."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, loss in row.get("val_losses", {}).items():
            curves.setdefault(name, []).append((row["step"], loss))
    if not curves:
        return None
    figure, axes = panel("step", "held-out loss")
    ends = []
    for number, (name, points) in enumerate(curves.items()):
        colour = LINES[number % len(LINES)]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, marker="o", markersize=3)
        ends.append(LineEnd(*points[-1], name, colour))
    caption = f"Cross-entropy per labelled token of the held-out records of each of {len(curves)} sets."
    if len(ends) > NAMED_RUNS:
        caption += f" The {NAMED_RUNS} that end highest are named."
        ends = sorted(ends, key=lambda end: -end.y)[:NAMED_RUNS]
    name_ends(figure, axes, ends)
    return Drawing(figure, caption)
