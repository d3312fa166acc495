"""A sweep over adapter-train's settings: its grid, the best setting, tables, plots, and its run with Ray Tune."""

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from rayjobs.cluster.ray_workarounds import HEAD_RESOURCE
from rayjobs.console import Progress
from rayjobs.errors import DataError
from rayjobs.reporting import plots
from rayjobs.reporting.canvas import LineEnd, name_ends, panel
from rayjobs.reporting.figures import save_plot
from rayjobs.reporting.palette import LINES
from rayjobs.reporting.report import read_metrics
from rayjobs.reporting.sweep_plots import importance_bars, parallel_coordinates
from rayjobs.reporting.tables import markdown_table, mean_and_deviation
from rayjobs.storage.files import write_text
from rayjobs.storage.hub_model import format_bytes
from rayjobs.tune.adapter_study import TOP_SHARE, AdapterStudy, Axis, distinct, importances
from rayjobs.tune.adapter_trial import (
    COLUMNS,
    AdapterTrialResult,
    comparison_metric,
    mean_figure,
    mean_objective,
)
from rayjobs.tune.search_space import Range
from rayjobs.tune.sweep_config import Axes, SweepConfig
from rayjobs.tune.tuner import run_tuner

FIRST_STEPS = 50
"""Steps of the loss plot: an unstable start shows in them."""


def enumerate_overrides(sweep: SweepConfig) -> list[dict[str, Any]]:
    """The settings of a grid, or of one hyperparameter after the other, in order, as overrides of the config."""
    if sweep.method == "each":
        return [{name: value} for name, values in _lists(sweep.axes).items() for value in values]
    spaces = map(_lists, search_spaces(sweep))
    return [dict(zip(axes, values, strict=True)) for axes in spaces for values in itertools.product(*axes.values())]


def sample_overrides(sweep: SweepConfig) -> list[dict[str, Any]]:
    """Settings that show whether all values of the axes are allowed: each with the first values of the others."""
    samples = []
    for space in search_spaces(sweep):
        axes = {name: [axis.low, axis.high] if isinstance(axis, Range) else axis for name, axis in space.items()}
        first = {name: values[0] for name, values in axes.items()}
        samples += [first] + [{**first, name: value} for name, values in axes.items() for value in values[1:]]
    return samples


def search_spaces(sweep: SweepConfig) -> list[Axes]:
    """The axes of each value of `sweep.compare`, which is the only one there; without it the axes."""
    if sweep.compare is None:
        return [sweep.axes]
    return [{**sweep.space_of(value), sweep.compare: [value]} for value in compared_values(sweep)]


def whole_space(sweep: SweepConfig) -> Axes:
    """The axes that hold the values of all search spaces."""
    whole = dict(sweep.axes)
    for own in sweep.axes_of.values():
        for name, axis in own.items():
            known = whole[name]
            if isinstance(known, Range) and isinstance(axis, Range):
                whole[name] = Range(low=min(known.low, axis.low), high=max(known.high, axis.high))
            elif not isinstance(known, Range) and not isinstance(axis, Range):
                whole[name] = [*known, *axis]
    return whole


def _lists(axes: Axes) -> dict[str, list[Any]]:
    return {name: axis for name, axis in axes.items() if not isinstance(axis, Range)}


def finished_settings(results: Sequence[AdapterTrialResult]) -> list[AdapterTrialResult]:
    """The results of those settings of which every trial finished."""
    others = {result.setting for result in results if result.status != "finished"}
    return [result for result in results if result.setting not in others]


def best_setting(results: Sequence[AdapterTrialResult]) -> tuple[str, str]:
    """The setting with the best mean over seeds, the first one on ties; and a phrase of it with that mean.

    Settings with a trial that was stopped or diverged do not count. Raises DataError if there are no others.
    """
    finished = finished_settings(results)
    if not finished:
        raise DataError(
            "no setting of the sweep can be chosen, because of each a trial's loss was no longer finite: lower the "
            "values of optimizer.base_lr, or set optimizer.clip_norm"
        )
    metric = comparison_metric(finished)
    values: dict[str, list[float]] = {}
    for result in finished:
        values.setdefault(result.setting, []).append(getattr(result, metric.name))
    sign = 1 if metric.mode == "max" else -1
    best = max(values, key=lambda setting: sign * statistics.mean(values[setting]))
    return best, f"{best}, {metric.name.replace('_', ' ')} {mean_and_deviation(values[best], metric.digits)}"


def summarize(results: Sequence[AdapterTrialResult]) -> dict[str, Any]:
    """The sweep's `result.json`: the best setting, and a row for each setting with means over seeds."""
    best, phrase = best_setting(results)
    rows = [
        _summary_row(setting, [result for result in results if result.setting == setting])
        for setting in dict.fromkeys(result.setting for result in results)
    ]
    ends = Counter(result.status for result in results)
    if set(ends) == {"finished"}:
        rows = [{name: cell for name, cell in row.items() if name != "status"} for row in rows]
    trials = {"trials": len(results), **{f"{end}_trials": ends[end] for end in ("stopped", "diverged") if ends[end]}}
    return {"headline": f"best: {phrase}", "best": best, **trials, "settings": rows}


def best_of_values(results: Sequence[AdapterTrialResult], values: Mapping[str, str]) -> dict[str, str]:
    """The best setting of each value of one hyperparameter, but for those of which no setting finished.

    values: {setting: its value of the hyperparameter}
    """
    chosen = {}
    for value in dict.fromkeys(values.values()):
        of_value = finished_settings([result for result in results if values[result.setting] == value])
        if of_value:
            chosen[value], _ = best_setting(of_value)
    return chosen


