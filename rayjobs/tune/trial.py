"""One trial: train the cache keys and choose α, β and the ensemble, on features that all trials share.

The features are in Ray's object store, once per node. A trial maps them without copying and gathers rows batch by
batch; besides its keys, it owns the affinities of the images that the choice is made on: validation images, or training
images that are held out. Test images are not among the inputs.

A trial's last act is to write `result.json`: a restarted sweep runs only the trials without one.

Legend: M keys, B validation images, N classes, V views, C width of a source's features.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter, with_config
from torch import Tensor

from cafo.cache import Cache, load_cache, mean_key, save_cache
from cafo.choice_names import Select
from cafo.cross_fit import TrainingImages
from cafo.ensemble import table5
from cafo.held_out import HeldOutImages
from cafo.key_training import Epoch, KeyTraining
from cafo.methods.base import Method
from cafo.methods.saved import FewShotClassifier, TrainingFile, load_classifier
from cafo.search import surface
from cafo.search_grid import BetaGrid
from cafo.selection import Selected, select
from rayjobs.data.image_dataset import Sentences
from rayjobs.storage.download import cached_path
from rayjobs.storage.files import atomic_path, read_typed, write_json
from rayjobs.tune.search_space import SearchConfig, Trial

CACHE, TRIAL_FILE, SURFACE = "cache.safetensors", "result.json", "surface.json"
RIVAL = "method.safetensors"


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
    plain: Mapping[str, np.ndarray] = field(default_factory=dict)
    """encoder → (n, C): training images as they are predicted, from one plain view; empty if no choice needs them"""
    plain_rows: np.ndarray | None = None
    """(M',): the row of `plain` of each image of `views`; -1 for a generated image"""
    groups: np.ndarray | None = None
    """(M',): equal for images of equal content"""
    select: Mapping[int, Select] = field(default_factory=dict)
    """K → what a choice is made on; `val` where it is missing"""
    classifiers: Mapping[tuple[str, Sentences], np.ndarray]
    """(encoder, sentences) → W (C, N)"""
    class_names: tuple[str, ...]
    identities: Mapping[str, str]
    """encoder → what identifies its weights and preprocessing"""
    rivals: Mapping[str, Method] = field(default_factory=dict)
    """the sweep's rivals by name"""
    prompts: Mapping[tuple[str, Sentences], np.ndarray] = field(default_factory=dict)
    """(encoder, sentences) → each class's sentences, (N, P, C), where a rival reads them"""
    files: tuple[TrainingFile, ...] = ()
    """(M'): the image of each row of `views`"""
    projections: Mapping[str, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)
    """encoder → weight and bias of its last layer, where a rival trains it; `views`, `val` and `plain` then have what
    comes before it too, under the name of `unprojected_source`"""


@with_config(extra="forbid")  # a field of a later version is refused
@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The result of a trial: a row of `results.parquet`, and its `result.json`.

    A trial that a scheduler stopped during training has no value after `curve`.
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
    rival: str = ""
    """name of the method that was fitted in place of CaFo"""
    curve: list[float]
    """accuracy on the images of the choice, before training and after every epoch, at the initial α and β; empty if it
    is made on no image"""
    select: Select | Literal["none"] | None = None
    """what the choice was made on; the next four are None for `prior` and `none`"""
    correct: int | None = None
    images: int | None = None
    accuracy: float | None = None
    zero_shot_accuracy: float | None = None
    chosen_alpha: float | None = None
    chosen_beta: float | None = None
    chosen_ensemble: str | None = None
    """JSON of the ensemble"""
    hyperparameters: str | None = None
    """JSON of a rival's chosen hyperparameters; it has no α, β and ensemble of CaFo's"""
    parts: str | None = None
    """JSON of the parts: what p_ZS and each source add"""
    estimate_correct: int | None = None
    """correct images of the estimate of the accuracy on new images; None if none was made"""
    estimate_images: int | None = None
    """all images of that estimate"""
    best_epoch: int | None = None
    keys: int | None = None
    seconds: float | None = None

    @classmethod
    def of(
        cls, trial: Trial, status: Literal["finished", "stopped"], curve: list[float], **chosen: Any
    ) -> "TrialResult":
        """The result of `trial`; `chosen` are the values that only a finished trial has."""
        setting: dict[str, Any] = trial.setting._asdict() | {"encoders": " + ".join(trial.setting.encoders)}
        common: dict[str, Any] = {"trial": trial.name, "status": status, "shots": trial.shots, "seed": trial.seed}
        return cls(**common, **setting, curve=list(curve), **chosen)

    def write(self, folder: Path) -> None:
        """Write `result.json` into the trial's folder below `folder`."""
        values = asdict(self)
        if self.status == "stopped":
            values = {name: value for name, value in values.items() if value is not None}
        write_json(folder / self.trial / TRIAL_FILE, values)


class SharedRows:
    """Some rows of shared views, as `cafo.key_training.Views`: gathered batch by batch, never copied as a whole."""

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
    """Train the keys, choose α, β and the ensemble, and write the cache and the result.

    `report` is called after every epoch with the accuracies so far on the images of the choice, at the initial α and β;
    the first one is that of the untrained keys. An exception that it raises ends the trial.
    """
    started = time.monotonic()
    setting, how = trial.setting, shared.select.get(trial.shots, "val")
    few_shot = shared.few_shot[trial.shots, trial.seed]
    rows = np.concatenate([few_shot, shared.generated[setting.generated]])
    views = {
        name: SharedRows(shared_tensor(shared.views[name]), setting.views, torch.from_numpy(rows))
        for name in setting.encoders
    }
    if device != "cpu":
        views = {name: on_host.to(device) for name, on_host in views.items()}
    untrained = _untrained_cache(trial, shared, views, rows, device)
    curve: list[float] = []

    def after_epoch(epoch: Epoch) -> None:
        curve.append(epoch.accuracy)
        report(curve)

    selected = select(
        untrained,
        views,
        how,
        KeyTraining(epochs=setting.epochs, batch=settings.batch, lr=setting.lr, seed=trial.seed),
        settings.choosing(untrained.ensemble, setting.encoders),
        train=None if how == "val" else training_images(shared, few_shot, rows, setting.encoders).to(device),
        val=_validation_images(shared, setting.encoders, device) if how == "val" else None,
        report=after_epoch,
    )
    _write_chosen(folder / trial.name, selected, settings.grid())
    result = TrialResult.of(
        trial, "finished", curve, **_chosen_values(selected), keys=len(rows), seconds=time.monotonic() - started
    )
    result.write(folder)
    return result


def _chosen_values(selected: Selected) -> dict[str, Any]:
    """The values of a `TrialResult` that only a finished trial has."""
    cache, images, best, estimate = selected.cache, selected.images, selected.search, selected.estimate
    values: dict[str, Any] = {
        "select": selected.how,
        "chosen_alpha": cache.alpha,
        "chosen_beta": cache.beta,
        "chosen_ensemble": json.dumps(asdict(cache.ensemble)),
        "best_epoch": selected.epoch.epoch,
    }
    if images is not None and best is not None:
        values |= {
            "correct": best.correct,
            "images": best.total,
            "accuracy": best.accuracy,
            "zero_shot_accuracy": best.zero_shot_correct / best.total,
            "parts": json.dumps([part._asdict() for part in best.parts]),
        }
    if estimate is not None:
        values |= {"estimate_correct": estimate.correct, "estimate_images": estimate.total}
    return values


def _validation_images(shared: SharedInputs, encoders: Sequence[str], device: str) -> tuple[dict[str, Tensor], Tensor]:
    features = {name: shared_tensor(shared.val[name]).to(device) for name in encoders}
    return features, shared_tensor(shared.val_labels).to(device)


def training_images(
    shared: SharedInputs, few_shot: np.ndarray, rows: np.ndarray, encoders: Sequence[str]
) -> TrainingImages:
    """The labelled images, whose keys come first, as a choice sees them."""
    assert shared.plain_rows is not None
    assert shared.groups is not None
    plain = torch.from_numpy(shared.plain_rows[few_shot])
    return TrainingImages(
        features={name: shared_tensor(shared.plain[name])[plain] for name in encoders},
        rows=torch.arange(len(few_shot)),
        groups=torch.from_numpy(shared.groups[rows]),
    )


def _untrained_cache(
    trial: Trial, shared: SharedInputs, views: Mapping[str, SharedRows], rows: np.ndarray, device: str
) -> Cache:
    """The cache whose keys are the mean features of the images, at the setting's initial α and β."""
    setting = trial.setting
    zero_shot_source = setting.encoders[0]
    return Cache(
        keys={name: rows.keys() for name, rows in views.items()},
        labels=torch.from_numpy(shared.labels[rows]).to(device),
        classifier=shared_tensor(shared.classifiers[zero_shot_source, setting.sentences]).to(device),
        class_names=shared.class_names,
        zero_shot_source=zero_shot_source,
        encoders={name: shared.identities[name] for name in setting.encoders},
        alpha=setting.alpha,
        beta=setting.beta,
        ensemble=table5(setting.encoders)[setting.ensemble],
        key_names=tuple(shared.files[row].path for row in rows) if shared.files else (),
    )


def _write_chosen(folder: Path, selected: Selected, grid: BetaGrid) -> None:
    """Write `cache.safetensors` with the chosen α, β and ensemble, and `landscape.json`, the accuracies over them.

    Held-out images are known to the trial alone, so it also writes `surface.json` for the plots where they are used.
    """
    with atomic_path(folder / CACHE) as temporary:
        save_cache(selected.cache, temporary)
    best, images = selected.search, selected.images
    if best is None or images is None:
        return
    landscapes = [asdict(landscape) for landscape in best.landscapes]
    write_json(folder / "landscape.json", {"total": best.total, "landscapes": landscapes})
    if selected.how != "val":
        write_surface(folder / SURFACE, selected.cache, images, grid)


def write_surface(path: Path, cache: Cache, images: HeldOutImages, grid: BetaGrid) -> None:
    """Write the accuracy over α and β on the images of a choice."""
    alphas = np.linspace(0, 2.5 * max(cache.alpha, 0.4), 61).tolist()
    betas = np.linspace(grid.low, grid.high, 30).tolist()
    correct = surface(images, cache.ensemble, alphas=alphas, betas=betas)
    write_json(path, {"alphas": alphas, "betas": betas, "correct": correct.tolist(), "total": len(images.labels)})


def stop_trial(trial: Trial, curve: list[float], folder: Path) -> TrialResult:
    """Write the result of a trial that a scheduler stopped during training: no α, β or accuracy was chosen."""
    result = TrialResult.of(trial, "stopped", curve)
    result.write(folder)
    return result


_RESULTS = TypeAdapter(TrialResult)


def read_trial_result(trial: Trial, folder: Path) -> TrialResult | None:
    """The result of a trial that has finished or was stopped; None for one that has not."""
    path = folder / trial.name / TRIAL_FILE
    if not path.exists():
        return None
    return read_typed(path, _RESULTS, "the result of a trial", way_out="; delete it, and the trial is run again")


def open_cache(folder: Path, trial: str) -> Cache:
    """The cache that a trial has written below `folder`."""
    return load_cache(cached_path(folder / trial / CACHE))


def open_classifier(folder: Path, trial: str) -> Cache | FewShotClassifier:
    """Return what a trial has written below `folder`: a cache, or a rival's classifier."""
    path = folder / trial / RIVAL
    return load_classifier(cached_path(path)) if path.exists() else open_cache(folder, trial)
