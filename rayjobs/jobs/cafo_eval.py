"""Open the test split, once, and score what a sweep has chosen on val: by seed, by class, confusions, shifts."""

import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field

from cafo.datasets import Dataset
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerPoolConfig
from rayjobs.config import config, load, to_dict
from rayjobs.console import show_table
from rayjobs.data.feature_store import open_encoders, prepare_features
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.data.image_list import plain_list
from rayjobs.errors import UserError
from rayjobs.jobs import cafo_tune
from rayjobs.lifecycle import job
from rayjobs.reporting import plots
from rayjobs.reporting.accuracy_tables import accuracy_table, by_method, published_rows, summary, write_tables
from rayjobs.reporting.figures import save_plot
from rayjobs.runs.record import start_run
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.files import read_json, write_json, write_jsonl
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.storage.paths import AnyPath, resolve_path
from rayjobs.tune.evaluation import same_encoders, score, write_rows
from rayjobs.tune.figures import draw, keep_examples
from rayjobs.tune.selection import best_on_val


@config
class Config:
    sweep: AnyPath
    """The folder of a run of cafo-tune; what is found goes into its `test`."""
    targets: dict[str, ImageDatasetConfig] = Field(default_factory=dict)
    """Other test sets with the same classes, by name: the distribution shift."""
    plots: bool = True
    """Draw PNGs: accuracy over shots, the search for α and β, which source weighs most."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    """The encoders' pool."""

    @property
    def run(self) -> RunConfig:
        """The sweep's."""
        folder = resolve_path(self.sweep)
        saved = folder / "config.yaml"
        known = yaml.safe_load(saved.read_text(encoding="utf-8")).get("run", {}) if saved.is_file() else {}
        return RunConfig(**{**known, "name": folder.name, "storage": str(folder.parent)})


def check(settings: Config) -> tuple[cafo_tune.Config, list[dict[str, Any]]]:
    """The sweep's settings and choice. Raises ValueError if it has not chosen."""
    folder = settings.run.folder
    if not (folder / cafo_tune.SWEEP).is_file():
        raise UserError(f"{folder} is no run of cafo-tune: there is no {cafo_tune.SWEEP}")
    if not (folder / "chosen.json").is_file():
        raise UserError(f"{folder} has not chosen yet, and test is not for choosing: run cafo-tune to its end first")
    swept = load(cafo_tune.Config, {**read_json(folder / cafo_tune.SWEEP), "run": to_dict(settings.run)})
    return swept, read_json(folder / "chosen.json")["chosen"]


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    swept, chosen = check(settings)
    rows = [["sweep", settings.sweep], ["targets", ", ".join(["test", *settings.targets])]]
    rows += [[f"{cell['shots']} shots", f"{cell['method']}: {len(cell['seeds'])} seeds"] for cell in chosen]
    show_table("plan", ["", ""], [*rows, ["encoders", ", ".join(swept.encoders)]])


@job
def run(settings: Config) -> dict[str, Any]:
    """Writes the sweep's `test` folder: accuracies, also by class, and confusions in Parquet, tables and plots."""
    swept, chosen = check(settings)
    folder, trials = settings.run.folder / "test", settings.run.folder / "trials"
    dataset = swept.data.open()
    if dataset.name in settings.targets:
        raise UserError(f"targets.{dataset.name} has the name of the data set itself: call it otherwise")
    sets = {dataset.name: dataset, **{name: target.open() for name, target in settings.targets.items()}}
    for name, target in sets.items():
        if target.class_names != dataset.class_names:
            raise UserError(f"targets.{name} has other classes than {dataset.name}")
    connect(settings.run.folder, settings.run.cache_folder)
    resources = settings.scale.resources()
    record_opening(folder, chosen, sets)
    start_run(settings.run.folder, settings)
    lists = [plain_list(name, target.image_root, target.open_test()) for name, target in sets.items()]
    used = dict.fromkeys(name for cell in chosen for name in cell["setting"]["encoders"])
    encoders = open_encoders({name: swept.encoders[name] for name in used})
    same_encoders(chosen, trials, {name: encoder.identity for name, encoder in encoders.items()})
    features = prepare_features(
        lists,
        encoders,
        swept.features,
        swept.run.cache_folder,
        workers=settings.scale.workers.max,
        resources=resources,
    )
    write_jsonl(folder / "rejected.jsonl", (r._asdict() for found in features.values() for r in found.rejected))
    rows: list[dict[str, Any]] = []
    for images in lists:
        found = features[images.role]
        labels = torch.tensor([images.items[row].label for row in found.rows])
        values = {name: torch.tensor(value[0]) for name, value in found.values.items()}
        rows += score(images.role, chosen, values, labels, trials)
    write_rows(folder, rows, dataset)

    of = {name: [row for row in rows if row["target"] == name] for name in sets}
    cells = [cell["setting"] for cell in chosen]
    paper = {name: published_rows(dataset.name, name, swept.encoders, cells) for name in sets}
    tables = {name: accuracy_table(of[name], paper[name]) for name in sets}
    write_tables(folder, tables)
    if settings.plots:
        for name in sets:
            methods, level = by_method(of[name])
            figure = plots.accuracy_over_shots({"": methods}, {"": level}, paper[name])
            save_plot(folder / f"shots-{name}.png", f"accuracy over shots, {name}'s test", figure)
        draw(folder, trials, chosen, of[dataset.name], dataset)
        keep_examples(folder, trials, chosen, lists[0], features[dataset.name])
    best = best_on_val(chosen)
    told = [r["accuracy"] for r in of[dataset.name] if (r["method"], r["shots"]) == (best["method"], best["shots"])]
    result = {
        "headline": f"{summary(told)}% on {dataset.name}'s test with {best['method']} at {best['shots']} shots",
        "test_accuracy": round(100 * statistics.mean(told), 2),
        "zero_shot_accuracy": round(100 * max(r["accuracy"] for r in of[dataset.name] if r["shots"] is None), 2),
        "test_images": {name: len(found.rows) for name, found in features.items()},
        "rejected_images": sum(len(found.rejected) for found in features.values()),
        "tables": {
            name: {line[0]: dict(zip(columns[1:], line[1:], strict=True)) for line in lines}
            for name, (columns, lines) in tables.items()
        },
    }
    write_json(folder / "result.json", result)
    for name, (columns, lines) in tables.items():
        show_table(f"{name}: test accuracy, %", columns, lines)
    return result


def record_opening(folder: Path, chosen: list[dict[str, Any]], sets: dict[str, Dataset]) -> None:
    """Writes down that test was opened and for which choice. Raises ValueError if it was opened for another."""
    digest = fingerprint(chosen)
    path = folder / "opened.json"
    before = read_json(path) if path.exists() else {}
    if before and before["choice"] != digest:
        raise UserError(
            f"{path}: test was opened on {before['opened']} for another choice; a choice made after that is not blind. "
            "Sweep under another run.name"
        )
    opened = before.get("opened") or datetime.now(timezone.utc).isoformat(timespec="seconds")
    targets = sorted({*before.get("targets", []), *sets})
    write_json(path, {"opened": opened, "choice": digest, "targets": targets})
