"""A sweep over adapter-train's settings: the settings to try, results of trials, the best setting, table and plot."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError
from ray import tune

from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_workarounds import HEAD_RESOURCE
from rayjobs.console import Progress
from rayjobs.errors import DataError
from rayjobs.reporting import plots
from rayjobs.reporting.canvas import LineEnd, name_ends, panel
from rayjobs.reporting.figures import save_plot
from rayjobs.reporting.palette import LINES
from rayjobs.reporting.tables import markdown_table, mean_and_deviation
from rayjobs.storage.files import read_json, read_jsonl, write_json, write_text
from rayjobs.storage.hub_model import format_bytes
from rayjobs.tune.sweep_config import SweepConfig
from rayjobs.tune.tuner import run_tuner

ADAPTER_TRIAL_FILE = "trial.json"
FIRST_STEPS = 50
"""Steps of the loss plot: an unstable start shows in them."""


class AdapterTrial(NamedTuple):
    """A setting, as overrides of the config, and a training seed."""

    overrides: dict[str, Any]
    seed: int


@dataclass(frozen=True, kw_only=True)
class AdapterTrialResult:
    """The result of a trial: a row of `results.parquet`, and its `trial.json`."""

    setting: str
    seed: int
    run: str
    """the name of its run folder in `trials/`"""
    trainable_parameters: int
    first_loss: float
    peak_loss: float
    final_loss: float
    """mean training loss of the last ten logged steps"""
    val_loss: float | None
    evaluated_on: str | None
    """fingerprint of the problems that `accuracy` was measured on"""
    accuracy: float | None = None
    """on ScienceQA, in percent; None if the sweep does not measure it"""
    adapter_bytes: int | None = None
    """size of the adapter's file; None in results of older versions, like the next"""
    tokens_per_s: float | None = None
    """median over the steps, of all workers"""

    def row(self) -> dict[str, Any]:
        """The values as plain data, without the accuracy if it was not measured."""
        return {name: value for name, value in asdict(self).items() if name != "accuracy" or value is not None}

    def write(self, folder: Path) -> None:
        write_json(folder / ADAPTER_TRIAL_FILE, self.row())


_RESULTS = TypeAdapter(AdapterTrialResult)


class Metric(NamedTuple):
    """A figure of the results, by which settings can be compared."""

    name: str
    mode: Literal["min", "max"]
    digits: int


ACCURACY = Metric("accuracy", "max", 2)
VAL_LOSS = Metric("val_loss", "min", 4)
FINAL_LOSS = Metric("final_loss", "min", 4)
SPEED = Metric("tokens_per_s", "max", 0)
COLUMNS = (Metric("first_loss", "min", 4), Metric("peak_loss", "min", 4), FINAL_LOSS, VAL_LOSS, ACCURACY, SPEED)


def enumerate_overrides(sweep: SweepConfig) -> list[dict[str, Any]]:
    """The settings to try, in order, as overrides of the config."""
    if sweep.method == "each":
        return [{name: value} for name, values in sweep.axes.items() for value in values]
    return [dict(zip(sweep.axes, values, strict=True)) for values in itertools.product(*sweep.axes.values())]


def describe_overrides(overrides: dict[str, Any]) -> str:
    """A setting's name in tables and plots, such as `n_layers 10, method zero_init`."""
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in overrides.items())


def read_adapter_result(folder: Path) -> AdapterTrialResult | None:
    """The result of the trial whose run folder this is; None if it is not finished.

    Raises DataError for a file that lacks a value; values that this version does not know are left out.
    """
    path = folder / ADAPTER_TRIAL_FILE
    if not path.exists():
        return None
    try:
        return _RESULTS.validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise DataError(
            f"{path} is not the result of a trial: {field}{first['msg']}; remove this file, and the same command makes "
            "it again"
        ) from error


def comparison_metric(results: Sequence[AdapterTrialResult]) -> Metric:
    """Accuracy if it was measured, else validation loss, else training loss."""
    if results[0].accuracy is not None:
        return ACCURACY
    return FINAL_LOSS if results[0].val_loss is None else VAL_LOSS


