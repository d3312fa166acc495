"""Encode parts of image lists with Ray Data: tasks decode the images, a pool of actors encodes them and writes files.

Each image is decoded once for all encoders, and cropped once for those that crop it alike. Crops travel as bytes, a
quarter of their size in float32, and are normalised where they are encoded.

Legend: n images of a part, V views, C width of an encoder's features, S side of its images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from PIL import Image
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from cafo.errors import ImageError
from cafo.images import CLIP_MEAN, CLIP_STD, Preprocess, load_image
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.cluster.worker_pool import TASK_CPUS, actor_cpus
from rayjobs.console import Progress
from rayjobs.data.feature_part import write_part
from rayjobs.models.encoder import EncoderInfo, load_vision_encoder
from rayjobs.storage.paths import resolve_path

REJECTED_IMAGES = pa.list_(pa.struct([("path", pa.string()), ("reason", pa.string())]))


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """One part of an image list, and the files that are missing of it."""

    root: str
    """folder that the paths are relative to"""
    first: int
    """position of the first image in the list"""
    paths: list[str]
    views: int
    """V; 0 for the plain view"""
    seed: int
    min_area: float
    flips: bool
    outputs: dict[str, str]
    """encoder → path of its file of this part"""

    def to_row(self) -> dict[str, Any]:
        """Return the task as a row for Ray Data; `outputs` is a list, so that all rows have one Arrow type."""
        outputs = [{"encoder": encoder, "path": path} for encoder, path in self.outputs.items()]
        return {"task": {**asdict(self), "outputs": outputs}}

    @classmethod
    def from_row(cls, table: pa.Table) -> "PartTask":
        """Read the task from a table of one row."""
        task = table["task"][0].as_py()
        return cls(**{**task, "outputs": {output["encoder"]: output["path"] for output in task["outputs"]}})

    def crop_image(self, preprocess: Preprocess, image: Image.Image, path: str) -> list[np.ndarray]:
        """Return the views of an image, each (S, S, 3) uint8: V augmented ones, or the plain one if V is 0."""
        if not self.views:
            return [np.asarray(preprocess.crop(image))]
        views = (
            preprocess.crop_view(image, path, i, self.seed, min_area=self.min_area, flips=self.flips)
            for i in range(self.views)
        )
        return [np.asarray(view) for view in views]


def encode_parts(
    tasks: Sequence[PartTask],
    encoders: Mapping[str, EncoderInfo],
    batch: int,
    workers: int,
    resources: Mapping[str, float],
) -> None:
    """Write all missing files of the tasks.

    Args:
        tasks: the parts.
        encoders: the encoders by name.
        batch: views that an encoder encodes at once.
        workers: number of actors that hold the encoders.
        resources: what each actor reserves.
    """
    total = sum(len(task.paths) for task in tasks)
    rows = ray.data.from_items([task.to_row() for task in tasks], override_num_blocks=len(tasks))
    with (
        ray_data_context(preserve_order=False),
        reraise_user_errors(),
        Progress("encode", unit="images", total=total) as progress,
    ):
        decoded = rows.map_batches(
            decode_part,
            batch_size=1,
            batch_format="pyarrow",
            **decoding_tasks(workers, resources),
            fn_kwargs={"preprocess": {name: encoder.preprocess for name, encoder in encoders.items()}},
        )
        written = decoded.map_batches(
            PartEncoder,
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers),
            num_cpus=actor_cpus(resources),
            num_gpus=resources.get("GPU", 0),
            fn_constructor_args=(dict(encoders), batch, worker_device(resources), encoder_threads(workers)),
        )
        for row in written.iter_rows():
            progress.advance(row["images"])


def decode_part(table: pa.Table, preprocess: Mapping[str, Preprocess]) -> pa.Table:
    """Decode the images of a part and crop their views.

    Args:
        table: one row with a `PartTask`.
        preprocess: the preprocessing of each encoder.

    Returns:
        The row with `rows`, the positions of the images that could be read; `rejected`, the others; and a column
        `pixels<i>` of (n * V, S, S, 3) uint8 for each way in which the encoders that lack the part crop images.
    """
    task = PartTask.from_row(table)
    kinds = _distinct_crops(preprocess, task)
    views: list[list[np.ndarray]] = [[] for _ in kinds]
    rows: list[int] = []
    rejected: list[dict[str, str]] = []
    root = resolve_path(task.root)
    for row, path in enumerate(task.paths, task.first):
        try:
            image = load_image(root / path, name=path)
        except ImageError as error:
            rejected.append({"path": path, "reason": str(error)})
            continue
        rows.append(row)
        for kind, kind_views in zip(kinds, views, strict=True):
            kind_views += task.crop_image(kind, image, path)
    pixels = [b"".join(view.tobytes() for view in kind_views) for kind_views in views]
    # All rows need the same columns, also where fewer encoders lack the part.
    pixels += [b""] * (len(preprocess) - len(pixels))
    columns = {f"pixels{i}": pa.array([values], pa.large_binary()) for i, values in enumerate(pixels)}
    return pa.table(
        {
            "task": table["task"],
            "rows": pa.array([rows], pa.list_(pa.int64())),
            "rejected": pa.array([rejected], REJECTED_IMAGES),
            **columns,
        }
    )


class PartEncoder:
    """A Ray Data actor that holds the encoders, encodes decoded parts and writes their files."""

    def __init__(self, encoders: Mapping[str, EncoderInfo], batch: int, device: str, threads: int = 1) -> None:
        use_threads(threads, device)
        self.infos, self.batch = encoders, batch
        specs = dict.fromkeys(info.spec for info in encoders.values())
        loaded = {spec: load_vision_encoder(spec, device) for spec in specs}
        self.encoders = {name: loaded[info.spec] for name, info in encoders.items()}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Write the missing files of one part; return the number of its images."""
        task = PartTask.from_row(table)
        assert_shared_storage(*(resolve_path(path).parent for path in task.outputs.values()))
        kinds = _distinct_crops({name: info.preprocess for name, info in self.infos.items()}, task)
        rows, rejected = table["rows"][0].as_py(), table["rejected"][0].as_py()
        views = max(task.views, 1)
        for name, path in task.outputs.items():
            column = kinds.index(_crop_of(self.infos[name].preprocess, task))
            features = self._encode(name, table[f"pixels{column}"][0].as_buffer(), len(rows) * views)
            write_part(path, rows, features, views, [(image["path"], image["reason"]) for image in rejected])
        return pa.table({"images": [len(task.paths)]})

    def _encode(self, name: str, pixels: pa.Buffer, count: int) -> np.ndarray:
        """Encode `count` views (count, S, S, 3) uint8: (count, C) float32."""
        encoder, info = self.encoders[name], self.infos[name]
        side = encoder.preprocess.size
        images = np.frombuffer(pixels, np.uint8).reshape(count, side, side, 3)
        features = [
            info.features(encoder, encoder.preprocess.normalise(torch.tensor(images[at : at + self.batch]))).numpy()
            for at in range(0, max(count, 1), self.batch)
        ]
        return np.concatenate(features)


