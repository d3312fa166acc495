"""Encode parts of image lists with Ray Data: tasks decode the images, a pool of actors encodes them and writes files.

Legend: n images of a part, V views, C width of an encoder's features, S side of its images.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from rayjobs.cluster.capacity import cluster_capacity
from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.cluster.worker_pool import TASK_CPUS, actor_cpus
from rayjobs.console import Progress
from rayjobs.data.feature_decoding import PartTask, crop_of, decode_part, distinct_crops
from rayjobs.data.feature_part import write_part
from rayjobs.models.encoder import EncoderInfo, load_vision_encoder
from rayjobs.storage.paths import resolve_path


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
        kinds = distinct_crops({name: info.preprocess for name, info in self.infos.items()}, task)
        rows, rejected = table["rows"][0].as_py(), table["rejected"][0].as_py()
        views = max(task.views, 1)
        for name, path in task.outputs.items():
            column = kinds.index(crop_of(self.infos[name].preprocess, task))
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

    Decoding runs beside them and needs a small part of a CPU. Machines that are off for the moment count, since the
    last bits of features depend on the number of threads, and a run that goes on without them should have the same.
    """
    off = sum(node.get("CPU", 0) for node in cluster_capacity().lost)
    return max(1, int((ray.cluster_resources().get("CPU", 1) + off) // workers))


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
