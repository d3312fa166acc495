"""Score the chosen caches of a sweep on the test split."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cafo.datasets import Dataset
from rayjobs.errors import UserError
from rayjobs.reporting.accuracy_tables import ZERO_SHOT
from rayjobs.storage.files import write_parquet
from rayjobs.tune.trial import open_cache


def same_encoders(chosen: list[dict[str, Any]], trials: Path, identities: dict[str, str]) -> None:
    """Keys mean something to the encoders that made them. Raises ValueError if the config names others by now."""
    for trial in {seed["trial"] for cell in chosen for seed in cell["seeds"]}:
        for name, identity in open_cache(trials, trial).encoders.items():
            if identities[name] != identity:
                raise UserError(
                    f"encoders.{name}: the sweep's caches are of {identity}, the weights are now {identities[name]}; "
                    "put back the weights that it was run with"
                )


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