def best_setting(results: Sequence[AdapterTrialResult]) -> tuple[str, str]:
    """The setting with the best mean over seeds, the first one on ties; and a phrase of it with that mean."""
    metric = comparison_metric(results)
    values: dict[str, list[float]] = {}
    for result in results:
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
    return {"headline": f"best: {phrase}", "best": best, "trials": len(results), "settings": rows}


def compare_values(results: Sequence[AdapterTrialResult], values: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows that compare the values of one hyperparameter, each at its best setting.

    values: setting → its value of the hyperparameter. The settings are chosen by the figure that the rows then show, so
    that it is a little too good for all values alike, and more so for those with more settings.
    """
    rows = []
    for value in dict.fromkeys(values.values()):
        of_value = [result for result in results if values[result.setting] == value]
        best, _ = best_setting(of_value)
        rows.append(_summary_row(best, [result for result in of_value if result.setting == best]))
    return rows


def _summary_row(setting: str, results: Sequence[AdapterTrialResult]) -> dict[str, str]:
    row = {"setting": setting, "trainable parameters": f"{results[0].trainable_parameters:,}"}
    if (size := results[0].adapter_bytes) is not None:
        row["adapter"] = format_bytes(size)
    for metric in COLUMNS:
        values = [value for result in results if (value := getattr(result, metric.name)) is not None]
        if values:
            row[metric.name.replace("_", " ")] = mean_and_deviation(values, metric.digits)
    return row


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write the rows of `summarize` as a Markdown table."""
    columns = list(rows[0])
    write_text(path, markdown_table(columns, [[row.get(name, "") for name in columns] for row in rows]))


def plot_first_steps(path: Path, runs: Iterable[tuple[str, Sequence[Path]]]) -> None:
    """Plot the training loss of the first steps: a line for each run, one colour for each setting.

    runs: (setting, run folders of its seeds).
    """
    figure, axes = panel("step", "training loss")
    ends, seeds = list[LineEnd](), 1
    for number, (setting, folders) in enumerate(runs):
        colour, seeds = LINES[number % len(LINES)], max(seeds, len(folders))
        for i, folder in enumerate(folders):
            losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row][:FIRST_STEPS]
            axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=1)
            if i == 0 and losses:
                ends.append(LineEnd(len(losses), losses[-1], setting, colour))
    if ends:
        name_ends(figure, axes, ends)
    caption = f"Each line is the loss of one run: {len(ends)} settings, {seeds} seeds of each in the same colour."
    save_plot(path, f"training loss of the first {FIRST_STEPS} steps", plots.Drawing(figure, caption))


class AdapterSweepProgress(tune.Callback):
    """Shows in the progress bar how many trials are finished, and the best setting so far."""

    def __init__(self, bar: Progress, read_results: Callable[[], Sequence[AdapterTrialResult]]) -> None:
        self.bar, self.read_results = bar, read_results

    def update(self) -> None:
        results = self.read_results()
        self.bar.update(len(results), f"best: {best_setting(results)[1]}" if results else "")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.update()


def run_trials(
    train: Callable[..., None],
    count: int,
    folder: Path,
    concurrent_trials: int,
    total: int,
    read_results: Callable[[], Sequence[AdapterTrialResult]],
) -> None:
    """Run `train({"trial": i})` for every i < count with Ray Tune. Raises the first trial's error.

    Args:
        train: Tune's trainable; its workers reserve their own resources.
        folder: where Tune keeps the experiment's state while it runs.
        total: trials of the sweep, of which the others are finished.
        read_results: reads the results of the finished trials.
    """
    # the trainable itself runs on the head node, where it and Ray Train's controller are as safe as this job
    on_head = tune.PlacementGroupFactory([{"CPU": 0, HEAD_RESOURCE: 0.001}])
    bar = Progress("tune", unit="trials", total=total, done=total - count)
    with bar, reraise_user_errors():
        progress = AdapterSweepProgress(bar, read_results)
        progress.update()
        errors = run_tuner(
            tune.with_resources(train, on_head),
            {"trial": tune.grid_search(list(range(count)))},
            folder,
            tune.TuneConfig(max_concurrent_trials=concurrent_trials),
            progress,
        )
        if errors:
            raise errors[0]
