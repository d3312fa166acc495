"""A deterministic order of training records that does not depend on the number of workers.

This is known as elastic determinism (MosaicML Streaming, https://docs.mosaicml.com/projects/streaming). The order is a
function of (store, seed, epoch, step):

    epoch        the parts of the store, in an order shuffled by (seed, epoch), one after the other
    window       the next `shuffle_records` records of the epoch, shuffled by (seed, epoch, window)
    step         the next `global_batch` records of the window
    micro-batch  records of a step of similar length, within the token budget

For W workers, a step is cut into a multiple of W micro-batches, of which the last may be empty; micro-batch j goes to
worker j mod W. The cut does not change the gradient of the step. So every record is trained on once per epoch, one
worker computes what many do, and a run can resume at any step with any number of workers.

A source with weight w contributes w × its size records per epoch. It is read in passes; each pass is a new permutation,
and an epoch continues in the pass where the previous one ended. So the counts of any two records of a source never
differ by more than one.

Memory is bounded by one window. The code runs in Ray Data tasks, so it does not import torch, which takes seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from adapter.batching import micro_batches
from adapter.records.example import count_labels
from rayjobs.data.image_source import ImageSource
from rayjobs.data.token_store import TOKEN_SCHEMA, Split, TokenStore, part_source, source_of
from rayjobs.storage.files import read_parquet

RECORD_SCHEMA = pa.schema([*[field for field in TOKEN_SCHEMA if field.name != "image"], ("image", pa.large_binary())])
"""A record with the bytes of its image, from an `ImageSource`, in place of the image's index."""

MICRO_BATCH_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # counted from 0 over all epochs
        ("last", pa.bool_()),  # this is the worker's last micro-batch of the step
        ("step_labels", pa.int64()),  # labelled tokens of the step over all workers: the denominator of the loss
        ("rows", pa.list_(pa.struct(RECORD_SCHEMA))),  # empty in a micro-batch that keeps the workers in step
    ]
)


@dataclass(frozen=True)
class PartSlice:
    """The rows that an epoch takes from a part of the store."""

    file: str
    """name of the part's file"""
    rows: np.ndarray | None
    """row numbers, rising; None for all rows"""
    count: int
    """number of rows"""


@dataclass(frozen=True, kw_only=True)
class ElasticBatchSampler:
    """The order of a split of a token store."""

    store: TokenStore
    split: Split
    global_batch: int
    """records per step, over all workers"""
    token_budget: int
    """tokens per micro-batch, padding included"""
    shuffle_records: int
    """records that are shuffled together; rounded up to whole steps"""
    seed: int | None
    """None keeps the order of the sources"""
    weights: tuple[float, ...] = ()
    """times that each source is read in an epoch; 1 for sources past the end"""
    images: ImageSource | None = None
    """source of the records' images; None leaves images out"""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last may be smaller than the others."""
        return -(-sum(self._records_per_epoch(source) for source in self._parts_of_sources) // self.global_batch)

    @property
    def steps_per_window(self) -> int:
        """Number of steps in a window; the last window of an epoch may be smaller."""
        return -(-self.shuffle_records // self.global_batch)

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows in an epoch."""
        return -(-self.steps_per_epoch // self.steps_per_window)

    def steps(self, epoch: int, window: int) -> range:
        """Return the steps of a window, counted from 0 over all epochs."""
        epoch_start = epoch * self.steps_per_epoch
        first = epoch_start + window * self.steps_per_window
        return range(first, min(first + self.steps_per_window, epoch_start + self.steps_per_epoch))

    def rows(self, epoch: int, window: int) -> pa.Table:
        """Return the records of a window, in the order in which they are trained on."""
        slices = self._slices(epoch)
        if self.seed is not None:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(slices)).tolist()
            slices = [slices[i] for i in shuffled]
        size = self.steps_per_window * self.global_batch
        table = self._read_range(slices, start=window * size, size=size)
        if self.seed is not None:
            table = table.take(np.random.default_rng([self.seed, epoch, window + 1]).permutation(table.num_rows))
        return table

    def read_image(self, row: dict[str, Any], epoch: int) -> bytes | None:
        """Return the bytes of a record's image for a worker; None if it has none or images are left out."""
        if self.images is None or row["image"] is None:
            return None
        return self.images.read(source_of(row["id"]), row["image"], None if self.seed is None else epoch)

    @cached_property
    def _parts_of_sources(self) -> dict[int, list[tuple[str, int]]]:
        """{source: [(file name, rows), …]}."""
        parts: dict[int, list[tuple[str, int]]] = {}
        for name, rows in self.store.parts[self.split]:
            parts.setdefault(part_source(name), []).append((name, rows))
        return parts

    def _records_per_epoch(self, source: int) -> int:
        size = sum(rows for _, rows in self._parts_of_sources[source])
        return size if source >= len(self.weights) else max(1, round(self.weights[source] * size))

    def _slices(self, epoch: int) -> list[PartSlice]:
        """Return the rows that an epoch takes from each part, in the order of the store."""
        slices: list[PartSlice] = []
        for source, parts in self._parts_of_sources.items():
            size, count = sum(rows for _, rows in parts), self._records_per_epoch(source)
            if count == size:
                slices += [PartSlice(name, None, rows) for name, rows in parts]
            else:
                slices += _slice_parts(parts, self._weighted_rows(source, size, epoch * count, count))
        return slices

    def _weighted_rows(self, source: int, size: int, start: int, count: int) -> np.ndarray:
        """Return the rows of a source that an epoch trains on, sorted; a row occurs once for each pass that has it.

        All passes over the source, each a permutation of its `size` rows, form one sequence. The epoch takes `count`
        rows of it from `start` on.

        Example: a source of 10 rows with weight 2.5 has count 25. Epoch 0 takes positions 0-24: passes 0 and 1 whole,
        and the first 5 rows of pass 2. Epoch 1 starts at 25 and takes positions 25-49: the last 5 rows of pass 2, and
        passes 3 and 4 whole.
        """
        first_pass, last_pass = start // size, (start + count - 1) // size
        rows = []
        for number in range(first_pass, last_pass + 1):
            permutation = np.random.default_rng([self.seed or 0, source, number]).permutation(size)
            begin, end = start - number * size, start + count - number * size
            rows.append(permutation[max(0, begin) : end])
        return np.sort(np.concatenate(rows))

    def _read_range(self, slices: Sequence[PartSlice], start: int, size: int) -> pa.Table:
        """Read up to `size` rows from position `start` of the slices, laid one after the other."""
        skip, tables, rows_read = start, [], 0
        for part in slices:
            if skip >= part.count:
                skip -= part.count
                continue
            table = read_parquet(f"{self.store.folder}/{part.file}")
            tables.append((table if part.rows is None else table.take(part.rows)).slice(skip, size - rows_read))
            rows_read, skip = rows_read + tables[-1].num_rows, 0
            if rows_read == size:
                break
        return pa.concat_tables(tables)


