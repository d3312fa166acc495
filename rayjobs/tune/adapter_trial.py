"""A trial of a sweep over adapter-train's settings: what it runs, when it is stopped, and its result."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from rayjobs.storage.files import read_typed, write_json

ADAPTER_TRIAL_FILE = "trial.json"


class AdapterTrial(NamedTuple):
    """A setting, as overrides of the config, and a training seed."""

    overrides: dict[str, Any]
    seed: int


def describe_overrides(overrides: dict[str, Any]) -> str:
    """A setting's name in tables and plots, such as `n_layers 10, method zero_init`."""
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in overrides.items())


@dataclass(frozen=True, kw_only=True)
class Point:
    """The work of one of Tune's trials: trials of one setting, one after the other, until one is not finished."""

    trials: Sequence[AdapterTrial]
    limits: Mapping[int, float] = field(default_factory=dict)
    """{step: held-out loss above which the first trial is stopped}"""

    @property
    def overrides(self) -> dict[str, Any]:
        """The overrides of its setting."""
        return self.trials[0].overrides

    @property
    def setting(self) -> str:
        """The name of its setting."""
        return describe_overrides(self.overrides)

    def limits_of(self, number: int) -> Mapping[int, float]:
        """Return the limits that hold for the trial of this number, counted from 0."""
        return {} if number else self.limits

    def is_over(self, results: Sequence["AdapterTrialResult"]) -> bool:
        """Return whether no trial is left to run after those that have these results."""
        return len(results) == len(self.trials) or any(result.status != "finished" for result in results)


@dataclass(frozen=True, kw_only=True)
class AdapterTrialResult:
    """The result of a trial: a row of `results.parquet`, and its `trial.json`."""

    setting: str
    seed: int
    run: str
    """the name of its run folder in `trials/`"""
    trainable_parameters: int | None = None
    """None if the trial is not finished, like `val_loss` and `adapter_bytes`"""
    first_loss: float | None = None
    """None if no step had a finite loss, like the next two"""
    peak_loss: float | None = None
    final_loss: float | None = None
    """mean training loss of the last ten logged steps"""
    val_loss: float | None = None
    evaluated_on: str | None = None
    """fingerprint of the problems that `accuracy` was measured on"""
    status: Literal["finished", "stopped", "diverged"] = "finished"
    """`stopped`: its held-out loss passed a limit of the search. `diverged`: its loss was no longer finite."""
    accuracy: float | None = None
    """on ScienceQA, in percent; None if the sweep does not measure it"""
    adapter_bytes: int | None = None
    """size of the adapter's file"""
    peak_memory_bytes: int | None = None
    """the most memory that a training worker held: on a GPU its tensors, else the process with its libraries"""
    tokens_per_s: float | None = None
    """median over the steps, of all workers"""
    steps: int = 0
    """optimizer steps that it made"""
    seconds: float = 0.0
    """time of its last start"""
    val_steps: list[int] = field(default_factory=list)
    """steps of `val_losses`"""
    val_losses: list[float] = field(default_factory=list)
    """held-out losses along the way; of a stopped trial, up to the one that passed a limit"""

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(step, held-out loss) along the way."""
        return list(zip(self.val_steps, self.val_losses, strict=True))

    def describe_status(self) -> str:
        """Return how the trial ended, in a table's words."""
        return self.status if self.status == "finished" else f"{self.status} at step {self.steps}"

    def holds_under(self, limits: Mapping[int, float]) -> bool:
        """Return whether a trial with these limits would end as this one did; one that is finished need not be."""
        return self.status != "stopped" or step_to_stop_at(self.curve, limits) is not None

    def row(self) -> dict[str, Any]:
        """The values as plain data, without the accuracy if it was not measured."""
        return {name: value for name, value in asdict(self).items() if name != "accuracy" or value is not None}

    def write(self, folder: Path) -> None:
        write_json(folder / ADAPTER_TRIAL_FILE, self.row())


_RESULTS = TypeAdapter(AdapterTrialResult)


def read_adapter_result(folder: Path) -> AdapterTrialResult | None:
    """The result of the trial whose run folder this is; None if it is not finished.

    Raises DataError for a file that lacks a value; values that this version does not know are left out.
    """
    path = folder / ADAPTER_TRIAL_FILE
    if not path.exists():
        return None
    way_out = "; remove this file, and the same command makes it again"
    return read_typed(path, _RESULTS, "the result of a trial", way_out=way_out)


def step_to_stop_at(curve: Sequence[tuple[int, float]], limits: Mapping[int, float]) -> int | None:
    """Return the first step at which the lowest held-out loss so far is above the step's limit; None if there is none.

    Args:
        curve: (step, held-out loss), steps rising.
        limits: {step: limit}; other steps have none.
    """
    lowest = math.inf
    for step, loss in curve:
        lowest = min(lowest, loss)
        if lowest > limits.get(step, math.inf):
            return step
    return None


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


def comparison_metric(results: Sequence[AdapterTrialResult]) -> Metric:
    """Accuracy if it was measured, else validation loss, else training loss; of results that are finished."""
    if results[0].accuracy is not None:
        return ACCURACY
    return FINAL_LOSS if results[0].val_loss is None else VAL_LOSS


def mean_figure(results: Sequence[AdapterTrialResult]) -> float | None:
    """The mean over a setting's seeds of the figure that settings are compared by; None unless all of them finished."""
    if any(result.status != "finished" for result in results):
        return None
    return statistics.mean(getattr(result, comparison_metric(results).name) for result in results)


def mean_objective(results: Sequence[AdapterTrialResult]) -> float | None:
    """The mean figure of a setting, negated if more of it is better; None unless all seeds finished."""
    figure = mean_figure(results)
    return figure if figure is None or comparison_metric(results).mode == "min" else -figure


def outcome(results: Sequence[AdapterTrialResult]) -> dict[str, Any]:
    """The outcome of a point whose trials are over, for the search."""
    return {
        "objective": mean_objective(results),
        "curve": [list(pair) for pair in results[0].curve],
        "steps": sum(result.steps for result in results),
        "seconds": sum(result.seconds for result in results),
    }
