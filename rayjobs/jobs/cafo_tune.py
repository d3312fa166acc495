"""Train and search caches over a space of settings, on features made once and shared; choose on validation images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from cafo import fewshot
from cafo.datasets import Dataset, Item
from cafo.fewshot import FewShot
from rayjobs.cluster.ray_init import connect
from rayjobs.cluster.worker_pool import WorkerPoolConfig, WorkerRange
from rayjobs.config import config, to_dict
from rayjobs.console import show_table
from rayjobs.data.feature_store import Features, FeaturesConfig, open_encoders, prepare_features
from rayjobs.data.image_dataset import ImageDatasetConfig
from rayjobs.data.image_list import ImageList, plain_list, training_list
from rayjobs.data.text_classifier import prepare_classifier
from rayjobs.errors import UserError
from rayjobs.lifecycle import job
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.reporting.accuracy_tables import accuracy_table
from rayjobs.runs.provenance import normalize_paths
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import atomic_path, read_json, write_json, write_jsonl, write_parquet
from rayjobs.tune.figures import plot_search_surfaces
from rayjobs.tune.inputs import check_same_inputs
from rayjobs.tune.search_space import SearchConfig, Setting, SpaceConfig, enumerate_settings, enumerate_trials
from rayjobs.tune.selection import best_on_val, choose_settings, keep_chosen
from rayjobs.tune.sweep import run_sweep
from rayjobs.tune.trial import SharedInputs

SWEEP = "sweep.json"
"""All settings of a sweep but where it runs: config.yaml is that of whatever job was typed."""


@config
class Config:
    data: ImageDatasetConfig
    encoders: dict[str, VisionEncoderConfig] = Field(min_length=1)
    """The encoders, by the names that `space` calls them; the first is the CLIP that gives p_ZS."""
    features: FeaturesConfig = FeaturesConfig()
    space: SpaceConfig = SpaceConfig()
    search: SearchConfig = SearchConfig()
    trials: WorkerPoolConfig = WorkerPoolConfig(workers=WorkerRange(min=2, max=2), gpus_per_worker=0)
    """Trials at once, and what each may use."""
    scale: WorkerPoolConfig = WorkerPoolConfig()
    """The encoders' pool."""
    run: RunConfig


def tried_settings(settings: Config) -> list[Setting]:
    """What the space holds. Raises ValueError if it cannot be searched."""
    tried = enumerate_settings(
        settings.space,
        settings.search,
        list(settings.encoders),
        settings.features.views,
        file=settings.data.prompts is not None,
    )
    settings.search.grid()
    if not enumerate_trials(settings.space, tried):
        raise UserError("the space holds no trial: K = K' = 0 leaves nothing to cache")
    return tried


def check(settings: Config) -> tuple[Dataset, list[Setting]]:
    """Everything that can be told before a worker starts. Raises ValueError."""
    dataset, tried = settings.data.open(), tried_settings(settings)
    for kind in {setting.sentences for setting in tried}:
        settings.data.sentences(dataset, kind)  # type: ignore[arg-type]
    settings.data.drawn(dataset, max(setting.generated for setting in tried))
    return dataset, tried


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    dataset, tried = check(settings)
    rows = [
        ["data set", f"{dataset.name}: {len(dataset.class_names)} classes, {len(dataset.val)} validation images"],
        ["encoders", ", ".join(f"{name} ({e.kind} {e.name})" for name, e in settings.encoders.items())],
        ["search", searching(settings, tried)],
        ["shots", ", ".join(map(str, settings.space.shots))],
        ["seeds", ", ".join(map(str, settings.space.seeds))],
    ]
    show_table("plan", ["", ""], rows)


def searching(settings: Config, tried: list[Setting]) -> str:
    """How many trials, found how."""
    how, trials = settings.search, len(enumerate_trials(settings.space, tried))
    if how.method == "optuna":
        return f"optuna: {how.samples} suggestions for every K, of {len(tried)} settings, each over all seeds"
    return f"{how.method}: {trials} trials" + (", fewer where stopped" if how.method == "asha" else "")


def few_shot_choices(settings: Config, dataset: Dataset, folder: Path) -> dict[tuple[int, int], FewShot]:
    """The choice of each (shots, seed), read from the run where it stands there already, saved there otherwise."""
    choices = {}
    for shots in settings.space.shots:
        for seed in settings.space.seeds:
            path = folder / "few_shot" / f"shots{shots}-seed{seed}.json"
            if not path.exists():
                short = settings.data.short_classes
                choice = fewshot.choose(dataset.train, dataset.class_names, shots=shots, seed=seed, short=short)
                with atomic_path(path) as temporary:
                    fewshot.save(choice, temporary)
            choices[shots, seed] = fewshot.load(path)
    return choices


