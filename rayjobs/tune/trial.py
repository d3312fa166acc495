"""One trial: train the cache keys and search α, β and the ensemble, on features that all trials share.

The features are in Ray's object store, once per node. A trial maps them without copying and gathers rows batch by
batch; it owns nothing larger than its keys. Everything here is chosen on validation images; test images are not among
the inputs.

A trial's last act is to write `result.json`: a restarted sweep runs only the trials without one.

Legend: M keys, B validation images, N classes, V views, C width of a source's features.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cafo.cache import (
    Cache,
    accuracy,
    load_cache,
    mean_key,
    save_cache,
    zero_shot_logits,
)
from cafo.ensemble import table5
from cafo.key_training import Epoch, KeyTraining, train_keys
from cafo.search import SearchResult, search, weight_grid
from rayjobs.errors import DataError
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import atomic_path, read_json, write_json
from rayjobs.tune.search_space import SearchConfig, Trial

CACHE, TRIAL_FILE = "cache.safetensors", "result.json"


@dataclass(frozen=True, kw_only=True)
class SharedInputs:
    """The arrays that all trials read: numpy arrays, which Ray maps into every process without a copy."""

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
    """encoder → what identifies its weights and preprocessing"""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The result of a trial: a row of `results.parquet`, and its `result.json`.

    A trial that a scheduler stopped during training has no value after `val_curve`.
    """

    trial: str
    status: Literal["finished", "stopped"]
    shots: int
    seed: int
    generated: int
    views: int
    encoders: str
    """names, joined by ` + `"""
    ensemble: str
    sentences: str
    lr: float
    epochs: int
    alpha: float
    beta: float
    method: str
    val_curve: list[float]
    """validation accuracy before training and after every epoch, at the initial α and β"""
    val_correct: int | None = None
    val_images: int | None = None
    val_accuracy: float | None = None
    zero_shot_val_accuracy: float | None = None
    chosen_alpha: float | None = None
    chosen_beta: float | None = None
    chosen_ensemble: str | None = None
    """JSON of the ensemble"""
    best_epoch: int | None = None
    keys: int | None = None
    seconds: float | None = None

    @classmethod
    def of(
        cls, trial: Trial, status: Literal["finished", "stopped"], val_curve: list[float], **chosen: Any
    ) -> "TrialResult":
        """The result of `trial`; `chosen` are the values that only a finished trial has."""
        setting: dict[str, Any] = trial.setting._asdict() | {"encoders": " + ".join(trial.setting.encoders)}
        common: dict[str, Any] = {"trial": trial.name, "status": status, "shots": trial.shots, "seed": trial.seed}
        return cls(**common, **setting, val_curve=list(val_curve), **chosen)

    def write(self, folder: Path) -> None:
        """Write `result.json` into the trial's folder below `folder`."""
        values = asdict(self)
        if self.status == "stopped":
            values = {name: value for name, value in values.items() if value is not None}
        write_json(folder / self.trial / TRIAL_FILE, values)


class SharedRows:
    """Some rows of shared views, indexed like a (V, M, C) tensor: gathered batch by batch, never copied as a whole."""

    def __init__(self, features: Tensor, views: int, rows: Tensor) -> None:
        self.features, self.rows = features[:views], rows
        self.shape = torch.Size((views, len(rows), features.shape[2]))

    def __getitem__(self, at: tuple[int, Tensor]) -> Tensor:
        view, rows = at
        return self.features[view, self.rows[rows]]

    def to(self, device: str) -> "SharedRows":
        """The same rows, without the others, in a device's memory."""
        return SharedRows(
            self.features[:, self.rows].to(device), self.shape[0], torch.arange(len(self.rows), device=device)
        )

    def keys(self) -> Tensor:
        """(M, C): the mean over views, as `mean_key` computes it."""
        blocks = [mean_key(self.features[:, block]) for block in self.rows.split(64)]
        return torch.cat(blocks) if blocks else self.features.new_zeros(0, self.shape[2])


