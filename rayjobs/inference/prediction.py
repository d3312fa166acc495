"""Predict images with a pool of workers: tasks decode them, actors hold the encoders and the classifier, and write.

The predictions of a shard are one file, which exists as a whole or not at all. A shard's rejected images are written
before it, so where a shard exists, the list of its rejected images is whole too.

Legend: n images of a shard, C width of an encoder's features, K classes that are kept of each image, N classes,
S side of an encoder's images.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.csv
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from cafo.cache import Cache
from cafo.calibration import Calibration
from cafo.prediction import rank
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.cluster.worker_pool import WorkerPoolConfig, actor_cpus
from rayjobs.console import Progress
from rayjobs.data.feature_encoding import decoding_tasks, encoder_threads, use_threads
from rayjobs.data.image_reading import Unit, read_pixels
from rayjobs.models.encoder import EncoderInfo, load_vision_encoder
from rayjobs.storage.files import atomic_path, read_parquet, write_jsonl, write_parquet
from rayjobs.storage.paths import resolve_path

PREDICTIONS, REJECTED, COUNTS = "predictions", "rejected", "counts"
"""Folders of a run: shards of predictions, of rejected images, and the numbers of images of tars."""

Format = Literal["parquet", "csv"]


class Classifier(Protocol):
    """A classifier that reads the features of encoders."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The N classes."""

    def logits(self, features: Mapping[str, Tensor], /) -> Tensor:
        """Return the logits of {encoder: (n, C)}: (n, N)."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Folder, format and columns of the predictions."""

    folder: str
    """folder of the run"""
    format: Format
    top: int
    """K"""
    coverage: float | None
    """of the prediction sets; None for none"""

    def shard(self, name: str) -> Path:
        """Return the file of a shard."""
        return resolve_path(self.folder) / PREDICTIONS / f"{name}.{self.format}"

    def rejected(self, name: str) -> Path:
        """Return the file of a shard's rejected images; there is none if all could be read."""
        return resolve_path(self.folder) / REJECTED / f"{name}.jsonl"


@dataclass(frozen=True, kw_only=True)
class Predicting:
    """The settings of a prediction."""

    encoders: Mapping[str, EncoderInfo]
    """the encoders that the classifier reads"""
    batch: int
    """images that an encoder encodes at once"""
    per_shard: int
    """images of a shard, at most"""
    pool: WorkerPoolConfig
    """the actors"""
    output: Output


def predict_units(
    units: Sequence[Unit],
    classifier: Classifier,
    calibration: Calibration | None,
    how: Predicting,
    total: int | None,
) -> int:
    """Predict units and write their shards; return the number of images, rejected ones too.

    Args:
        units: what is to be read.
        classifier: the classifier.
        calibration: of its probabilities; None for the plain softmax.
        how: encoders, workers and output.
        total: the number of images, for the progress; None if it is unknown.
    """
    kinds = _distinct([info.preprocess for info in how.encoders.values()])
    workers, resources = how.pool.workers.max, how.pool.resources()
    actors = min(workers, len(units))
    rows = ray.data.from_items([{"unit": unit.to_json()} for unit in units], override_num_blocks=len(units))
    with (
        ray_data_context(preserve_order=False),
        reraise_user_errors(),
        Progress("predict", unit="images", total=total) as progress,
    ):
        decoded = rows.map_batches(
            read_pixels,
            batch_size=1,
            batch_format="pyarrow",
            **decoding_tasks(workers, resources),
            fn_kwargs={
                "preprocess": kinds,
                "per_shard": how.per_shard,
                "counts": str(resolve_path(how.output.folder) / COUNTS),
            },
        )
        written = decoded.map_batches(
            Predictor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=actor_cpus(resources),
            num_gpus=resources.get("GPU", 0),
            fn_constructor_args=(
                ray.put(classifier),
                calibration,
                how,
                worker_device(resources),
                encoder_threads(actors),
            ),
        )
        for row in written.iter_rows():
            progress.advance(row["images"])
        return progress.done


