"""Stream a worker's micro-batches: a Ray Data pipeline reads windows ahead of the training step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.data import TaskPoolStrategy
from torch import Tensor

from adapter.batching import collate
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.data.sampler import ElasticBatchSampler, window_micro_batches


@dataclass(frozen=True)
class DataRead:
    """Counts of the training data that a worker has read."""

    bytes: int = 0
    """bytes of the index, the records and the images"""
    records: int = 0
    images: int = 0
    """images decoded, or features read; one that is read twice counts twice"""

    def __add__(self, other: "DataRead") -> "DataRead":
        return DataRead(self.bytes + other.bytes, self.records + other.records, self.images + other.images)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The records that a worker runs through forward and backward at once: B records of at most T tokens."""

    step: int
    """counted from 0 over all epochs"""
    last: bool
    """this is the worker's last micro-batch of the step"""
    step_labels: int
    """labelled tokens of the step over all workers: the denominator of the loss"""
    ids: list[int]
    """ids of the records; empty in a micro-batch that keeps the workers in step"""
    n_tokens: int
    """tokens without padding"""
    tokens: Tensor
    """(B, T) int64, padded on the right with 0; no label and no token of a record attends to the padding"""
    labels: Tensor
    """(B, T) int64, `adapter.loss.IGNORE` where a token has no label"""
    images: list[bytes | None]
    """each record's image as an `ImageSource` returns it"""
    read: DataRead
    """data read since the worker's micro-batch before"""


def load_micro_batches(sampler: ElasticBatchSampler, rank: int, world: int, steps: range) -> Iterator[MicroBatch]:
    """Yield a worker's micro-batches of the given steps, in order.

    Args:
        sampler: the order of training.
        rank: number of the worker.
        world: number of workers.
        steps: steps, counted from 0 over all epochs.
    """
    epochs = range(steps.start // sampler.steps_per_epoch, -(-steps.stop // sampler.steps_per_epoch))
    windows = [
        {"epoch": epoch, "window": window}
        for epoch in epochs
        for window in range(sampler.windows_per_epoch)
        if any(step in steps for step in sampler.steps(epoch, window))
    ]
    if not windows:
        return
    # No timeout: a training step, or a validation between two, may take any time.
    with ray_data_context(preserve_order=True, no_progress_timeout_s=-1):
        tables = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
            window_micro_batches,
            batch_size=1,
            num_cpus=0,  # so that it runs even where the workers reserve every CPU
            compute=TaskPoolStrategy(size=1),
            fn_kwargs={"sampler": sampler, "steps": steps, "rank": rank, "world": world},
        )
        for table in tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            yield from map(collate_micro_batch, table.to_pylist())


def collate_micro_batch(micro: dict[str, Any]) -> MicroBatch:
    """Return a row of `rayjobs.data.sampler.MICRO_BATCH_SCHEMA` as tensors."""
    rows, read = micro.pop("rows"), DataRead(**micro.pop("read"))
    tokens, labels = collate([row["tokens"] for row in rows], [row["label_spans"] for row in rows])
    return MicroBatch(
        **micro,
        ids=[row["id"] for row in rows],
        n_tokens=sum(len(row["tokens"]) for row in rows),
        tokens=tokens,
        labels=labels,
        images=[row["image"] for row in rows],
        read=read,
    )
