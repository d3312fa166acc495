"""One trial: the keys' training and the search, on features that all trials share; its result is a file.

The features lie in Ray's object store once per node. A trial maps them without copying, takes its rows batch by batch,
and owns nothing larger than its keys. Everything here is chosen on validation images; test is unknown to it.

A trial's last act is to write its `result.json`: a sweep started again runs the trials without one.

Legend: M keys, B validation images, N classes, V views, C width of a source's features.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cafo.cache import (
    Cache,
    Epoch,
    KeyTraining,
    accuracy,
    load_cache,
    mean_key,
    save_cache,
    train_keys,
    zero_shot_logits,
)
from cafo.ensemble import table5
from cafo.search import search, weight_grid
from rayjobs.storage.files import atomic_path, read_json, write_json
from rayjobs.storage.paths import cached_path
from rayjobs.tune.search_space import SearchConfig, Trial

CACHE, RESULT = "cache.safetensors", "result.json"


@dataclass(frozen=True, kw_only=True)
class SharedInputs:
    """What all trials read: numpy arrays, which Ray maps into every process without a copy."""

    views: Mapping[str, np.ndarray]
    """encoder → (V, M', C): every image that may become a key"""
    labels: np.ndarray
    """(M',)"""
    few_shot: Mapping[tuple[int, int], np.ndarray]
    """(shots, seed) → rows of `views`"""
    generated: Mapping[int, np.ndarray]
    """K' → rows of `views`"""
    val: Mapping[str, np.ndarray]
    """encoder → (B, C)"""
    val_labels: np.ndarray
    """(B,)"""
    classifiers: Mapping[tuple[str, str], np.ndarray]
    """(encoder, sentences) → W (C, N)"""
    class_names: tuple[str, ...]
    identities: Mapping[str, str]


class SharedRows:
    """Some rows of shared views, indexed like a (V, M, C) tensor: gathered batch by batch, never copied as a whole."""

    def __init__(self, features: Tensor, views: int, rows: Tensor) -> None:
        self.features, self.rows = features[:views], rows
        self.shape = torch.Size((views, len(rows), features.shape[2]))

    def __getitem__(self, at: tuple[int, Tensor]) -> Tensor:
        view, rows = at
        return self.features[view, self.rows[rows]]

    def moved(self, device: str) -> "SharedRows":
        """The same rows, alone, in a device's memory."""
        return SharedRows(
            self.features[:, self.rows].to(device), self.shape[0], torch.arange(len(self.rows), device=device)
        )

    def keys(self) -> Tensor:
        """(M, C): the mean over views, as `mean_key` takes it."""
        blocks = [mean_key(self.features[:, block]) for block in self.rows.split(64)]
        return torch.cat(blocks) if blocks else self.features.new_zeros(0, self.shape[2])


def shared_tensor(array: np.ndarray) -> Tensor:
    """A tensor on a shared array's own memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is read-only; nothing here writes to it
        return torch.from_numpy(array)


def run_trial(
    trial: Trial,
    shared: SharedInputs,
    how: SearchConfig,
    folder: Path,
    device: str = "cpu",
    report: Callable[[list[float]], None] = lambda curve: None,
) -> dict[str, Any]:
    """Trains the keys, searches α, β and weights on val, writes the cache; returns the row of `results.parquet`.

    `report` is told after every epoch of training the val accuracy, at the initial α and β, of all epochs so far, the
    first being that of the untrained keys; an exception from it ends the trial.
    """
    started = time.monotonic()
    setting = trial.setting
    rows = np.concatenate([shared.few_shot[trial.shots, trial.seed], shared.generated[setting.generated]])
    taken = torch.from_numpy(rows)
    views = {name: SharedRows(shared_tensor(shared.views[name]), setting.views, taken) for name in setting.encoders}
    if device != "cpu":
        views = {name: v.moved(device) for name, v in views.items()}
    val = {name: shared_tensor(shared.val[name]).to(device) for name in setting.encoders}
    val_labels = shared_tensor(shared.val_labels).to(device)
    zero_shot_source = setting.encoders[0]
    start = Cache(
        keys={name: v.keys() for name, v in views.items()},
        labels=torch.from_numpy(shared.labels[rows]).to(device),
        classifier=shared_tensor(shared.classifiers[zero_shot_source, setting.sentences]).to(device),
        class_names=shared.class_names,
        zero_shot_source=zero_shot_source,
        encoders={name: shared.identities[name] for name in setting.encoders},
        alpha=setting.alpha,
        beta=setting.beta,
        ensemble=table5(setting.encoders)[setting.ensemble],
    )
    curve: list[float] = []

    def after(epoch: Epoch) -> None:
        curve.append(epoch.val_accuracy)
        report(curve)

    if setting.epochs:
        recipe = KeyTraining(epochs=setting.epochs, batch=how.batch, lr=setting.lr, seed=trial.seed)
        gathered: Any = views  # Rows stand in for tensors
        trained, best = train_keys(start, gathered, start.labels, val, val_labels, recipe, after)
    else:
        trained, best = start, Epoch(epoch=0, loss=math.nan, val_accuracy=accuracy(start.logits(val), val_labels))
        after(best)
    zero_shot = trained.zero_shot(val)
    used = start.ensemble.sources or setting.encoders
    candidates = weight_grid(start.ensemble, used, how.temperatures, how.scales)
    affinities = trained.affinities(val)
    found = search(zero_shot, affinities, trained.labels, val_labels, grid=how.grid(), ensembles=candidates)
    chosen = replace(trained, alpha=found.alpha, beta=found.beta, ensemble=found.ensemble)
    with atomic_path(folder / trial.name / CACHE) as temporary:
        save_cache(chosen, temporary)
    landscapes = [asdict(landscape) for landscape in found.landscapes]
    write_json(folder / trial.name / "landscape.json", {"total": found.total, "landscapes": landscapes})
    row = _row(trial, "finished", curve) | {
        "val_correct": found.correct,
        "val_images": found.total,
        "val_accuracy": found.accuracy,
        "zero_shot_val_accuracy": accuracy(zero_shot_logits(val[zero_shot_source], start.classifier), val_labels),
        "chosen_alpha": found.alpha,
        "chosen_beta": found.beta,
        "chosen_ensemble": json.dumps(asdict(found.ensemble)),
        "best_epoch": best.epoch,
        "keys": len(rows),
        "seconds": time.monotonic() - started,
    }
    write_json(folder / trial.name / RESULT, row)
    return row


def stop_trial(trial: Trial, curve: list[float], folder: Path) -> dict[str, Any]:
    """The row of a trial that a scheduler stopped in the middle of its training: no α, β or accuracy was chosen."""
    row = _row(trial, "stopped", curve)
    write_json(folder / trial.name / RESULT, row)
    return row


def read_result(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """The row of a trial that is over, finished or stopped."""
    path = folder / trial.name / RESULT
    return read_json(path) if path.exists() else None


def open_cache(folder: Path, trial: str) -> Cache:
    """The cache that a trial has left."""
    return load_cache(cached_path(folder / trial / CACHE))


def _row(trial: Trial, status: str, curve: list[float]) -> dict[str, Any]:
    about = {"trial": trial.name, "status": status, "shots": trial.shots, "seed": trial.seed}
    encoders = " + ".join(trial.setting.encoders)
    return {**about, **trial.setting._asdict(), "encoders": encoders, "val_curve": list(curve)}
