"""The order of training, without Ray: every record once, even steps, nothing that knows the number of workers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from adapter.micro_batches import micro_batches
from rayjobs.data import sampler as sampler_module
from rayjobs.data.sampler import ElasticBatchSampler, assign_micro_batches, window_micro_batches
from rayjobs.data.token_part import write_part
from rayjobs.data.token_store import ROWS_PER_SOURCE, TokenStore
from rayjobs.storage.counted_reader import CountedReader

PARTS = (31, 1, 47, 22)  # 101 records, which divide evenly into nothing


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    rng, parts, id = np.random.default_rng(3), [], 0
    for rows in PARTS:
        listed = []
        for _ in range(rows):
            length = int(rng.integers(2, 40))
            listed.append({"id": id, "tokens": [id] * length, "label_spans": [[int(rng.integers(1, length)), length]]})
            id += 1
        name = f"train-{listed[0]['id']:014x}.parquet"
        write_part(f"{tmp_path}/{name}", listed)
        parts.append((name, rows))
    return TokenStore(folder=str(tmp_path), parts={"train": parts, "val": []}, rejected=0)


def walk(sampler: ElasticBatchSampler, world: int, steps: range) -> list[list[dict]]:
    """Every worker's micro-batches."""
    windows = {
        (step // sampler.steps_per_epoch, step % sampler.steps_per_epoch // sampler.steps_per_window) for step in steps
    }
    return [
        [
            micro
            for epoch, window in sorted(windows)
            for table in window_micro_batches({"epoch": [epoch], "window": [window]}, sampler, steps, rank, world)
            for micro in table.to_pylist()
        ]
        for rank in range(world)
    ]


def make_sampler(store: TokenStore, **changes: object) -> ElasticBatchSampler:
    settings = {"global_batch": 7, "token_budget": 64, "shuffle_records": 20, "seed": 5, **changes}
    return ElasticBatchSampler(store=store, split="train", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("shuffle_records", [1, 20, 1000])
def test_every_record_once_per_epoch_in_even_steps(store: TokenStore, world: int, shuffle_records: int) -> None:
    sampler = make_sampler(store, shuffle_records=shuffle_records)
    assert sampler.steps_per_epoch == 15
    for epoch in range(2):
        workers = walk(sampler, world, range(epoch * 15, epoch * 15 + 15))
        seen = Counter(row["id"] for worker in workers for micro in worker for row in micro["rows"])
        assert seen == Counter(range(101))
        shapes = [[(micro["step"], micro["last"]) for micro in worker] for worker in workers]
        assert all(shape == shapes[0] for shape in shapes)
        assert [step for step, last in shapes[0] if last] == list(range(epoch * 15, epoch * 15 + 15))


def test_a_step_is_the_same_for_any_number_of_workers(store: TokenStore) -> None:
    sampler = make_sampler(store)

    def steps(world: int) -> dict[int, tuple[list[int], int]]:
        by_step: dict[int, tuple[list[int], int]] = {}
        for worker in walk(sampler, world, range(30)):
            for micro in worker:
                ids, _ = by_step.get(micro["step"], ([], 0))
                by_step[micro["step"]] = (sorted(ids + [row["id"] for row in micro["rows"]]), micro["step_labels"])
        return by_step

    assert steps(1) == steps(2) == steps(4)


@pytest.mark.parametrize("world", [1, 2, 8])
def test_the_order_is_that_of_the_equations(store: TokenStore, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setattr(sampler_module, "RECORDS_READ_TOGETHER", 13)
    sampler, parts, first = make_sampler(store), [], 0
    for size in PARTS:
        parts.append(list(range(first, first + size)))
        first += size
    lengths = {row["id"]: len(row["tokens"]) for micro in walk(sampler, 1, range(15))[0] for row in micro["rows"]}
    expected: list[list[list[int]]] = [[] for _ in range(world)]
    for epoch in range(2):
        order = np.random.default_rng([5, epoch]).permutation(len(PARTS))
        ids = [id for part in order for id in parts[part]]
        for window in range(5):  # of 3 steps of 7 records
            of_window = ids[21 * window : 21 * window + 21]
            shuffled = np.random.default_rng([5, epoch, window + 1]).permutation(len(of_window))
            of_window = [of_window[i] for i in shuffled]
            for step in range(0, len(of_window), 7):
                of_step = of_window[step : step + 7]
                dealt = assign_micro_batches([lengths[id] for id in of_step], 64, world)
                for rank in range(world):
                    expected[rank] += [[of_step[i] for i in micro] for micro in dealt[rank]]
    found = walk(sampler, world, range(30))
    assert [[[row["id"] for row in micro["rows"]] for micro in worker] for worker in found] == expected


def test_resuming_in_the_middle_gives_the_rest(store: TokenStore) -> None:
    sampler = make_sampler(store)
    whole, rest = walk(sampler, 2, range(30)), walk(sampler, 2, range(11, 30))
    for rank in range(2):
        expected = [micro for micro in whole[rank] if micro["step"] >= 11]
        assert [{**micro, "read": None} for micro in rest[rank]] == [{**micro, "read": None} for micro in expected]


@pytest.mark.parametrize("world", [1, 2, 8])
def test_a_worker_reads_its_own_records_and_the_index_of_each_window(store: TokenStore, world: int) -> None:
    sampler, folder = make_sampler(store, images=IndexedImages()), Path(store.folder)
    for worker in walk(sampler, world, range(15)):
        own = [row for micro in worker for row in micro["rows"]]
        windows = [sampler.read_window(0, window, CountedReader()) for window in range(sampler.windows_per_epoch)]
        index_bytes = sum((folder / name).stat().st_size for index in windows for name in index.files)
        read = Counter[str]()
        for micro in worker:
            read.update(micro["read"])
        record_bytes = sum(4 * (len(row["tokens"]) + 2 * len(row["label_spans"])) for row in own)
        assert read == {"bytes": index_bytes + record_bytes, "records": len(own), "images": 0}


def test_labels_of_a_step_are_counted_over_all_workers(store: TokenStore) -> None:
    for step in range(15):
        workers = walk(make_sampler(store), 2, range(step, step + 1))
        rows = [row for worker in workers for micro in worker for row in micro["rows"]]
        labels = sum(end - start for row in rows for start, end in row["label_spans"])
        assert {micro["step_labels"] for worker in workers for micro in worker} == {labels}


def test_epochs_and_seeds_differ_and_repeat(store: TokenStore) -> None:
    def ids(seed: int | None, epoch: int) -> list[int]:
        sampler = make_sampler(store, seed=seed, shuffle_records=1000)
        return sampler.read_window(epoch, 0, CountedReader()).table["id"].to_pylist()

    assert ids(5, 0) == ids(5, 0)
    assert ids(5, 0) != ids(5, 1)
    assert ids(5, 0) != ids(6, 0)
    assert ids(None, 0) == ids(None, 1) == list(range(101))


def test_weights_say_how_often_each_source_is_trained_on(tmp_path: Path) -> None:
    parts, per_source = [], {0: (10, 7), 1: (6,), 2: (4,)}
    for source, sizes in per_source.items():
        first = source * ROWS_PER_SOURCE
        for rows in sizes:
            listed = [{"id": first + i, "tokens": [1, 2, 3], "label_spans": [[1, 3]]} for i in range(rows)]
            name = f"train-{first:014x}.parquet"
            write_part(f"{tmp_path}/{name}", listed)
            parts.append((name, rows))
            first += rows
    store = TokenStore(folder=str(tmp_path), parts={"train": parts, "val": []}, rejected=0)
    sampler = make_sampler(store, weights=(1.0, 2.5, 0.5))
    assert sampler.steps_per_epoch == -(-(17 + 15 + 2) // 7)
    counts_by_id: Counter[int] = Counter()
    for epoch in range(4):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        epoch_ids = [row["id"] for worker in walk(sampler, 2, steps) for micro in worker for row in micro["rows"]]
        assert Counter(id // ROWS_PER_SOURCE for id in epoch_ids) == {0: 17, 1: 15, 2: 2}
        counts_by_id += Counter(epoch_ids)
        for source, total in ((0, 17), (1, 6), (2, 4)):
            counts = [counts_by_id[source * ROWS_PER_SOURCE + row] for row in range(total)]
            assert max(counts) - min(counts) <= 1, "counts differ by at most one"
    assert all(count == 4 for id, count in counts_by_id.items() if id < ROWS_PER_SOURCE)


def weighted_store(folder: Path, size: int) -> TokenStore:
    """One source of so many records, in two parts."""
    parts = []
    for first, stop in ((0, size // 2), (size // 2, size)):
        listed = [{"id": i, "tokens": [1, 2], "label_spans": [[1, 2]]} for i in range(first, stop)]
        write_part(f"{folder}/train-{first:014x}.parquet", listed)
        parts.append((f"train-{first:014x}.parquet", stop - first))
    return TokenStore(folder=str(folder), parts={"train": parts, "val": []}, rejected=0)


@pytest.mark.parametrize("count", [1, 2, 5, 7, 11, 12, 13])
def test_passes_over_a_source_follow_each_other_wherever_an_epoch_ends(tmp_path: Path, count: int) -> None:
    store, size = weighted_store(tmp_path, 6), 6
    sampler = make_sampler(store, weights=(count / size,), shuffle_records=1000)
    seen: Counter[int] = Counter()
    for epoch in range(13):
        ids = sampler.read_window(epoch, 0, CountedReader()).table["id"].to_pylist()
        assert len(ids) == count
        seen.update(ids)
        counts = [seen[id] for id in range(size)]
        assert max(counts) - min(counts) <= 1


def test_the_passes_of_a_weighted_source_follow_from_the_seed_which_is_0_for_none(tmp_path: Path) -> None:
    store = weighted_store(tmp_path, 40)

    def taken(seed: int | None) -> list[int]:
        sampler = make_sampler(store, weights=(0.5,), seed=seed, shuffle_records=1000)
        return sorted(sampler.read_window(0, 0, CountedReader()).table["id"].to_pylist())

    assert taken(None) == taken(0)
    assert taken(0) != taken(1)
    assert taken(1) != taken(2)


def test_a_source_has_at_least_one_record_in_an_epoch_whatever_its_weight(tmp_path: Path) -> None:
    store = weighted_store(tmp_path, 6)
    counts = [make_sampler(store, weights=(weight,)).records_per_epoch(0) for weight in (0.01, 0.2, 0.34, 1.0, 2.5)]
    assert counts == [1, 1, 2, 6, 15]
    assert make_sampler(store, weights=(0.5,)).records_per_epoch(1) == 0


class IndexedImages:
    """An image source whose bytes name the image that was asked for."""

    def open(self, reader: CountedReader) -> "IndexedImages":
        return self

    def read(self, images: Sequence[tuple[int, int]], epoch: int | None) -> list[bytes]:
        return [f"{source} {index} {epoch}".encode() for source, index in images]


def test_every_record_brings_its_own_image_and_others_none(tmp_path: Path) -> None:
    first = 3 * ROWS_PER_SOURCE
    listed = [
        {"id": first + i, "tokens": [1, 2, 3], "label_spans": [[1, 3]], "image": i if i % 2 else None} for i in range(9)
    ]
    write_part(f"{tmp_path}/train-{first:014x}.parquet", listed)
    parts = {"train": [(f"train-{first:014x}.parquet", 9)], "val": []}
    sampler = make_sampler(TokenStore(folder=str(tmp_path), parts=parts, rejected=0), images=IndexedImages())
    for epoch in (0, 1):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        for worker in walk(sampler, 2, steps):
            for micro in worker:
                if micro["read"]["records"]:  # told with the first micro-batch of a step
                    of_step = [row for other in worker if other["step"] == micro["step"] for row in other["rows"]]
                    assert micro["read"]["images"] == sum(row["image"] is not None for row in of_step)
                for row in micro["rows"]:
                    place = row["id"] - first
                    assert row["image"] == (f"3 {place} {epoch}".encode() if place % 2 else None)
    without = walk(make_sampler(sampler.store), 1, range(sampler.steps_per_epoch))[0]
    assert {row["image"] for micro in without for row in micro["rows"]} == {None}
    assert {micro["read"]["images"] for micro in without} == {0}
    plain = make_sampler(sampler.store, seed=None, images=IndexedImages())
    apart = make_sampler(sampler.store, seed=None, images=IndexedImages(), images_apart=True, token_budget=512)
    micros = [row["rows"] for micro in walk(apart, 1, range(apart.steps_per_epoch)) for row in micro]
    assert {frozenset(row["image"] is None for row in rows) for rows in micros} == {
        frozenset({x}) for x in (True, False)
    }
    (rows,) = [row for row in walk(plain, 1, range(1))[0][0]["rows"] if row["id"] == first + 1]
    assert rows["image"] == b"3 1 None", "without a seed an image is shown as it is"


def test_micro_batches_keep_to_the_budget() -> None:
    lengths = [3, 50, 9, 9, 31, 8, 2]
    for world in (1, 2, 3):
        dealt = assign_micro_batches(lengths, 64, world)
        assert len({len(worker) for worker in dealt}) == 1
        micros = [micro for worker in dealt for micro in worker]
        assert sorted(i for micro in micros for i in micro) == list(range(7))
        assert all(len(micro) * max(lengths[i] for i in micro) <= 64 for micro in micros if micro)


def test_micro_batches_of_one_kind_keep_to_the_budget() -> None:
    rng = np.random.default_rng(2)
    lengths, kinds = rng.integers(3, 60, 41).tolist(), (rng.random(41) < 0.3).tolist()
    for world in (1, 2, 3):
        dealt = assign_micro_batches(lengths, 64, world, kinds)
        assert len({len(worker) for worker in dealt}) == 1
        micros = [micro for worker in dealt for micro in worker]
        assert sorted(i for micro in micros for i in micro) == list(range(41))
        assert all(len(micro) * max(lengths[i] for i in micro) <= 64 for micro in micros if micro)
        assert all(len({kinds[i] for i in micro}) == 1 for micro in micros if micro)
    assert assign_micro_batches(lengths, 64, 2, [True] * 41) == assign_micro_batches(lengths, 64, 2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_are_those_of_the_smallest_budget_that_makes_no_more_of_them(world: int) -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        lengths, kinds = rng.integers(0, 13, 11).tolist(), (rng.random(11) < 0.4).tolist()
        of_kind = [[i for i in range(11) if kinds[i] == kind] for kind in (False, True)]

        def cut(budget: int, of_kind: list[list[int]] = of_kind, lengths: list[int] = lengths) -> list[list[int]]:
            return [
                [own[i] for i in micro] for own in of_kind for micro in micro_batches([lengths[i] for i in own], budget)
            ]

        most = -(-len(cut(29)) // world) * world
        smallest = next(budget for budget in range(1, 30) if len(cut(budget)) <= most)
        expected = [*cut(smallest), *[[]] * (-len(cut(smallest)) % world)]
        dealt = assign_micro_batches(lengths, 29, world, kinds)
        assert dealt == [expected[rank::world] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 7, 16, 53, 64, 90])
def test_no_worker_is_idle_while_another_has_a_full_budget(world: int) -> None:
    lengths = np.random.default_rng(1).integers(30, 300, 64).tolist()
    dealt = assign_micro_batches(lengths, 4096, world)
    assert sorted(row for micros in dealt for micro in micros for row in micro) == list(range(64))
    assert len({len(micros) for micros in dealt}) == 1
    work = [sum(len(micro) * max((lengths[row] for row in micro), default=0) for micro in micros) for micros in dealt]
    assert max(work) <= max(1.35 * sum(lengths) / world, max(lengths))
    assert all(len(micro) * max(lengths[row] for row in micro) <= 4096 for micros in dealt for micro in micros if micro)
