"""Sweeps adapter-train's settings with Ray Tune: the paper's ablations, or a search of one's own.

Each trial is an ordinary adapter-train run in `trials/`, chosen on validation loss, or on the accuracy of ScienceQA's
problems where `sweep.scienceqa` names some. The same command goes on where it stopped: finished trials are not run
again, and one that was cut off resumes.
"""

import functools
import itertools
import json
import statistics
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field
from ray import tune

from adapter.base_checkpoint import Checkpoint
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerRange
from rayjobs.config import config, load, to_dict
from rayjobs.console import Progress, show_table
from rayjobs.data.records import SourceConfig
from rayjobs.errors import UserError
from rayjobs.jobs import adapter_eval, adapter_train
from rayjobs.lifecycle import job
from rayjobs.reporting import plots
from rayjobs.reporting.figures import save_plot
from rayjobs.runs.run_dir import open_run
from rayjobs.storage.files import read_json, read_jsonl, write_json, write_parquet, write_text
from rayjobs.storage.fingerprint import fingerprint

FIRST_STEPS = 50
"""Of the loss curves that are plotted apart: where an unstable start shows."""


@config
class SweepConfig:
    """What varies."""

    axes: dict[str, list[Any]] = Field(min_length=1)
    """Setting → its values, such as {adapter.n_layers: [10, 20, 30], adapter.attention: [zero-init, rand-init]}. Trials
    that come to the same are trained once."""
    method: Literal["grid", "each"] = "grid"
    """grid: all combinations; each: one axis at a time, the others as the config has them."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Every setting is trained with each; figures are means over them."""
    at_once: int = Field(default=1, ge=1)
    """Trials that run side by side, each with scale.workers workers; with a fraction as scale.gpus_per_worker they
    share a GPU."""
    scienceqa: SourceConfig | None = None
    """ScienceQA's folder; its val split, unless another is named, is answered by every trial's adapter. Not test, which
    is not for choosing."""


@config
class Config(adapter_train.Config):
    JOB: ClassVar = "adapter-tune"

    sweep: SweepConfig


Trial = tuple[dict[str, Any], int]
"""A point of the space, and a seed."""


def points(sweep: SweepConfig) -> list[dict[str, Any]]:
    """Every setting to try, as overrides."""
    if sweep.method == "each":
        return [{name: value} for name, values in sweep.axes.items() for value in values]
    return [dict(zip(sweep.axes, values, strict=True)) for values in itertools.product(*sweep.axes.values())]


