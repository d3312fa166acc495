"""Open the test split, once, and score what a sweep has chosen on val: by seed, by class, confusions, shifts."""

import hashlib
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from pydantic import Field

from cafo.datasets import Dataset
from rayjobs import plots
from rayjobs.accuracy import ZERO_SHOT, by_method, published_rows, summary, table, write_tables
from rayjobs.base import PoolConfig
from rayjobs.choice import best_on_val, shown
from rayjobs.config import config, load, to_dict
from rayjobs.examples import ORDER, mistakes_first, write_examples
from rayjobs.features import Features, open_towers, prepare_features
from rayjobs.imagery import ImageList, ImagesConfig, plain_list
from rayjobs.jobs import cafo_tune
from rayjobs.places import AnyPath, place
from rayjobs.report import save_plot, show_table
from rayjobs.runs import begin, recorded
from rayjobs.runtime import RunConfig, connect
from rayjobs.tables import read_json, write_json, write_jsonl, write_parquet
from rayjobs.trial import open_cache


@config
class Config:
    sweep: AnyPath
    """The folder of a run of cafo-tune; what is found goes into its `test`."""
    targets: dict[str, ImagesConfig] = Field(default_factory=dict)
    """Other test sets with the same classes, by name: the distribution shift."""
    plots: bool = True
    """Draw PNGs: accuracy over shots, the search for α and β, which source weighs most."""
    scale: PoolConfig = PoolConfig()
    """The encoders' pool."""

    @property
    def run(self) -> RunConfig:
        """The sweep's."""
        folder = place(self.sweep)
        saved = folder / "config.yaml"
        known = yaml.safe_load(saved.read_text(encoding="utf-8")).get("run", {}) if saved.is_file() else {}
        return RunConfig(**{**known, "name": folder.name, "storage": str(folder.parent)})


def check(settings: Config) -> tuple[cafo_tune.Config, list[dict[str, Any]]]:
    """The sweep's settings and choice. Raises ValueError if it has not chosen."""
    folder = settings.run.folder
    if not (folder / cafo_tune.SWEEP).is_file():
        raise ValueError(f"{folder} is no run of cafo-tune: there is no {cafo_tune.SWEEP}")
    if not (folder / "chosen.json").is_file():
        raise ValueError(f"{folder} has not chosen yet, and test is not for choosing: run cafo-tune to its end first")
    swept = load(cafo_tune.Config, {**read_json(folder / cafo_tune.SWEEP), "run": to_dict(settings.run)})
    return swept, read_json(folder / "chosen.json")["chosen"]


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    swept, chosen = check(settings)
    rows = [["sweep", settings.sweep], ["targets", ", ".join(["test", *settings.targets])]]
    rows += [[f"{cell['shots']} shots", f"{cell['method']}: {len(cell['seeds'])} seeds"] for cell in chosen]
    show_table("plan", ["", ""], [*rows, ["encoders", ", ".join(swept.encoders)]])


