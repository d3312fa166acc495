"""The finals of a comparison: each value's best setting, over seeds, on records of their own."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from rayjobs.reporting.paired_differences import mean_and_interval
from rayjobs.reporting.tables import accuracy_cell, markdown_table, mean_and_deviation
from rayjobs.storage.files import read_typed, write_json, write_text
from rayjobs.storage.hub_model import format_bytes
from rayjobs.tune.adapter_trial import AdapterTrialResult

FINAL_FILE = "final.json"
Table = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class FinalFigures:
    """The figures of one adapter, or of the base alone, on the records of the finals: its `final.json`."""

    evaluated_on: str
    """fingerprint of the records, and of how they are read and answered"""
    test_loss: float
    """per labelled token, as the other loss"""
    exact_match: float
    """share of the answers that are the records' own, in percent"""
    rouge_l: float
    answers: int
    other_loss: float | None = None
    """None if no other text is measured"""

    def write(self, folder: Path) -> None:
        write_json(folder / FINAL_FILE, asdict(self))


_FIGURES = TypeAdapter(FinalFigures)


def read_final(folder: Path) -> FinalFigures | None:
    """The figures in a folder; None if there are none. Raises DataError for a file that lacks one."""
    path = folder / FINAL_FILE
    way_out = "; remove this file, and the same command makes it again"
    return read_typed(path, _FIGURES, "figures of the finals", way_out=way_out) if path.exists() else None


class Finalist(NamedTuple):
    """A value that is compared, at its best setting."""

    value: str
    setting: str
    """what was chosen for it"""
    seeds: int
    """the number of seeds that were to be trained"""
    results: list[AdapterTrialResult]
    """of the seeds whose training did not diverge, with their figures in the same order"""
    figures: list[FinalFigures]


def describe_choice(overrides: Mapping[str, Any], axes: Mapping[str, Any], compared: str) -> str:
    """The values that were chosen for one of `compared`, such as `base_lr 0.01 (edge)`.

    edge: the number is the lowest or highest that was tried, so that one beyond it may be better.
    """
    parts = []
    for name, value in overrides.items():
        if name == compared:
            continue
        tried = [one for one in axes[name] if type(one) in (int, float)] if isinstance(axes[name], list) else []
        edge = len(set(tried)) > 1 and value in (min(tried), max(tried))
        shown = f"{value:.4g}" if isinstance(value, float) else value
        parts.append(f"{name.rpartition('.')[2]} {shown}" + " (edge)" * edge)
    return ", ".join(parts)


def finals_table(compared: str, base: FinalFigures, finalists: Sequence[Finalist]) -> Table:
    """A row for the base alone, and one for each value: means and deviations over seeds."""
    name = compared.rpartition(".")[2]
    rows = [{name: "none", **_figure_cells([base])}]
    for one in finalists:
        diverged = one.seeds - len(one.results)
        row = {name: one.value, "setting": one.setting}
        if diverged:
            row["setting"] += f", {diverged} of {one.seeds} seeds diverged"
        if one.results:
            row |= {**_training_cells(one.results), **_figure_cells(one.figures)}
        rows.append(row)
    return rows


def _training_cells(results: Sequence[AdapterTrialResult]) -> dict[str, str]:
    memory = [result.peak_memory_bytes for result in results if result.peak_memory_bytes is not None]
    speeds = [result.tokens_per_s for result in results if result.tokens_per_s is not None]
    return {
        "trainable parameters": f"{results[0].trainable_parameters:,}",
        "adapter": format_bytes(results[0].adapter_bytes or 0),
        **({"peak memory": format_bytes(max(memory))} if memory else {}),
        **({"tokens per s": f"{statistics.median(speeds):.0f}"} if speeds else {}),
    }


def _figure_cells(figures: Sequence[FinalFigures]) -> dict[str, str]:
    cells = {
        "test loss": mean_and_deviation([one.test_loss for one in figures], 3),
        "exact match, %": accuracy_cell([one.exact_match / 100 for one in figures], figures[0].answers),
        "ROUGE-L, %": mean_and_deviation([one.rouge_l for one in figures], 1),
    }
    other = [one.other_loss for one in figures if one.other_loss is not None]
    return cells | ({"loss on other text": mean_and_deviation(other, 3)} if other else {})


def differences(compared: str, finalists: Sequence[Finalist]) -> Table:
    """A row for each value but the first: its differences from the first, paired by seed, with 95% intervals.

    Seeds that diverged for either are left out.
    """
    name = compared.rpartition(".")[2]
    reference = _by_seed(finalists[0])
    rows = []
    for one in finalists[1:]:
        pairs = [(own, reference[seed]) for seed, own in _by_seed(one).items() if seed in reference]
        if not pairs:
            continue
        row = {
            f"{name}, less {finalists[0].value}": one.value,
            "test loss": mean_and_interval([own.test_loss - other.test_loss for own, other in pairs]),
            "exact match, points": mean_and_interval([own.exact_match - other.exact_match for own, other in pairs]),
        }
        forgotten = [
            own.other_loss - other.other_loss
            for own, other in pairs
            if own.other_loss is not None and other.other_loss is not None
        ]
        rows.append(row | ({"loss on other text": mean_and_interval(forgotten)} if forgotten else {}))
    return rows


def _by_seed(finalist: Finalist) -> dict[int, FinalFigures]:
    seeds = [result.seed for result in finalist.results]
    return dict(zip(seeds, finalist.figures, strict=True))


def write_comparison(path: Path, tables: Iterable[Table]) -> None:
    """Write the tables that have rows, with a note, as Markdown."""
    texts = []
    for rows in filter(None, tables):
        columns = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
        texts.append(markdown_table(columns, [[row.get(name, "") for name in columns] for row in rows]))
    write_text(path, "\n".join([*texts, NOTE]))


NOTE = (
    "± is the sample standard deviation over seeds. Brackets behind a share are Wilson's 95% interval over the "
    "answers, and behind a difference Student's 95% interval over seeds. (edge): the lowest or highest value that was "
    "tried.\n"
)


def method_comparison(finalists: Sequence[Finalist], configs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each run in the three parts of PEFT's method comparison: run_info, train_info, meta_info.

    configs: {name of a run: the settings of its training}.
    """
    runs = []
    for one in finalists:
        for result, figures in zip(one.results, one.figures, strict=True):
            config = configs[result.run]
            runs.append({
                "run_info": {
                    "experiment_name": f"{one.value}/{one.setting}/seed-{result.seed}",
                    "train_config": {name: config[name] for name in ("train", "optimizer", "data", "zero")},
                    "peft_config": config["adapter"],
                },
                "train_info": {
                    "status": "success",
                    "train_time": result.seconds,
                    "tokens_per_second": result.tokens_per_s,
                    "peak_memory": result.peak_memory_bytes,
                    "file_size": result.adapter_bytes,
                    "num_trainable_params": result.trainable_parameters,
                    "steps": result.steps,
                    "valid loss": result.val_loss,
                    **{name.replace("_", " "): value for name, value in asdict(figures).items()},
                },
                "meta_info": {"model_info": config["base"]},
            })  # fmt: skip
    return runs
