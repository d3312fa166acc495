"""The order of training: a function of (store, seed, epoch, step), whatever the number of workers.

    epoch   the parts in an order drawn from (seed, epoch), laid end to end
    window  the next `shuffle_records` rows of that line, shuffled by (seed, epoch, window)
    step    the next `global_batch` rows of the window
    micro   those rows sorted by length and cut under the token budget

and only then micro-batch j goes to worker j mod W, with empty ones added until all workers have as many. So every
record is seen once per epoch, one worker computes what two do, and a run may resume at any step with any number of
workers. Memory is bounded by a window. Runs in Ray Data's tasks, so it does not import torch, which takes seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adapter.batching import micro_batches
from rayjobs.tables import TOKENS
from rayjobs.tokens import Split, TokenStore

MICRO_BATCH = pa.schema(
    [
        ("step", pa.int64()),  # counted from 0 over all epochs
        ("last", pa.bool_()),  # whether the worker's part of the step ends here
        ("step_labels", pa.int64()),  # labelled tokens in the whole step, over all workers: the loss's denominator
        ("rows", pa.list_(pa.struct(TOKENS))),  # none in a micro-batch that only keeps the workers even
    ]
)


@dataclass(frozen=True, kw_only=True)
class Order:
    """How a split is walked."""

    store: TokenStore
    split: Split
    global_batch: int
    token_budget: int
    shuffle_records: int
    """Rows shuffled together; rounded up to whole steps."""
    seed: int | None
    """None keeps the order of the source."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.store.rows(self.split) // self.global_batch)

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.steps_per_epoch // self.steps_per_window)

    @property
    def steps_per_window(self) -> int:
        return -(-self.shuffle_records // self.global_batch)

    def steps(self, epoch: int, window: int) -> range:
        """The steps that a window holds, counted from 0 over all epochs."""
        before = epoch * self.steps_per_epoch
        first = before + window * self.steps_per_window
        return range(first, min(first + self.steps_per_window, before + self.steps_per_epoch))

    def rows(self, epoch: int, window: int) -> pa.Table:
        """The rows of one window, in the order in which they are trained on."""
        parts = self.store.parts[self.split]
        order = range(len(parts))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(parts)).tolist()
        size = self.steps_per_window * self.global_batch
        skip, tables, found = window * size, [], 0
        for part in order:
            name, rows = parts[part]
            if skip >= rows:
                skip -= rows
                continue
            tables.append(pq.read_table(Path(self.store.folder) / name).slice(skip, size - found))
            found, skip = found + tables[-1].num_rows, 0
            if found == size:
                break
        table = pa.concat_tables(tables)
        if self.seed is not None:
            table = table.take(np.random.default_rng([self.seed, epoch, window + 1]).permutation(table.num_rows))
        return table


def deal(lengths: Sequence[int], token_budget: int, world: int) -> list[list[list[int]]]:
    """Rows of one step → for each worker as many micro-batches of row indices; some workers' last may be empty."""
    micros = micro_batches(lengths, token_budget)
    micros += [[] for _ in range(-len(micros) % world)]
    return [micros[rank::world] for rank in range(world)]


def window_micro_batches(
    batch: dict[str, Any], order: Order, steps: range, rank: int, world: int
) -> Iterator[pa.Table]:
    """A Ray Data row {epoch, window} → one worker's micro-batches of those of its steps that are in `steps`."""
    epoch, window = int(batch["epoch"][0]), int(batch["window"][0])
    table, held = order.rows(epoch, window), order.steps(epoch, window)
    for step in held:
        if step not in steps:
            continue
        rows = table.slice((step - held.start) * order.global_batch, order.global_batch).to_pylist()
        lengths = [len(row["tokens"]) for row in rows]
        labels = sum(length - row["label_start"] for length, row in zip(lengths, rows, strict=True))
        mine = deal(lengths, order.token_budget, world)[rank]
        micros = [
            {"step": step, "last": i == len(mine) - 1, "step_labels": labels, "rows": [rows[row] for row in micro]}
            for i, micro in enumerate(mine)
        ]
        yield pa.Table.from_pylist(micros, MICRO_BATCH)
