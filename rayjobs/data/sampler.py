"""A deterministic order of training records that does not depend on the number of workers.

This is known as elastic determinism (MosaicML Streaming, https://docs.mosaicml.com/projects/streaming). The order is a
function of (store, seed, epoch, step):

    epoch        the parts of the store, in an order shuffled by (seed, epoch), one after the other
    window       the next `shuffle_records` records of the epoch, shuffled by (seed, epoch, window)
    step         the next `global_batch` records of the window
    micro-batch  records of a step of similar length, within the token budget; if `images_apart`, of one kind: all of
                 them have an image, or none has

For W workers, a step is cut into a multiple of W micro-batches, of which the last may be empty; micro-batch j goes to
worker j mod W. The cut does not change the gradient of the step. So every record is trained on once per epoch, one
worker computes what many do, and a run can resume at any step with any number of workers.

A worker reads the records and images of its own micro-batches, and the index of the window, with the lengths of all its
records: about three bytes a record.

A source with weight w contributes w × its size records per epoch. It is read in passes; each pass is a new permutation,
and an epoch continues in the pass where the previous one ended. So the counts of any two records of a source never
differ by more than one.

Memory is bounded by the index of a window and by `RECORDS_READ_TOGETHER` records. The code runs in Ray Data tasks, so
without images it does not import torch, which takes seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from adapter.micro_batches import micro_batches
from rayjobs.data.image_source import ImageReader, ImageSource
from rayjobs.data.token_part import RecordIndex, read_index, read_records
from rayjobs.data.token_store import Split, TokenStore, part_source, source_of
from rayjobs.storage.counted_reader import CountedReader

RECORDS_READ_TOGETHER = 4096
"""A worker reads its own records of several steps at once: of as many steps as have this many records over all workers.
"""

RECORD_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("label_spans", pa.list_(pa.list_(pa.int32()))),  # [first, one past the last] of the tokens that have labels
        ("image", pa.large_binary()),  # its bytes from an `ImageSource`; null without one
    ]
)

READ_SCHEMA = pa.schema([("bytes", pa.int64()), ("records", pa.int64()), ("images", pa.int64())])
"""Counts of what a worker has read. An image that is read twice counts twice."""

MICRO_BATCH_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # counted from 0 over all epochs
        ("last", pa.bool_()),  # this is the worker's last micro-batch of the step
        ("step_labels", pa.int64()),  # labelled tokens of the step over all workers: the denominator of the loss
        ("rows", pa.list_(pa.struct(RECORD_SCHEMA))),  # empty in a micro-batch that keeps the workers in step
        ("read", pa.struct(READ_SCHEMA)),  # what was read since the micro-batch before
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
    images_apart: bool = False
    """no micro-batch holds both records with an image and records without one"""

    @cached_property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last may be smaller than the others."""
        return -(-sum(self.records_per_epoch(source) for source in self._parts_of_sources) // self.global_batch)

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

    def read_window(self, epoch: int, window: int, reader: CountedReader) -> RecordIndex:
        """Return the index of a window's records, in the order in which they are trained on."""
        slices = self._slices(epoch)
        if self.seed is not None:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(slices)).tolist()
            slices = [slices[i] for i in shuffled]
        size = self.steps_per_window * self.global_batch
        index = self._read_range(slices, start=window * size, size=size, reader=reader)
        if self.seed is not None:
            index = index.take(np.random.default_rng([self.seed, epoch, window + 1]).permutation(len(index.table)))
        return index

    def read_images(self, records: Sequence[dict[str, Any]], epoch: int, images: ImageReader | None) -> int:
        """Put the bytes of its image into each record in place of the image's index; return the number of images.

        images: reader of the images; None leaves them out.
        """
        if images is None:
            for record in records:
                record["image"] = None
            return 0
        pictured = [record for record in records if record["image"] is not None]
        if not pictured:
            return 0
        wanted = [(source_of(record["id"]), record["image"]) for record in pictured]
        contents = images.read(wanted, None if self.seed is None else epoch)
        for record, content in zip(pictured, contents, strict=True):
            record["image"] = content
        return len(pictured)

    @cached_property
    def _parts_of_sources(self) -> dict[int, list[tuple[str, int]]]:
        """{source: [(file name, rows), …]}."""
        parts: dict[int, list[tuple[str, int]]] = {}
        for name, rows in self.store.parts[self.split]:
            parts.setdefault(part_source(name), []).append((name, rows))
        return parts

    @cached_property
    def _rows_of_parts(self) -> dict[str, int]:
        return dict(self.store.parts[self.split])

    def records(self, source: int) -> int:
        """Return the number of records that the split has of a source."""
        return sum(rows for _, rows in self._parts_of_sources.get(source, []))

    def records_per_epoch(self, source: int) -> int:
        """Return the number of records of a source in an epoch: its weight times those that it has, but at least 1."""
        size = self.records(source)
        return size if not size or source >= len(self.weights) else max(1, round(self.weights[source] * size))

    def _slices(self, epoch: int) -> list[PartSlice]:
        """Return the rows that an epoch takes from each part, in the order of the store."""
        slices: list[PartSlice] = []
        for source, parts in self._parts_of_sources.items():
            size, count = self.records(source), self.records_per_epoch(source)
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

    def _read_range(self, slices: Sequence[PartSlice], start: int, size: int, reader: CountedReader) -> RecordIndex:
        """Return the index of up to `size` rows from position `start` of the slices, laid one after the other."""
        positions, files, in_files = [], [], 0
        skip, missing = start, size
        for part in slices:
            if skip >= part.count:
                skip -= part.count
                continue
            rows = np.arange(part.count) if part.rows is None else part.rows
            files.append(part.file)
            positions.append(rows[skip : skip + missing] + in_files)
            in_files += self._rows_of_parts[part.file]
            missing, skip = missing - len(positions[-1]), 0
            if not missing:
                break
        return read_index(self.store.folder, files, reader).take(np.concatenate(positions))


