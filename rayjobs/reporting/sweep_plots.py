"""Plots of a sweep: its settings as parallel coordinates, and the importance of each hyperparameter."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from rayjobs.config import format_value
from rayjobs.reporting.canvas import FONT, panel, plain_text
from rayjobs.reporting.palette import GREY, LINES
from rayjobs.reporting.plots import BAR, MARGIN, Drawing

FEW_SETTINGS = 10
"""Finished settings for each hyperparameter below which its importance is called a hint."""
WIDE_RANGE = 8
"""Quotient of the largest and the smallest value of an axis from which it is drawn in its logarithm."""


def parallel_coordinates(
    settings: Sequence[Mapping[str, Any]], figures: Sequence[float | None], figure_name: str, *, best: int
) -> Drawing:
    """A line for each setting through its value on every axis, coloured by the figure that settings are compared by.

    Args:
        settings: {hyperparameter: value} of each, all with the same hyperparameters.
        figures: the figure of each; None for one that was stopped or diverged.
        figure_name: the figure's name.
        best: number of the setting that is drawn on top, in its own colour.
    """
    figure, axes = panel("", "", height=3.4)
    names = list(settings[0])
    known = [value for value in figures if value is not None]
    columns = [[setting[name] for setting in settings] for name in names]
    places = [_place(column) for column in columns]
    low, high = min(known), max(known)
    for number in sorted(range(len(settings)), key=lambda n: (n == best, figures[n] is not None)):
        value, line = figures[number], [place[number] for place in places]
        if value is None:
            axes.plot(range(len(names)), line, color=GREY, linewidth=0.7, linestyle=":")
            continue
        height = (value - low) / ((high - low) or 1.0)
        colour, width = (LINES[3], 2.0) if number == best else (colormaps["viridis"](height), 1.0)
        axes.plot(range(len(names) + 1), [*line, height], color=colour, linewidth=width)
    for i, column in enumerate(columns):
        _label_axis(axes, i, column, places[i])
    _label_axis(axes, len(names), known, _place(known))
    axes.set_xticks(range(len(names) + 1), [plain_text(name.rpartition(".")[2]) for name in names] + [figure_name])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.set_xlim(-0.1, len(names) + 0.35)
    stopped = len(settings) - len(known)
    caption = (
        f"Each line is one of {len(settings)} settings, through its values and its {figure_name}; the best one is red."
        + (f" The {stopped} dotted ones were stopped or diverged." if stopped else "")
    )
    return Drawing(figure, caption)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _place(column: Sequence[Any]) -> list[float]:
    """The heights in [0, 1] of an axis' values: numbers by their value or its logarithm, others one above another."""
    if all(map(_is_number, column)):
        low, high = min(column), max(column)
        if low > 0 and high / low >= WIDE_RANGE:
            column, low, high = [math.log(value) for value in column], math.log(low), math.log(high)
        return [(value - low) / (high - low) if high > low else 0.5 for value in column]
    distinct = list(dict.fromkeys(map(format_value, column)))
    return [distinct.index(format_value(value)) / max(len(distinct) - 1, 1) for value in column]


def _label_axis(axes: Axes, x: int, column: Sequence[Any], places: Sequence[float]) -> None:
    """An upright line with the names of its values, or of the ends of many numbers."""
    axes.axvline(x, color=GREY, linewidth=0.8, zorder=0)
    named = {format_value(value): place for value, place in zip(column, places, strict=True)}
    if len(named) > 8 and all(map(_is_number, column)):
        ends = min(places), max(places)
        named = {name: place for name, place in named.items() if place in ends}
    for name, place in named.items():
        axes.annotate(plain_text(name), (x + 0.04, place), fontsize=FONT - 1, va="center", annotation_clip=False)


def importance_bars(shares: Mapping[str, float], settings: int, top_share: float) -> Drawing:
    """Bars of the share of each hyperparameter in what tells the best settings from the others, in percent.

    Args:
        shares: {hyperparameter: share of 1}.
        settings: number of finished settings.
        top_share: share of them that count as the best.
    """
    order = sorted(shares, key=lambda name: shares[name])
    figure, axes = panel("importance, %", "", height=MARGIN + BAR * max(len(order), 3))
    axes.barh(range(len(order)), [100 * shares[name] for name in order], height=0.7, color=LINES[0])
    axes.set_yticks(range(len(order)), [plain_text(name) for name in order])
    axes.set_xlim(0, 100)
    axes.grid(False, axis="y")
    caption = (
        f"Share of each hyperparameter in what tells the best {100 * top_share:.0f}% of {settings} finished settings "
        "from the others (PED-ANOVA)."
    )
    if settings < FEW_SETTINGS * len(order):
        caption += f" {settings} settings are few for {len(order)} hyperparameters: take it as a hint."
    return Drawing(figure, caption)