class Predictor:
    """An actor that holds the encoders and the classifier, and writes a shard per call."""

    def __init__(
        self, classifier: Any, calibration: Calibration | None, how: Predicting, device: str, threads: int = 1
    ) -> None:
        use_threads(threads, device)
        self.classifier: Classifier = ray.get(classifier) if isinstance(classifier, ray.ObjectRef) else classifier
        self.device = device if isinstance(self.classifier, Cache) else "cpu"
        if isinstance(self.classifier, Cache):
            self.classifier = _to_device(self.classifier, device)
        self.calibration, self.how = calibration, how
        self.encoders = {name: load_vision_encoder(info.spec, device) for name, info in how.encoders.items()}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Write one shard; return the number of its images."""
        output, name = self.how.output, table["name"][0].as_py()
        shard = output.shard(name)
        assert_shared_storage(resolve_path(output.folder))
        sources, paths = table["sources"][0].as_py(), table["paths"][0].as_py()
        rejected = json.loads(table["rejected"][0].as_py())
        rows = prediction_table(self.classifier, self.calibration, self._logits(table, len(paths)), output)
        columns = {"source": pa.array(sources, pa.string()), "path": pa.array(paths, pa.string())}
        rows = pa.table({**columns, **dict(zip(rows.column_names, rows.columns, strict=True))})
        _write_rejected(output.rejected(name), rejected)
        write_shard(shard, rows)
        return pa.table({"images": [len(paths) + len(rejected)]})

    @torch.no_grad()
    def _logits(self, table: pa.Table, count: int) -> Tensor:
        """Return the logits (n, N) of a shard's decoded images."""
        kinds = _distinct([info.preprocess for info in self.how.encoders.values()])
        features = {}
        for name, encoder in self.encoders.items():
            kind = encoder.preprocess
            data = bytearray(table[f"pixels{kinds.index(kind)}"][0].as_buffer())
            info = self.how.encoders[name]
            if not count:
                features[name] = info.features(encoder, torch.empty(0, 3, kind.size, kind.size))
                continue
            pixels = torch.frombuffer(data, dtype=torch.uint8).view(count, kind.size, kind.size, 3)
            parts = [
                info.encode(encoder, kind.normalise(batch.to(encoder_device(encoder))))
                for batch in pixels.split(self.how.batch)
            ]
            features[name] = torch.cat(parts)
        return self.classifier.logits({name: f.to(self.device) for name, f in features.items()}).cpu()


def prediction_table(
    classifier: Classifier, calibration: Calibration | None, logits: Tensor, output: Output
) -> pa.Table:
    """Return predictions as columns: class_1, probability_1 … margin, and prediction_set if there is a coverage.

    Args:
        classifier: the classifier, for its classes.
        calibration: of its probabilities.
        logits: (n, N).
        output: what is kept of them.
    """
    ranked = rank(logits, calibration, output.top, output.coverage)
    names = pa.array(classifier.class_names, pa.string())
    columns: dict[str, Any] = {}
    for place in range(ranked.labels.shape[1]):
        columns[f"class_{place + 1}"] = names.take(pa.array(ranked.labels[:, place].numpy()))
        columns[f"probability_{place + 1}"] = pa.array(ranked.probabilities[:, place].float().numpy())
    columns["margin"] = pa.array(ranked.margins.float().numpy())
    if ranked.sets is not None:
        sets = [[classifier.class_names[label] for label in members] for members in ranked.sets]
        if output.format == "csv":
            columns["prediction_set"] = pa.array([json.dumps(one, ensure_ascii=False) for one in sets], pa.string())
        else:
            columns["prediction_set"] = pa.array(sets, pa.list_(pa.string()))
    return pa.table(columns)


def write_shard(path: Path, rows: pa.Table) -> None:
    """Write a table as Parquet or CSV, by the file's ending, whole or not at all."""
    if path.suffix == ".parquet":
        write_parquet(path, rows)
        return
    with atomic_path(path) as temporary:
        pa.csv.write_csv(rows, temporary)


def read_shard(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read some columns of a shard."""
    if path.suffix == ".parquet":
        return read_parquet(path, columns)
    texts = dict.fromkeys(("source", "path", "class_1", "prediction_set"), pa.string())
    options = pa.csv.ConvertOptions(include_columns=list(columns), column_types=texts, strings_can_be_null=False)
    with path.open("rb") as file:
        parsing = pa.csv.ParseOptions(newlines_in_values=True)
        return pa.csv.read_csv(file, parse_options=parsing, convert_options=options)


def _write_rejected(path: Path, rejected: Sequence[Sequence[str]]) -> None:
    if rejected:
        write_jsonl(path, (dict(zip(("source", "path", "reason"), image, strict=True)) for image in rejected))
    else:
        path.unlink(missing_ok=True)  # of an earlier attempt


def _to_device(cache: Cache, device: str) -> Cache:
    keys = {name: k.to(device) for name, k in cache.keys.items()}
    return replace(cache, keys=keys, labels=cache.labels.to(device), classifier=cache.classifier.to(device))


def encoder_device(encoder: Any) -> torch.device:
    """Return the device that an encoder runs on; one without weights runs on the CPU."""
    return next((p.device for p in encoder.network.parameters()), torch.device("cpu"))


def _distinct(kinds: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(kinds))
