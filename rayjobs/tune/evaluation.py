"""Score the chosen classifiers of a sweep, caches and rivals, on test images."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cafo.cache import Cache
from cafo.datasets import Dataset
from cafo.methods.saved import FewShotClassifier
from rayjobs.data.feature_store import Features
from rayjobs.data.image_list import ImageList
from rayjobs.errors import ProvenanceError
from rayjobs.reporting.accuracy_tables import ZERO_SHOT
from rayjobs.storage.files import read_object, write_json, write_parquet
from rayjobs.storage.fingerprint import fingerprint
from rayjobs.tune.selection import ChosenSetting
from rayjobs.tune.trial import open_classifier


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """The accuracy of one cache, rival or zero-shot classifier on one target."""

    target: str
    """the name of the test set"""
    shots: int | None
    """None for a zero-shot classifier"""
    method: str
    seed: int | None
    confusion: np.ndarray
    """(N, N) counts, true classes down, predicted classes across"""
    winning_sources: dict[str, list[int]]
    """source → for each class, the images on which this source weighs most; empty for all but a cache"""

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def correct(self) -> int:
        return int(np.trace(self.confusion))

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.images, 1)

    def identity(self) -> dict[str, Any]:
        """The columns that every table of scores begins with."""
        return {"target": self.target, "method": self.method, "shots": self.shots, "seed": self.seed}

    def row(self) -> dict[str, Any]:
        """The row of `accuracy.parquet`."""
        key = {"target": self.target, "shots": self.shots, "method": self.method, "seed": self.seed}
        return {**key, "images": self.images, "correct": self.correct, "accuracy": self.accuracy}


def check_opening(folder: Path, chosen: Sequence[ChosenSetting]) -> dict[str, Any]:
    """Return what `opened.json` says; empty if the test split was never opened.

    Raises ProvenanceError if it was opened for another choice.
    """
    path = folder / "opened.json"
    before = read_object(path) if path.exists() else {}
    if before and before["choice"] != _choice_digest(chosen):
        raise ProvenanceError(
            f"{path}: test was opened on {before['opened']} for another choice; a choice made after that is not blind. "
            "Sweep under another run.name"
        )
    return before


def record_opening(folder: Path, chosen: Sequence[ChosenSetting], targets: Sequence[str]) -> None:
    """Write `opened.json`: when the test split was opened, and for which choice.

    Raises ProvenanceError if it was opened for another choice.
    """
    before = check_opening(folder, chosen)
    opened = before.get("opened") or datetime.now(timezone.utc).isoformat(timespec="seconds")
    names = sorted({*before.get("targets", []), *targets})
    write_json(folder / "opened.json", {"opened": opened, "choice": _choice_digest(chosen), "targets": names})


def _choice_digest(chosen: Sequence[ChosenSetting]) -> str:
    return fingerprint([choice.to_json() for choice in chosen])


def score_target(
    chosen: Sequence[ChosenSetting], trials: Path, images: ImageList, features: Features
) -> list[TargetScore]:
    """Score every zero-shot classifier, every chosen cache and every chosen rival on the images of one target."""
    labels = torch.tensor([images.items[row].label for row in features.rows])
    values = {name: torch.tensor(views[0]) for name, views in features.values.items()}
    scores: list[TargetScore] = []
    classifiers: dict[bytes, tuple[ChosenSetting, Cache]] = {}
    for choice in chosen:
        for trial in choice.seeds:
            cache = open_classifier(trials, trial.trial)
            if isinstance(cache, FewShotClassifier):
                scores.append(_score_rival(images.role, choice, trial.seed, cache, values, labels))
                continue
            classifiers.setdefault(cache.classifier.numpy().tobytes(), (choice, cache))
            scores.append(_score_cache(images.role, choice, trial.seed, cache, _of_cache(values, cache), labels))
    zero_shot = [
        TargetScore(
            target=images.role,
            shots=None,
            method=ZERO_SHOT if len(classifiers) == 1 else _zero_shot_name(choice),
            seed=None,
            confusion=_confusion(cache.zero_shot(_of_cache(values, cache)), labels),
            winning_sources={},
        )
        for choice, cache in classifiers.values()
    ]
    return [*zero_shot, *scores]


def _of_cache(values: dict[str, Tensor], cache: Cache) -> dict[str, Tensor]:
    """The features that a cache reads."""
    return {name: values[name] for name in {*cache.keys, cache.zero_shot_source}}


def _zero_shot_name(choice: ChosenSetting) -> str:
    return f"{ZERO_SHOT} ({choice.setting.encoders[0]}, {choice.setting.sentences})"


def _score_rival(
    target: str,
    choice: ChosenSetting,
    seed: int,
    rival: FewShotClassifier,
    features: dict[str, Tensor],
    labels: Tensor,
) -> TargetScore:
    return TargetScore(
        target=target,
        shots=choice.shots,
        method=choice.method,
        seed=seed,
        confusion=_confusion(rival.logits(features), labels),
        winning_sources={},
    )


def _score_cache(
    target: str, choice: ChosenSetting, seed: int, cache: Cache, features: dict[str, Tensor], labels: Tensor
) -> TargetScore:
    combination = cache.combine_in_blocks(features)
    winner = combination.shares.argmax(dim=1)
    return TargetScore(
        target=target,
        shots=choice.shots,
        method=choice.method,
        seed=seed,
        confusion=_confusion(combination.logits(cache.alpha), labels),
        winning_sources={
            source: torch.bincount(labels[winner == i], minlength=len(cache.class_names)).tolist()
            for i, source in enumerate(combination.sources)
        },
    )


def _confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    classes = logits.shape[1]
    pairs = torch.bincount(labels * classes + logits.argmax(dim=1), minlength=classes**2)
    return pairs.reshape(classes, classes).numpy()


def write_scores(folder: Path, scores: Sequence[TargetScore], dataset: Dataset) -> None:
    """Write `accuracy.parquet`, `per_class.parquet`, `sources.parquet` (for each class, the images on which each source
    weighs most) and `confusion.parquet` (only pairs that occur)."""
    per_class, confusions, sources = [], [], []
    for score in scores:
        identity = score.identity()
        for label, counts in enumerate(score.confusion):
            class_name = dataset.class_names[label]
            per_class.append(
                {**identity, "class": class_name, "images": int(counts.sum()), "correct": int(counts[label])}
            )
            for predicted in np.flatnonzero(counts):
                names = {"true": class_name, "predicted": dataset.class_names[predicted]}
                confusions.append({**identity, **names, "images": int(counts[predicted])})
        for source, images in score.winning_sources.items():
            by_class = zip(dataset.class_names, images, strict=True)
            sources += [{**identity, "class": name, "source": source, "images": count} for name, count in by_class]
    tables = {
        "accuracy": [score.row() for score in scores],
        "per_class": per_class,
        "sources": sources,
        "confusion": confusions,
    }
    for name, rows in tables.items():
        write_parquet(folder / f"{name}.parquet", pa.Table.from_pylist(rows))