def compare_values(results: Sequence[AdapterTrialResult], values: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows that compare the values of one hyperparameter, each at its best setting.

    values: {setting: its value of the hyperparameter}. The settings are chosen by the figure that the rows then show,
    so that it is a little too good for all values alike, and more so for those with more settings.
    """
    rows = []
    for best in best_of_values(results, values).values():
        row = _summary_row(best, [result for result in results if result.setting == best])
        rows.append({name: cell for name, cell in row.items() if name != "status"})
    return rows


def _summary_row(setting: str, results: Sequence[AdapterTrialResult]) -> dict[str, str]:
    row = {"setting": setting, "status": ", ".join(dict.fromkeys(result.describe_status() for result in results))}
    if (trainable := results[0].trainable_parameters) is not None:
        row["trainable parameters"] = f"{trainable:,}"
    if (size := results[0].adapter_bytes) is not None:
        row["adapter"] = format_bytes(size)
    for metric in COLUMNS:
        values = [value for result in results if (value := getattr(result, metric.name)) is not None]
        if values:
            row[metric.name.replace("_", " ")] = mean_and_deviation(values, metric.digits)
    return row


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write the rows of `summarize` as a Markdown table."""
    columns = table_columns(rows)
    write_text(path, markdown_table(columns, [[row.get(name, "") for name in columns] for row in rows]))


def table_columns(rows: Sequence[dict[str, str]]) -> list[str]:
    """The columns of rows, in the order of the row that has most of them, then those of the others."""
    fullest = max(rows, key=len)
    return list(dict.fromkeys(name for row in (fullest, *rows) for name in row))


def plot_first_steps(path: Path, runs: Iterable[tuple[str, Sequence[Path]]]) -> None:
    """Plot the training loss of the first steps: a line for each run, one colour for each setting.

    runs: (setting, run folders of its seeds).
    """
    figure, axes = panel("step", "training loss")
    ends, seeds = list[LineEnd](), 1
    for number, (setting, folders) in enumerate(runs):
        colour, seeds = LINES[number % len(LINES)], max(seeds, len(folders))
        for i, folder in enumerate(folders):
            losses = [row["loss"] for row in read_metrics(folder) if "loss" in row][:FIRST_STEPS]
            axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=1)
            if i == 0 and losses:
                ends.append(LineEnd(len(losses), losses[-1], setting, colour))
    caption = f"Each line is the loss of one run: {len(ends)} settings, {seeds} seeds of each in the same colour."
    if len(ends) > plots.NAMED_RUNS:
        caption += f" The {plots.NAMED_RUNS} that end lowest are named."
        ends = sorted(ends, key=lambda end: end.y)[: plots.NAMED_RUNS]
    if ends:
        name_ends(figure, axes, ends)
    save_plot(path, f"training loss of the first {FIRST_STEPS} steps", plots.Drawing(figure, caption))


def plot_settings(
    folder: Path, axes: Mapping[str, Axis], settings: Sequence[tuple[Mapping[str, Any], Sequence[AdapterTrialResult]]]
) -> None:
    """Plot the settings of a search as parallel coordinates, and the importance of the hyperparameters.

    Nothing is plotted of fewer than two finished settings, and no importance with one hyperparameter.

    Args:
        folder: the run folder.
        axes: the search space.
        settings: (overrides, results of its seeds) of each setting.
    """
    objectives = enumerate(mean_objective(results) for _, results in settings)
    finished = {number: objective for number, objective in objectives if objective is not None}
    if len(finished) < 2:
        return
    best = min(finished, key=lambda number: finished[number])
    name = comparison_metric(settings[best][1]).name.replace("_", " ")
    figures = [mean_figure(results) for _, results in settings]
    drawing = parallel_coordinates([overrides for overrides, _ in settings], figures, name, best=best)
    save_plot(folder / "settings.png", "settings", drawing)
    shares = importances(axes, [(settings[number][0], objective) for number, objective in finished.items()])
    if len(shares) > 1:
        drawing = importance_bars(shares, len(finished), TOP_SHARE)
        save_plot(folder / "importance.png", "importance of the hyperparameters", drawing)


class AdapterSweepProgress(tune.Callback):
    """Shows in the progress bar how many trials are over, and the best setting so far."""

    def __init__(self, bar: Progress, read_results: Callable[[], Sequence[AdapterTrialResult]]) -> None:
        self.bar, self.read_results = bar, read_results

    def update(self) -> None:
        results = self.read_results()
        self.bar.update(len(results), f"best: {best_setting(results)[1]}" if finished_settings(results) else "")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.update()


def run_points(
    train: Callable[..., None],
    points: Sequence[object] | AdapterStudy,
    folder: Path,
    concurrent_trials: int,
    progress: tune.Callback,
) -> None:
    """Run `train({"point": point})` for every point with Ray Tune. Raises the first trial's error.

    Args:
        train: Tune's trainable; its workers reserve their own resources.
        points: the points, or the study that suggests them.
        folder: where Tune keeps the experiment's state while it runs.
    """
    # the trainable itself runs on the head node, where it and Ray Train's controller are as safe as this job
    on_head = tune.PlacementGroupFactory([{"CPU": 0, HEAD_RESOURCE: 0.001}])
    if isinstance(points, AdapterStudy):
        space, search = None, {"search_alg": points, "num_samples": points.sweep.samples}
    else:
        space, search = {"point": tune.grid_search(list(points))}, {}
    config = tune.TuneConfig(max_concurrent_trials=concurrent_trials, **search)
    errors = run_tuner(tune.with_resources(train, on_head), space, folder, config, progress)
    if errors:
        raise errors[0]


def compared_values(sweep: SweepConfig) -> list[Any]:
    """The values that `sweep.compare` puts beside each other; none without it."""
    axis = distinct(sweep.axes[sweep.compare]) if sweep.compare else []
    return [] if isinstance(axis, Range) else axis