def told(point: dict[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in point.items())


def training(settings: Config, trial: Trial) -> adapter_train.Config:
    """A trial's settings; those that come to the same have one folder. Raises ConfigError for an axis that is none."""
    point, seed = trial
    values = {name: value for name, value in to_dict(settings).items() if name != "sweep"}
    ours = load(adapter_train.Config, values, {**point, "train.seed": seed})
    theirs = to_dict(ours)
    changed = {name: _at(theirs, name) for name in point if _at(theirs, name) != _at(values, name)}
    digest = fingerprint([changed, seed])[:10]
    folder, cache = str(settings.run.folder / "trials"), str(settings.run.cache_folder)
    return replace(ours, run=replace(ours.run, name=f"seed{seed}-{digest}", storage=folder, cache=cache))


def _at(values: Any, name: str) -> Any:
    """What a dotted name stands for in nested values, of which some may be null."""
    return functools.reduce(lambda section, key: (section or {}).get(key), name.split("."), values)


def evaluation(settings: Config, ours: adapter_train.Config, adapter: str | None = None) -> adapter_eval.Config:
    """How a trial's adapter is measured; without it, what can be told beforehand."""
    source = {"split": "val", **{k: v for k, v in to_dict(settings.sweep.scienceqa).items() if v is not None}}
    values = to_dict(ours)
    asked = {
        "base": values["base"],
        "vision": values["vision"] if adapter else None,
        "adapter": adapter,
        "task": "scienceqa",
        "data": {"path": [source], "template": ours.data.template, "max_length": ours.data.max_length},
        "scale": {name: values["scale"][name] for name in ("workers", "cpus_per_worker", "gpus_per_worker")},
        "run": {**values["run"], "name": "eval", "storage": str(ours.run.folder)},
    }
    return load(adapter_eval.Config, asked)


def evaluated_on(settings: Config, ours: adapter_train.Config) -> str | None:
    """What the accuracy of a trial depends on besides its adapter, by content; None where it is not measured."""
    if settings.sweep.scienceqa is None:
        return None
    (source,) = adapter_eval.check(measure := evaluation(settings, ours))[1]
    told = adapter_eval.task_identity(measure, source, reads_images=ours.vision is not None)
    return fingerprint(told)[:10]


def check(settings: Config) -> list[Trial]:
    """All trials, every one's settings proven. Raises ValueError."""
    if settings.scale.workers.min < settings.scale.workers.max:  # Tune could not tell how many trials there is room for
        raise UserError(f"scale.workers must be one number in a sweep, got {settings.scale.workers}")
    if fixed := [name for name in settings.sweep.axes if name == "train.seed" or name.split(".")[0] == "run"]:
        raise UserError(
            f"sweep.axes cannot hold {', '.join(fixed)}: seeds are given as sweep.seeds, and every trial has a folder "
            "of its own"
        )
    trials = list(itertools.product(points(settings.sweep), settings.sweep.seeds))
    proven: dict[str, Checkpoint] = {}
    for trial in trials:
        ours = training(settings, trial)
        reads = json.dumps([to_dict(ours)[name] for name in ("base", "data", "vision")])
        if reads in proven:  # an encoder takes seconds to load
            adapter_train.check_fit(ours, proven[reads])
            continue
        proven[reads] = adapter_train.check(ours)[0]
        chosen_on = ours.data.val_sources()
        if settings.sweep.scienceqa is not None:
            chosen_on += adapter_eval.check(evaluation(settings, ours))[1]
        if any(source.split == "test" for source in chosen_on):
            raise UserError(
                "a sweep chooses, and test is not for choosing: name val in data.val_path and sweep.scienceqa, and "
                "measure what is chosen with adapter-eval"
            )
    return trials


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    trials = check(settings)
    rows = [[told(point), ", ".join(map(str, settings.sweep.seeds))] for point in points(settings.sweep)]
    different = len({_folder(settings, trial) for trial in trials})
    title = f"{len(trials)} trials, {different} of them different, {settings.sweep.at_once} at once"
    show_table(title, ["setting", "seeds"], rows)


@job
def run(settings: Config) -> dict[str, Any]:
    """Returns and writes `result.json`, beside `results.parquet` with a row per trial, `table.md` and a plot."""
    trials = check(settings)
    folder = open_run(settings.run, settings)
    folders: dict[Path, Trial] = {}
    for trial in trials:
        folders.setdefault(_folder(settings, trial), trial)
    left = [trial for trial in folders.values() if not _over(settings, [trial])]
    if left:
        connect(folder, settings.run.cache_folder)
        together = settings.scale.workers.max * settings.sweep.at_once
        worker = replace(settings.scale, workers=WorkerRange(min=together, max=together)).resources()
        adapter_train.prepare(training(settings, left[0]))  # once, and not by all of them at the same time
        _run_trials(settings, list(folders.values()), left, worker)
    rows = _over(settings, trials)
    write_parquet(folder / "results.parquet", pa.Table.from_pylist(rows))
    result = _summary(settings, rows)
    write_json(folder / "result.json", result)
    _plot(settings, trials, folder)
    show_table(
        settings.run.name, list(result["settings"][0]), [[str(v) for v in row.values()] for row in result["settings"]]
    )
    return result


def _folder(settings: Config, trial: Trial) -> Path:
    return training(settings, trial).run.folder


def _over(settings: Config, trials: list[Trial]) -> list[dict[str, Any]]:
    """The rows of those trials that were trained, and measured as is asked now."""
    rows = []
    for trial in trials:
        ours = training(settings, trial)
        path = ours.run.folder / "trial.json"
        row = read_json(path) if path.exists() else {}
        if row and row.get("evaluated_on") == evaluated_on(settings, ours):
            rows.append({**row, "setting": told(trial[0])})
    return rows


def _run_trials(settings: Config, all_trials: list[Trial], left: list[Trial], worker: Mapping[str, float]) -> None:
    at_once = settings.sweep.at_once

    def trainable(point: dict[str, Any]) -> None:
        tune.report(run_trial(settings, left[point["trial"]], worker))

    def tell() -> None:
        over = _over(settings, all_trials)
        bar.update(len(over), f"best: {_best(over)[1]}" if over else "")

    class Watch(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            tell()

    done = len(all_trials) - len(left)
    with Progress("tune", unit="trials", total=len(all_trials), done=done) as bar, reraise_user_errors():
        tell()
        results = tune.Tuner(
            # its workers reserve their own; itself, and Train's controller with it, it stays as safe as this job
            tune.with_resources(trainable, tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])),
            param_space={"trial": tune.grid_search(list(range(len(left))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex[:8],
                storage_path=str(settings.run.folder / "tune"),
                verbose=0,
                callbacks=[Watch()],
            ),
        ).fit()
        if results.errors:
            raise results.errors[0]


def run_trial(settings: Config, trial: Trial, worker: Mapping[str, float]) -> dict[str, Any]:
    """Trains, measures, and writes `trial.json`: the trial's row. Each worker reserves as much as is told."""
    point, seed = trial
    ours = training(settings, trial)
    scale = {**to_dict(ours.scale), "cpus_per_worker": worker["CPU"], "gpus_per_worker": worker.get("GPU", 0)}
    ours = load(adapter_train.Config, {**to_dict(ours), "scale": scale})
    trained = adapter_train.run(ours)
    losses = [row["loss"] for row in read_jsonl(ours.run.folder / "metrics.jsonl") if "loss" in row]
    row = {
        "setting": told(point),
        "seed": seed,
        "run": ours.run.name,
        "trainable_parameters": trained["trainable_parameters"],
        "first_loss": losses[0],
        "peak_loss": max(losses),
        "final_loss": statistics.mean(losses[-10:]),
        "val_loss": trained["val_loss"],
        "evaluated_on": evaluated_on(settings, ours),
    }
    if settings.sweep.scienceqa is not None:
        measure = evaluation(settings, ours, trained["adapter"])
        measure = replace(measure, run=replace(measure.run, name=f"eval-{row['evaluated_on']}"))
        row["accuracy"] = adapter_eval.run(measure)["accuracy"]
    write_json(ours.run.folder / "trial.json", row)
    return row


def _summary(settings: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = ["first_loss", "peak_loss", "final_loss", "val_loss", "accuracy"]
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        line: dict[str, Any] = {"setting": setting, "trainable parameters": f"{mine[0]['trainable_parameters']:,}"}
        for name in columns:
            values = [row[name] for row in mine if row.get(name) is not None]
            if values:
                line[name.replace("_", " ")] = _mean(values, 2 if name == "accuracy" else 4)
        lines.append(line)
    best, with_mean = _best(rows)
    names = list(lines[0])
    cells = [names, ["---"] + ["---:"] * (len(names) - 1), *([line.get(name, "") for name in names] for line in lines)]
    write_text(settings.run.folder / "table.md", "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells))
    return {"headline": f"best: {with_mean}", "best": best, "trials": len(rows), "settings": lines}


def _best(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The setting of the best mean on validation, the earliest on ties; and the same with that mean."""
    name = "accuracy" if "accuracy" in rows[0] else "final_loss" if rows[0]["val_loss"] is None else "val_loss"
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["setting"], []).append(row[name])
    best = max(found, key=lambda setting: statistics.mean(found[setting]) * (1 if name == "accuracy" else -1))
    return best, f"{best}, {name.replace('_', ' ')} {_mean(found[best], 2 if name == 'accuracy' else 4)}"


def _mean(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _plot(settings: Config, trials: list[Trial], folder: Path) -> None:
    """Losses of the first steps, a line per setting and seed: `first_steps.png`."""
    figure, axes = plots.panel("step", "training loss")
    for number, point in enumerate(points(settings.sweep)):
        for i, seed in enumerate(settings.sweep.seeds):
            rows = read_jsonl(_folder(settings, (point, seed)) / "metrics.jsonl")
            losses = [row["loss"] for row in rows if "loss" in row][:FIRST_STEPS]
            label = "_" if i else plots.plain_text(told(point))
            axes.plot(range(1, len(losses) + 1), losses, color=f"C{number}", label=label, linewidth=1)
    plots.legend_outside(figure)
    save_plot(folder / "first_steps.png", f"training loss of the first {FIRST_STEPS} steps", figure)
