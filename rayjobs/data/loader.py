"""The order of training, streamed into a worker: a Ray Data pipeline that reads windows ahead of the training step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
import ray.data
import torch
from ray.data import TaskPoolStrategy
from torch import Tensor
from adapter.loss import IGNORE
from rayjobs.data.sampler import ElasticBatchSampler, window_micro_batches
from rayjobs.cluster.ray_data import ray_data_context


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one worker runs forward and backward at once."""

    step: int
    """Counted from 0 over all epochs."""
    last: bool
    """Whether the worker's part of the step ends here."""
    step_labels: int
    """Labelled tokens in the whole step, over all workers: the loss's denominator."""
    ids: list[int]
    """The records' ids; none in a micro-batch that only keeps the workers even."""
    n_tokens: int
    """Tokens in it, padding left out."""
    tokens: Tensor
    """(B, T) int64, padded on the right with 0, which no label and no real token ever looks at."""
    labels: Tensor
    """(B, T) int64, IGNORE where there is none."""
    images: list[bytes | None]
    """Each record's image as `rayjobs.pictures` reads it."""


def load_micro_batches(order: ElasticBatchSampler, rank: int, world: int, steps: range) -> Iterator[MicroBatch]:
    """Worker `rank`'s micro-batches of the given steps, in order."""
    epochs = range(steps.start // order.steps_per_epoch, -(-steps.stop // order.steps_per_epoch))
    windows = [
        {"epoch": epoch, "window": window}
        for epoch in epochs
        for window in range(order.windows_per_epoch)
        if any(step in steps for step in order.steps(epoch, window))
    ]
    if not windows:
        return
    with ray_data_context(preserve_order=True, patience_s=-1):  # a step, or a validation between two, may take its time
        rows = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
            window_micro_batches,
            batch_size=1,
            num_cpus=0,  # so that it runs even where the workers reserve all there is
            compute=TaskPoolStrategy(size=1),
            fn_kwargs={"order": order, "steps": steps, "rank": rank, "world": world},
        )
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            yield from map(collate, table.to_pylist())


def collate(micro: dict[str, Any]) -> MicroBatch:
    """A row of `rayjobs.data.sampler.MICRO_BATCH` as tensors."""
    rows = micro.pop("rows")
    lengths = [len(row["tokens"]) for row in rows]
    tokens = torch.zeros(max(len(rows), 1), max(lengths, default=1), dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE)
    for i, row in enumerate(rows):
        sequence, start = torch.tensor(row["tokens"]), row["label_start"]
        tokens[i, : len(sequence)] = sequence
        labels[i, start : len(sequence)] = sequence[start:]
    ids = [row["id"] for row in rows]
    images = [row["image"] for row in rows]
    return MicroBatch(**micro, ids=ids, n_tokens=sum(lengths), tokens=tokens, labels=labels, images=images)