@recorded
def run(settings: Config) -> dict[str, Any]:
    """Writes the sweep's `test` folder: accuracies, also by class, and confusions in Parquet, tables and plots."""
    swept, chosen = check(settings)
    folder, trials = settings.run.folder / "test", settings.run.folder / "trials"
    dataset = swept.data.open()
    if dataset.name in settings.targets:
        raise ValueError(f"targets.{dataset.name} has the name of the data set itself: call it otherwise")
    sets = {dataset.name: dataset, **{name: target.open() for name, target in settings.targets.items()}}
    for name, target in sets.items():
        if target.class_names != dataset.class_names:
            raise ValueError(f"targets.{name} has other classes than {dataset.name}")
    connect(settings.run.folder, settings.run.cache_folder)
    resources = settings.scale.resources()
    record_opening(folder, chosen, sets)
    begin(settings.run.folder, settings)
    lists = [plain_list(name, target.image_root, target.open_test()) for name, target in sets.items()]
    used = dict.fromkeys(name for cell in chosen for name in cell["setting"]["encoders"])
    towers = open_towers({name: swept.encoders[name] for name in used})
    same_encoders(chosen, trials, {name: tower.identity for name, tower in towers.items()})
    features = prepare_features(
        lists,
        towers,
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
    tables = {name: table(of[name], paper[name]) for name in sets}
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


def keep_examples(folder: Path, trials: Path, chosen: list[dict[str, Any]], images: ImageList, found: Features) -> None:
    """Small copies of some test images, with what the cell that did best on val says of them; mistakes first."""
    best = best_on_val(chosen)
    cache = open_cache(trials, best["seeds"][0]["trial"])
    shares = cache.logits({name: torch.tensor(found.values[name][0]) for name in cache.encoders}).softmax(dim=1)
    items = [images.items[row] for row in found.rows]
    wrong = [i for i, item in enumerate(items) if int(shares[i].argmax()) != item.label]
    right = sorted(set(range(len(items))) - set(wrong))
    shown = []
    for i in mistakes_first(wrong, right):
        said = int(shares[i].argmax())
        truth = "" if said == items[i].label else f", not {items[i].class_name}"
        caption = f"{cache.class_names[said]}{truth} ({shares[i, said]:.0%})"
        shown.append((images.root / items[i].path, caption))
    write_examples(folder, shown, f"{best['method']} at {best['shots']} shots, first seed; {ORDER}")


def same_encoders(chosen: list[dict[str, Any]], trials: Path, identities: dict[str, str]) -> None:
    """Keys mean something to the encoders that made them. Raises ValueError if the config names others by now."""
    for trial in {seed["trial"] for cell in chosen for seed in cell["seeds"]}:
        for name, identity in open_cache(trials, trial).encoders.items():
            if identities[name] != identity:
                raise ValueError(
                    f"encoders.{name}: the sweep's caches are of {identity}, the weights are now {identities[name]}; "
                    "put back the weights that it was run with"
                )


def record_opening(folder: Path, chosen: list[dict[str, Any]], sets: dict[str, Dataset]) -> None:
    """Writes down that test was opened and for which choice. Raises ValueError if it was opened for another."""
    digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
    path = folder / "opened.json"
    before = read_json(path) if path.exists() else {}
    if before and before["choice"] != digest:
        raise ValueError(
            f"{path}: test was opened on {before['opened']} for another choice; a choice made after that is not blind. "
            "Sweep under another run.name"
        )
    opened = before.get("opened") or datetime.now(timezone.utc).isoformat(timespec="seconds")
    targets = sorted({*before.get("targets", []), *sets})
    write_json(path, {"opened": opened, "choice": digest, "targets": targets})


def score(
    target: str, chosen: list[dict[str, Any]], values: dict[str, torch.Tensor], labels: torch.Tensor, trials: Path
) -> list[dict[str, Any]]:
    """A row per chosen cache, and one per zero-shot classifier: accuracy and confusion (N, N), true class down."""
    rows: list[dict[str, Any]] = []
    baselines: dict[bytes, dict[str, Any]] = {}
    for cell in chosen:
        for seed in cell["seeds"]:
            cache = open_cache(trials, seed["trial"])
            taken = {name: values[name] for name in {*cache.keys, cache.zero_shot_source}}
            base = {"target": target, "shots": cell["shots"], "method": cell["method"], "seed": seed["seed"]}
            combination = cache.combined(taken)
            most = combination.shares.argmax(dim=1)
            wins = {
                source: torch.bincount(labels[most == i], minlength=len(cache.class_names)).tolist()
                for i, source in enumerate(combination.sources)
            }
            rows.append({**base, **_scored(combination.logits(cache.alpha), labels), "wins": wins})
            key = hashlib.sha256(cache.classifier.numpy().tobytes()).digest()
            if key not in baselines:
                sort = f"{cell['setting']['encoders'][0]}, {cell['setting']['sentences']}"
                baselines[key] = {"target": target, "shots": None, "method": f"{ZERO_SHOT} ({sort})", "seed": None}
                baselines[key] |= _scored(cache.zero_shot(taken), labels)
    if len(baselines) == 1:
        next(iter(baselines.values()))["method"] = ZERO_SHOT
    return [*baselines.values(), *rows]


def _scored(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    classes = logits.shape[1]
    pairs = torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2)
    confusion = pairs.reshape(classes, classes).numpy()
    correct = int(np.trace(confusion))
    return {
        "images": len(labels),
        "correct": correct,
        "accuracy": correct / max(len(labels), 1),
        "confusion": confusion,
    }


def write_rows(folder: Path, rows: list[dict[str, Any]], dataset: Dataset) -> None:
    """`accuracy.parquet`, `per_class.parquet`, `sources.parquet` (at how many images of a class each source weighs
    most) and `confusion.parquet` (pairs that occur only)."""
    per_class, confusions, sources = [], [], []
    for row in rows:
        about = {name: row[name] for name in ("target", "method", "shots", "seed")}
        for label, counts in enumerate(row["confusion"]):
            seen = {"images": int(counts.sum()), "correct": int(counts[label])}
            per_class.append({**about, "class": dataset.class_names[label], **seen})
            for other in np.flatnonzero(counts):
                names = {"true": dataset.class_names[label], "predicted": dataset.class_names[other]}
                confusions.append({**about, **names, "images": int(counts[other])})
        for source, counts in row.get("wins", {}).items():
            named = zip(dataset.class_names, counts, strict=True)
            sources += [{**about, "class": name, "source": source, "images": count} for name, count in named]
    plain = [{name: value for name, value in row.items() if name not in ("confusion", "wins")} for row in rows]
    listed = {"accuracy": plain, "per_class": per_class, "sources": sources, "confusion": confusions}
    for name, lines in listed.items():
        write_parquet(folder / f"{name}.parquet", pa.Table.from_pylist(lines))


def draw(
    folder: Path, trials: Path, chosen: list[dict[str, Any]], rows: list[dict[str, Any]], dataset: Dataset
) -> None:
    """Of the best choice, 00, and of each other method's at its most shots, first seed: val accuracy over α and β; on
    test each class's accuracy, the confusion, and which source wins."""
    for number, cell in enumerate(shown(chosen)):
        seed = cell["seeds"][0]
        title = f"{cell['method']}, {cell['shots']} shots, seed {seed['seed']}"
        found = read_json(trials / seed["trial"] / "surface.json")
        accuracy = [[100 * count / found["total"] for count in line] for line in found["correct"]]
        figure = plots.search_landscape(found["alphas"], found["betas"], accuracy, (seed["alpha"], seed["beta"]))
        save_plot(folder / f"landscape-{number:02d}.png", f"{title}: accuracy on val over α and β", figure)
        (row,) = (
            r for r in rows if (r["method"], r["shots"], r["seed"]) == (cell["method"], cell["shots"], seed["seed"])
        )
        images = row["confusion"].sum(axis=1)
        accuracy = (100 * row["confusion"].diagonal() / images.clip(min=1)).tolist()
        figure = plots.class_accuracy(dataset.class_names, accuracy)
        save_plot(folder / f"classes-{number:02d}.png", f"{title}: accuracy of each class on test", figure)
        figure = plots.confusion(dataset.class_names, row["confusion"].tolist())
        save_plot(folder / f"confusion-{number:02d}.png", f"{title}: confusion on test", figure)
        if len(row["wins"]) > 1:
            shares = {
                source: [100 * count / max(total, 1) for count, total in zip(counts, images, strict=True)]
                for source, counts in row["wins"].items()
            }
            figure = plots.winning_sources(dataset.class_names, shares)
            save_plot(folder / f"sources-{number:02d}.png", f"{title}: which source weighs most on test", figure)
