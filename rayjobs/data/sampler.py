"""The order of training: a function of (store, seed, epoch, step), whatever the number of workers.

    epoch   the parts in an order drawn from (seed, epoch), laid end to end; of a source of weight w, w of its records
    window  the next `shuffle_records` rows of that line, shuffled by (seed, epoch, window)
    step    the next `global_batch` rows of the window
    micro   those rows sorted by length and cut under the token budget, evenly for W workers

and micro-batch j goes to worker j mod W, with empty ones added until all workers have as many. How a step is cut does
not change its gradient. So every record is seen once per epoch, one worker computes what two do, and a run may resume
at any step with any number of workers. A source of weight w is shuffled afresh whenever all of it was seen, and each
epoch goes on where the last one stopped: no record is ever seen twice more than another. Memory is bounded by a window.
Runs in Ray Data's tasks, so it does not import torch, which takes seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
import numpy as np
import pyarrow as pa
from adapter.batching import micro_batches
from rayjobs.data.image_source import ImageSource
from rayjobs.data.token_store import TOKENS
from rayjobs.storage.files import read_parquet
from rayjobs.data.token_store import Split, TokenStore, part_source, source_of


ROW = pa.schema([*[field for field in TOKENS if field.name != "image"], ("image", pa.large_binary())])
"""A record with its image as `rayjobs.pictures` reads it, in place of the image's place."""

MICRO_BATCH = pa.schema(
    [
        ("step", pa.int64()),  # counted from 0 over all epochs
        ("last", pa.bool_()),  # whether the worker's part of the step ends here
        ("step_labels", pa.int64()),  # labelled tokens in the whole step, over all workers: the loss's denominator
        ("rows", pa.list_(pa.struct(ROW))),  # none in a micro-batch that only keeps the workers even
    ]
)


@dataclass(frozen=True, kw_only=True)
class ElasticBatchSampler:
    """How a split is walked."""

    store: TokenStore
    split: Split
    global_batch: int
    token_budget: int
    shuffle_records: int
    """Rows shuffled together; rounded up to whole steps."""
    seed: int | None
    """None keeps the order of the source."""
    weights: tuple[float, ...] = ()
    """How often the records of each source are seen in an epoch; sources past the end are seen once."""
    pictures: ImageSource | None = None
    """Where images come from; None leaves them out."""

    @property
    def steps_per_epoch(self) -> int:
        return -(-sum(self._wanted(source) for source in self._sources) // self.global_batch)

    @cached_property
    def _sources(self) -> dict[int, list[tuple[str, int]]]:
        """Each source's parts."""
        found: dict[int, list[tuple[str, int]]] = {}
        for name, rows in self.store.parts[self.split]:
            found.setdefault(part_source(name), []).append((name, rows))
        return found

    def _wanted(self, source: int) -> int:
        """Rows of a source in one epoch."""
        rows = sum(rows for _, rows in self._sources[source])
        return rows if source >= len(self.weights) else max(1, round(self.weights[source] * rows))

    def _pieces(self, epoch: int) -> list[tuple[str, np.ndarray | None, int]]:
        """What an epoch takes of each part: (file, which of its rows or None for all, how many)."""
        pieces: list[tuple[str, np.ndarray | None, int]] = []
        for source, parts in self._sources.items():
            total, wanted = sum(rows for _, rows in parts), self._wanted(source)
            if wanted == total:
                pieces += [(name, None, rows) for name, rows in parts]
                continue
            start, taken = epoch * wanted, []
            for turn in range(start // total, (start + wanted - 1) // total + 1):
                line = np.random.default_rng([self.seed or 0, source, turn]).permutation(total)
                taken.append(line[max(0, start - turn * total) : start + wanted - turn * total])
            rows_taken, first = np.sort(np.concatenate(taken)), 0
            for name, rows in parts:
                mine = rows_taken[(rows_taken >= first) & (rows_taken < first + rows)] - first
                pieces += [(name, mine, len(mine))] if len(mine) else []
                first += rows
        return pieces

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
        parts = self._pieces(epoch)
        order = range(len(parts))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(parts)).tolist()
        size = self.steps_per_window * self.global_batch
        skip, tables, found = window * size, [], 0
        for part in order:
            name, which, rows = parts[part]
            if skip >= rows:
                skip -= rows
                continue
            table = read_parquet(f"{self.store.folder}/{name}")
            tables.append((table if which is None else table.take(which)).slice(skip, size - found))
            found, skip = found + tables[-1].num_rows, 0
            if found == size:
                break
        table = pa.concat_tables(tables)
        if self.seed is not None:
            table = table.take(np.random.default_rng([self.seed, epoch, window + 1]).permutation(table.num_rows))
        return table

    def picture(self, row: dict[str, Any], epoch: int) -> bytes | None:
        """A row's image as a worker gets it."""
        if self.pictures is None or row["image"] is None:
            return None
        return self.pictures.read(source_of(row["id"]), row["image"], None if self.seed is None else epoch)


def assign_micro_batches(lengths: Sequence[int], token_budget: int, world: int) -> list[list[list[int]]]:
    """Rows of one step → for each worker as many micro-batches of row indices; some workers' last may be empty.

    They are cut as small as that number allows, so that no worker is idle while another one has a full budget.
    """
    micros = micro_batches(lengths, token_budget)
    most, too_small = -(-len(micros) // world) * world, 0
    while token_budget - too_small > 1:
        budget = (too_small + token_budget) // 2
        smaller = micro_batches(lengths, budget)
        if len(smaller) <= most:
            micros, token_budget = smaller, budget
        else:
            too_small = budget
    micros += [[] for _ in range(-len(micros) % world)]
    return [micros[rank::world] for rank in range(world)]


def window_micro_batches(
    batch: dict[str, Any], order: ElasticBatchSampler, steps: range, rank: int, world: int
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
        mine = assign_micro_batches(lengths, order.token_budget, world)[rank]
        for row in {row for micro in mine for row in micro}:
            rows[row]["image"] = order.picture(rows[row], epoch)
        micros = [
            {"step": step, "last": i == len(mine) - 1, "step_labels": labels, "rows": [rows[row] for row in micro]}
            for i, micro in enumerate(mine)
        ]
        yield pa.Table.from_pylist(micros, MICRO_BATCH)