@job
def run(settings: Config) -> dict[str, Any]:
    """Returns and writes `result.json`; beside it `results.parquet` with a row per trial, `chosen.json`, and under
    `trials` the caches of the chosen ones."""
    dataset, tried = check(settings)
    same_sweep(settings)
    folder = open_run(settings.run, settings)
    connect(folder, settings.run.cache_folder)
    resources, of_trials = settings.scale.resources(), settings.trials.resources(beside=0)
    choices = few_shot_choices(settings, dataset, folder)
    encoders = open_encoders({name: settings.encoders[name] for name in _used(tried)})
    root, drawn = settings.data.drawn(dataset, max(setting.generated for setting in tried))
    lists = [
        training_list(dataset, choices.values(), settings.features.views),
        ImageList(role="generated", root=root, items=drawn, views=settings.features.views),
        plain_list("val", dataset.image_root, dataset.val),
    ]
    lists = [images for images in lists if images.items]
    cache = settings.run.cache_folder
    features = prepare_features(
        lists, encoders, settings.features, cache, workers=settings.scale.workers.max, resources=resources
    )
    rejected = [reject for found in features.values() for reject in found.rejected]
    write_jsonl(folder / "rejected.jsonl", (reject._asdict() for reject in rejected))
    classifiers = {
        (name, kind): prepare_classifier(
            encoders[name],
            settings.data.sentences(dataset, kind),  # type: ignore[arg-type]
            dataset.class_names,
            cache,
            resources,
        )
        for name, kind in {(setting.encoders[0], setting.sentences) for setting in tried}
    }
    check_same_inputs(folder, lists, features, choices, classifiers)
    keeps = {setting.generated for setting in tried}
    shared = SharedInputs(
        **share(settings, dataset, {images.role: images for images in lists}, features, choices, keeps),
        classifiers={key: made.weights.numpy() for key, made in classifiers.items()},
        class_names=dataset.class_names,
        identities={name: encoder.identity for name, encoder in encoders.items()},
    )
    del features  # their copy in `shared` is enough
    over = run_sweep(
        settings.space,
        tried,
        shared,
        settings.search,
        folder / "trials",
        at_once=settings.trials.workers.max,
        resources=of_trials,
    )
    rows = [row for _, row in over]
    names = dict.fromkeys(name for row in rows for name in row)
    every = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    write_parquet(folder / "results.parquet", every)
    chosen = choose_settings(over, settings.search.compare)
    keep_chosen(folder, chosen)
    plot_search_surfaces(folder, chosen, shared, settings.search)
    write_json(folder / "chosen.json", {"chosen_on": "val", "val_images": len(shared.val_labels), "chosen": chosen})
    finished = [row for row in rows if row["status"] == "finished"]
    best = best_on_val(chosen)
    columns, lines = accuracy_table([{**cell, "accuracy": cell["val_accuracy"]} for cell in chosen], {})
    result = {
        "headline": f"{best['val_accuracy']:.2%} on val with {best['method']} at {best['shots']} shots",
        "data_set": dataset.name,
        "val_accuracy": round(100 * best["val_accuracy"], 2),
        "trials": len(rows),
        "stopped_early": len(rows) - len(finished),
        "zero_shot_val_accuracy": round(100 * max(row["zero_shot_val_accuracy"] for row in finished), 2),
        "chosen: accuracy on val, %": [dict(zip(columns, line, strict=True)) for line in lines],
        "rejected_images": len(rejected),
        "short_classes": len({name for choice in choices.values() for name in choice.short}),
        "truncated_sentences": max(made.truncated for made in classifiers.values()),
    }
    write_json(folder / "result.json", result)
    show_table(f"{settings.run.name}: chosen, accuracy on val, %", columns, lines)
    return result


def same_sweep(settings: Config) -> None:
    """A sweep's folder belongs to its settings. Raises ValueError if others are found there."""
    path = settings.run.folder / SWEEP
    now = {name: value for name, value in to_dict(settings).items() if name not in ("run", "trials", "scale")}
    if path.exists() and (before := normalize_paths(read_json(path))) != normalize_paths(now):
        changed = [name for name, value in normalize_paths(now).items() if before.get(name) != value]
        raise UserError(f"{settings.run.folder} holds a sweep with other {', '.join(changed)}: choose another run.name")
    write_json(path, now)


def _used(tried: list[Setting]) -> list[str]:
    return list(dict.fromkeys(name for setting in tried for name in setting.encoders))


def share(
    settings: Config,
    dataset: Dataset,
    lists: Mapping[str, ImageList],
    features: Mapping[str, Features],
    choices: Mapping[tuple[int, int], FewShot],
    keeps: set[int],
) -> dict[str, Any]:
    """The arrays of `Shared`: what may become a key is one array, training images first, then generated ones."""
    roles = [role for role in ("train", "generated") if role in lists]
    place: dict[tuple[str, Item], int] = {}
    labels: list[int] = []
    for role in roles:
        for row in features[role].rows:
            item = lists[role].items[row]
            place[role, item] = len(labels)
            labels.append(item.label)

    def rows(role: str, items: tuple[Item, ...]) -> np.ndarray:
        """Where those of the images that could be read are; the others are in rejected.jsonl."""
        return np.array([place[role, item] for item in items if (role, item) in place], np.int64)

    val = features["val"]
    return {
        "views": {name: np.concatenate([features[role].values[name] for role in roles], axis=1) for name in val.values},
        "labels": np.array(labels, np.int64),
        "few_shot": {at: rows("train", choice.items) for at, choice in choices.items()},
        "generated": {keep: rows("generated", settings.data.drawn(dataset, keep)[1]) for keep in keeps},
        "val": {name: values[0] for name, values in val.values.items()},
        "val_labels": np.array([dataset.val[row].label for row in val.rows], np.int64),
    }