def encoder_threads(workers: int) -> int:
    """Return the threads of an encoder without a GPU: the cluster's CPUs, divided among the encoders.

    Decoding runs beside them and needs a small part of a CPU.
    """
    return max(1, int(ray.cluster_resources().get("CPU", 1) // workers))


def use_threads(threads: int, device: str) -> None:
    """Let PyTorch compute on so many threads in this process, or on as many as the node has cores, if these are fewer.

    device: the device of the model; nothing is changed for one on a GPU.
    """
    if device == "cpu":
        torch.set_num_threads(min(threads, os.cpu_count() or 1))


def decoding_tasks(workers: int, resources: Mapping[str, float]) -> dict[str, Any]:
    """Return what decoding tasks reserve and how many run at once, as arguments of `map_batches`.

    If the encoders leave two CPUs of every node, each task reserves nearly one. On smaller clusters as many tasks run
    as CPUs are left, at least one, and they reserve so little that they find room whatever other jobs hold.

    What they reserve never equals what an encoder does, since Ray Data would then fuse the two stages.
    """
    spare = ray.cluster_resources().get("CPU", 0) - workers * resources["CPU"]
    if spare >= 2 * len(ray.nodes()):
        return {"num_cpus": 0.9}
    return {"num_cpus": TASK_CPUS, "compute": TaskPoolStrategy(size=max(1, int(spare)))}


def _distinct_crops(preprocess: Mapping[str, Preprocess], task: PartTask) -> list[Preprocess]:
    """Return the ways in which a task's encoders crop images, each once; its index is the number of its column."""
    return list(dict.fromkeys(_crop_of(preprocess[name], task) for name in task.outputs))


def _crop_of(preprocess: Preprocess, task: PartTask) -> Preprocess:
    """Return a preprocessing with standard values in place of those that the crops of a task do not depend on."""
    crop = replace(preprocess, mean=CLIP_MEAN, std=CLIP_STD)
    return replace(crop, resize=crop.size, mode="shortest") if task.views else crop