def shared_tensor(array: np.ndarray) -> Tensor:
    """A tensor that uses a shared array's own memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that the array is read-only; nothing here writes to it
        return torch.from_numpy(array)


def run_trial(
    trial: Trial,
    shared: SharedInputs,
    settings: SearchConfig,
    folder: Path,
    device: str = "cpu",
    report: Callable[[list[float]], None] = lambda curve: None,
) -> TrialResult:
    """Train the keys, search α, β and the ensemble on validation images, and write the cache and the result.

    `report` is called after every epoch with the validation accuracies so far, at the initial α and β; the first one is
    that of the untrained keys. An exception that it raises ends the trial.
    """
    started = time.monotonic()
    setting = trial.setting
    rows = np.concatenate([shared.few_shot[trial.shots, trial.seed], shared.generated[setting.generated]])
    views = {
        name: SharedRows(shared_tensor(shared.views[name]), setting.views, torch.from_numpy(rows))
        for name in setting.encoders
    }
    if device != "cpu":
        views = {name: on_host.to(device) for name, on_host in views.items()}
    val = {name: shared_tensor(shared.val[name]).to(device) for name in setting.encoders}
    val_labels = shared_tensor(shared.val_labels).to(device)
    untrained = _untrained_cache(trial, shared, views, torch.from_numpy(shared.labels[rows]).to(device), device)

    curve: list[float] = []

    def after_epoch(epoch: Epoch) -> None:
        curve.append(epoch.accuracy)
        report(curve)

    recipe = KeyTraining(epochs=setting.epochs, batch=settings.batch, lr=setting.lr, seed=trial.seed)
    trained, best = _train(untrained, views, val, val_labels, recipe if setting.epochs else None, after_epoch)
    best_search = _search(trained, val, val_labels, settings)
    _write_chosen(folder / trial.name, trained, best_search)
    classifier, zero_shot_features = untrained.classifier, val[untrained.zero_shot_source]
    result = TrialResult.of(
        trial,
        "finished",
        curve,
        val_correct=best_search.correct,
        val_images=best_search.total,
        val_accuracy=best_search.accuracy,
        zero_shot_val_accuracy=accuracy(zero_shot_logits(zero_shot_features, classifier), val_labels),
        chosen_alpha=best_search.alpha,
        chosen_beta=best_search.beta,
        chosen_ensemble=json.dumps(asdict(best_search.ensemble)),
        best_epoch=best.epoch,
        keys=len(rows),
        seconds=time.monotonic() - started,
    )
    result.write(folder)
    return result


def _untrained_cache(
    trial: Trial, shared: SharedInputs, views: Mapping[str, SharedRows], labels: Tensor, device: str
) -> Cache:
    """The cache whose keys are the mean features of the images, at the setting's initial α and β."""
    setting = trial.setting
    zero_shot_source = setting.encoders[0]
    return Cache(
        keys={name: rows.keys() for name, rows in views.items()},
        labels=labels,
        classifier=shared_tensor(shared.classifiers[zero_shot_source, setting.sentences]).to(device),
        class_names=shared.class_names,
        zero_shot_source=zero_shot_source,
        encoders={name: shared.identities[name] for name in setting.encoders},
        alpha=setting.alpha,
        beta=setting.beta,
        ensemble=table5(setting.encoders)[setting.ensemble],
    )


def _train(
    untrained: Cache,
    views: Mapping[str, SharedRows],
    val: Mapping[str, Tensor],
    val_labels: Tensor,
    recipe: KeyTraining | None,
    after_epoch: Callable[[Epoch], None],
) -> tuple[Cache, Epoch]:
    """The cache with the keys of the best epoch, and that epoch; without a recipe, the untrained cache."""
    if recipe is not None:
        rows_as_tensors: Any = views  # SharedRows has the tensor methods that training uses
        return train_keys(untrained, rows_as_tensors, untrained.labels, val, val_labels, recipe, after_epoch)
    epoch = Epoch(epoch=0, loss=math.nan, accuracy=accuracy(untrained.logits(val), val_labels))
    after_epoch(epoch)
    return untrained, epoch


def _search(cache: Cache, val: Mapping[str, Tensor], val_labels: Tensor, settings: SearchConfig) -> SearchResult:
    """Search α, β and the ensemble's weights on the validation images."""
    sources = cache.ensemble.sources or tuple(cache.encoders)
    candidates = weight_grid(cache.ensemble, sources, settings.temperatures, settings.scales)
    return search(
        cache.zero_shot(val),
        cache.affinities(val),
        cache.labels,
        val_labels,
        grid=settings.grid(),
        ensembles=candidates,
    )


def _write_chosen(folder: Path, cache: Cache, result: SearchResult) -> None:
    """Write `cache.safetensors` with the chosen α, β and ensemble, and `landscape.json`, the accuracies over them."""
    chosen = replace(cache, alpha=result.alpha, beta=result.beta, ensemble=result.ensemble)
    with atomic_path(folder / CACHE) as temporary:
        save_cache(chosen, temporary)
    landscapes = [asdict(landscape) for landscape in result.landscapes]
    write_json(folder / "landscape.json", {"total": result.total, "landscapes": landscapes})


def stop_trial(trial: Trial, curve: list[float], folder: Path) -> TrialResult:
    """Write the result of a trial that a scheduler stopped during training: no α, β or accuracy was chosen."""
    result = TrialResult.of(trial, "stopped", curve)
    result.write(folder)
    return result


def read_trial_result(trial: Trial, folder: Path) -> TrialResult | None:
    """The result of a trial that has finished or was stopped; None for one that has not."""
    path = folder / trial.name / TRIAL_FILE
    if not path.exists():
        return None
    try:
        return TrialResult(**read_json(path))
    except (DataError, TypeError) as error:
        raise DataError(f"{path} is no result of a trial ({error}); delete it, and the trial is run again") from error


def open_cache(folder: Path, trial: str) -> Cache:
    """The cache that a trial has written below `folder`."""
    return load_cache(cached_path(folder / trial / CACHE))