def _slice_parts(parts: Sequence[tuple[str, int]], rows: np.ndarray) -> list[PartSlice]:
    """Divide sorted row numbers of a source among its parts."""
    slices, first = [], 0
    for name, size in parts:
        part_rows = rows[(rows >= first) & (rows < first + size)] - first
        if len(part_rows):
            slices.append(PartSlice(name, part_rows, len(part_rows)))
        first += size
    return slices


def assign_micro_batches(
    lengths: Sequence[int], token_budget: int, world: int, kinds: Sequence[bool] | None = None
) -> list[list[list[int]]]:
    """Divide the records of a step among the workers.

    All workers get the same number of micro-batches; the last of some may be empty. The number is the smallest that the
    token budget allows. The micro-batches are then cut as evenly as that number allows, so that no worker is idle while
    another computes a full budget.

    Args:
        lengths: tokens of each record.
        token_budget: tokens per micro-batch, padding included.
        world: number of workers.
        kinds: kind of each record, if no micro-batch may hold two kinds.

    Returns:
        For each worker, its micro-batches as lists of positions in `lengths`.
    """
    of_kind = [[i for i in range(len(lengths)) if kinds[i] == kind] for kind in (False, True)] if kinds else []
    of_kind = [positions for positions in of_kind if positions] or [list(range(len(lengths)))]
    longest_first = [sorted((lengths[i] for i in positions), reverse=True) for positions in of_kind]
    most = -(-_count_micro_batches(longest_first, token_budget) // world) * world
    fits, too_small = token_budget, 0  # bisect for the smallest budget that gives no more than `most` micro-batches
    while fits - too_small > 1:
        budget = (too_small + fits) // 2
        if _count_micro_batches(longest_first, budget) <= most:
            fits = budget
        else:
            too_small = budget
    batches = [
        [positions[i] for i in batch]
        for positions in of_kind
        for batch in micro_batches([lengths[i] for i in positions], fits)
    ]
    batches += [[] for _ in range(-len(batches) % world)]
    return [batches[rank::world] for rank in range(world)]


def _count_micro_batches(longest_first: Sequence[Sequence[int]], token_budget: int) -> int:
    """Return how many micro-batches `adapter.micro_batches` cuts records into, given each kind's lengths."""
    count = 0
    for lengths in longest_first:
        place = 0
        while place < len(lengths):
            place += max(1, token_budget // max(1, lengths[place]))
            count += 1
    return count


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
    reader = CountedReader()
    index, window_steps = sampler.read_window(epoch, window, reader), sampler.steps(epoch, window)
    images = None if sampler.images is None else sampler.images.open(reader)
    wanted = [step for step in window_steps if step in steps]
    together = max(1, RECORDS_READ_TOGETHER // sampler.global_batch)
    bytes_told = 0
    for begin in range(0, len(wanted), together):
        cuts = []
        for step in wanted[begin : begin + together]:
            first = (step - window_steps.start) * sampler.global_batch
            cuts.append(_cut_step(index, step, first, sampler, rank, world))
        places = np.concatenate([place for cut in cuts for place in cut.places])
        records = iter(read_records(index.take(places), reader))
        for cut in cuts:
            batches = [list(islice(records, len(place))) for place in cut.places]
            of_step = [record for listed in batches for record in listed]
            n_images = sampler.read_images(of_step, epoch, images)
            read = {"bytes": reader.bytes - bytes_told, "records": len(of_step), "images": n_images}
            bytes_told = reader.bytes
            yield pa.Table.from_pylist(
                [
                    {
                        "step": cut.step,
                        "last": number == len(batches) - 1,
                        "step_labels": cut.labels,
                        "rows": rows,
                        "read": dict.fromkeys(READ_SCHEMA.names, 0) if number else read,
                    }
                    for number, rows in enumerate(batches)
                ],
                MICRO_BATCH_SCHEMA,
            )


class _StepCut(NamedTuple):
    """A worker's part of a step."""

    step: int
    labels: int
    """labelled tokens of the step over all workers"""
    places: list[np.ndarray]
    """of each micro-batch, the positions of its records in the index of the window"""


def _cut_step(
    index: RecordIndex, step: int, first: int, sampler: ElasticBatchSampler, rank: int, world: int
) -> _StepCut:
    """Return a worker's part of the step whose records begin at position `first` of the index."""
    table = index.table.slice(first, sampler.global_batch)
    kinds = [image is not None for image in table["image"].to_pylist()] if sampler.images_apart else None
    batches = assign_micro_batches(table["tokens"].to_pylist(), sampler.token_budget, world, kinds)[rank]
    places = [np.array(positions, np.int64) + first for positions in batches]
    return _StepCut(step, sum(table["labels"].to_pylist()), places)