def _slice_parts(parts: Sequence[tuple[str, int]], rows: np.ndarray) -> list[PartSlice]:
    """Divide sorted row numbers of a source among its parts."""
    slices, first = [], 0
    for name, size in parts:
        part_rows = rows[(rows >= first) & (rows < first + size)] - first
        if len(part_rows):
            slices.append(PartSlice(name, part_rows, len(part_rows)))
        first += size
    return slices


def assign_micro_batches(lengths: Sequence[int], token_budget: int, world: int) -> list[list[list[int]]]:
    """Divide the records of a step among the workers.

    All workers get the same number of micro-batches; the last of some may be empty. The number is the smallest that the
    token budget allows. The micro-batches are then cut as evenly as that number allows, so that no worker is idle while
    another computes a full budget.

    Args:
        lengths: tokens of each record.
        token_budget: tokens per micro-batch, padding included.
        world: number of workers.

    Returns:
        For each worker, its micro-batches as lists of positions in `lengths`.
    """
    batches = micro_batches(lengths, token_budget)
    most = -(-len(batches) // world) * world
    fits, too_small = token_budget, 0  # bisect for the smallest budget that gives no more than `most` micro-batches
    while fits - too_small > 1:
        budget = (too_small + fits) // 2
        smaller = micro_batches(lengths, budget)
        if len(smaller) <= most:
            batches, fits = smaller, budget
        else:
            too_small = budget
    batches += [[] for _ in range(-len(batches) % world)]
    return [batches[rank::world] for rank in range(world)]


def window_micro_batches(
    batch: dict[str, Any], sampler: ElasticBatchSampler, steps: range, rank: int, world: int
) -> Iterator[pa.Table]:
    """Yield a worker's micro-batches of one window, for Ray Data: a table of `MICRO_BATCH_SCHEMA` for each step.

    Args:
        batch: a Ray Data row {epoch, window}.
        sampler: the order of training.
        steps: the steps to yield; others of the window are left out.
        rank: number of the worker.
        world: number of workers.
    """
    epoch, window = int(batch["epoch"][0]), int(batch["window"][0])
    table, window_steps = sampler.rows(epoch, window), sampler.steps(epoch, window)
    for step in window_steps:
        if step not in steps:
            continue
        rows = table.slice((step - window_steps.start) * sampler.global_batch, sampler.global_batch).to_pylist()
        lengths = [len(row["tokens"]) for row in rows]
        step_labels = sum(count_labels(row["label_spans"]) for row in rows)
        batches = assign_micro_batches(lengths, sampler.token_budget, world)[rank]
        for i in {i for positions in batches for i in positions}:
            rows[i]["image"] = sampler.read_image(rows[i], epoch)
        micros = [
            {
                "step": step,
                "last": number == len(batches) - 1,
                "step_labels": step_labels,
                "rows": [rows[i] for i in positions],
            }
            for number, positions in enumerate(batches)
        ]
        yield pa.Table.from_pylist(micros, MICRO_BATCH_SCHEMA)
