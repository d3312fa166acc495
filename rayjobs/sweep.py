"""A sweep: Ray Tune trials train keys and search on features that all of them share.

The features lie in Ray's object store once per node. A trial maps them without copying, takes its rows batch by batch,
and owns nothing larger than its keys. Everything here is chosen on validation images; test is unknown to it.

A trial's last act is to write its `result.json`, so that a sweep started again runs the trials without one: nothing
that was done is lost, whatever was killed, and two drivers on one sweep do no harm.

Legend: M keys, B validation images, N classes, V views, C width of a source's features.
"""

import json
import math
import os
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from torch import Tensor

from cafo.cache import Cache, Epoch, KeyTraining, accuracy, mean_key, save_cache, train_keys, zero_shot_logits
from cafo.ensemble import table5
from cafo.search import search, weight_grid
from rayjobs.runtime import Progress, unwrapped
from rayjobs.space import SearchConfig, Trial
from rayjobs.tables import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Shared:
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


class Rows:
    """Some rows of shared views, indexed like a (V, M, C) tensor: gathered batch by batch, never copied as a whole."""

    def __init__(self, features: Tensor, views: int, rows: Tensor) -> None:
        self.features, self.rows = features[:views], rows
        self.shape = torch.Size((views, len(rows), features.shape[2]))

    def __getitem__(self, at: tuple[int, Tensor]) -> Tensor:
        view, rows = at
        return self.features[view, self.rows[rows]]

    def moved(self, device: str) -> "Rows":
        """The same rows, alone, in a device's memory."""
        return Rows(self.features[:, self.rows].to(device), self.shape[0], torch.arange(len(self.rows), device=device))

    def keys(self) -> Tensor:
        """(M, C): the mean over views, as `mean_key` takes it."""
        blocks = [mean_key(self.features[:, block]) for block in self.rows.split(256)]
        return torch.cat(blocks) if blocks else self.features.new_zeros(0, self.shape[2])


def shared_tensor(array: np.ndarray) -> Tensor:
    """A tensor on a shared array's own memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is read-only; nothing here writes to it
        return torch.from_numpy(array)


def run_trial(trial: Trial, shared: Shared, how: SearchConfig, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Trains the keys, searches α, β and weights on val, writes the cache; returns the row of `results.parquet`."""
    started = time.monotonic()
    setting = trial.setting
    rows = np.concatenate([shared.few_shot[trial.shots, trial.seed], shared.generated[setting.generated]])
    taken = torch.from_numpy(rows)
    views = {name: Rows(shared_tensor(shared.views[name]), setting.views, taken) for name in setting.encoders}
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
    trained, best = start, Epoch(epoch=0, loss=math.nan, val_accuracy=accuracy(start.logits(val), val_labels))
    if setting.epochs:
        recipe = KeyTraining(epochs=setting.epochs, batch=how.batch, lr=setting.lr, seed=trial.seed)
        gathered: Any = views  # Rows stand in for tensors
        trained, best = train_keys(start, gathered, start.labels, val, val_labels, recipe)
    zero_shot = trained.zero_shot(val)
    used = start.ensemble.sources or setting.encoders
    candidates = weight_grid(start.ensemble, used, how.temperatures, how.scales)
    affinities = trained.affinities(val)
    found = search(zero_shot, affinities, trained.labels, val_labels, grid=how.grid(), ensembles=candidates)
    chosen = replace(trained, alpha=found.alpha, beta=found.beta, ensemble=found.ensemble)
    save_cache(chosen, folder / trial.name / "cache.safetensors")
    landscapes = [asdict(landscape) for landscape in found.landscapes]
    write_json(folder / trial.name / "landscape.json", {"total": found.total, "landscapes": landscapes})
    row = {
        "trial": trial.name,
        "shots": trial.shots,
        "seed": trial.seed,
        **setting._asdict(),
        "encoders": " + ".join(setting.encoders),
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
    write_json(folder / trial.name / "result.json", row)
    return row


class _Watch(tune.Callback):
    """Moves the progress line."""

    def __init__(self, bar: Progress, done: int) -> None:
        self.bar, self.done, self.best = bar, done, 0.0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.done += 1
        self.best = max(self.best, trial.last_result.get("val_accuracy", 0.0))
        self.bar.update(self.done, f"best on val {self.best:.2%}")


def run_sweep(
    trials: Sequence[Trial],
    shared: Shared,
    how: SearchConfig,
    folder: Path,
    *,
    at_once: int,
    resources: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Every trial's row, in the order of the trials; only those not yet finished are run."""
    left = [trial for trial in trials if not (folder / trial.name / "result.json").exists()]
    if left:
        os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # results are the trials' own files
        device = "cuda" if resources.get("GPU") else "cpu"
        threads = max(1, int(resources["CPU"]))  # fixed, so that sums are added in one order wherever a trial runs

        def trainable(point: dict[str, Any], *, shared: Shared) -> None:
            torch.set_num_threads(threads)
            tune.report(run_trial(left[point["trial"]], shared, how, folder, device))

        wanted = {"cpu": resources["CPU"], "gpu": resources.get("GPU", 0)}
        with Progress("tune", unit="trials", total=len(trials)) as bar, unwrapped():
            results = tune.Tuner(
                tune.with_resources(tune.with_parameters(trainable, shared=shared), wanted),
                param_space={"trial": tune.grid_search(list(range(len(left))))},
                tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
                run_config=tune.RunConfig(
                    name=uuid.uuid4().hex[:8],
                    storage_path=str(folder.parent / "tune"),
                    verbose=0,
                    callbacks=[_Watch(bar, len(trials) - len(left))],
                    failure_config=tune.FailureConfig(max_failures=2),
                ),
            ).fit()
            if results.errors:
                raise results.errors[0]
    return [read_json(folder / trial.name / "result.json") for trial in trials]
