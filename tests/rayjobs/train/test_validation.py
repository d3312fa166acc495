"""The held-out loss of each set is the mean over the set's labelled tokens, for any number of workers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapter.loss import IGNORE
from rayjobs.data.loader import MicroBatch, collate_micro_batch
from rayjobs.data.sampler import ElasticBatchSampler, window_micro_batches
from rayjobs.data.token_part import write_part
from rayjobs.data.token_store import ROWS_PER_SOURCE, TokenStore
from rayjobs.train import validation
from rayjobs.train.config import OptimizerConfig, TrainConfig, ZeroConfig
from rayjobs.train.summary import summarize_sets
from rayjobs.train.train_job import TrainJob

SIZES = {0: (5, 2), 2: (3,), 3: (11,)}
"""{source: records of each of its parts}; source 1 has no held-out records."""


def write_store(folder: Path) -> tuple[TokenStore, dict[int, list[float]]]:
    """A store, and the loss of each labelled token of its sources: a hundredth of the token's id."""
    parts, losses = [], dict[int, list[float]]()
    for source, sizes in SIZES.items():
        first = source * ROWS_PER_SOURCE
        for rows in sizes:
            records = []
            for id in range(first, first + rows):
                number = id % ROWS_PER_SOURCE
                tokens = [7 + source + 3 * place + number for place in range(3 + number % 4)]
                records.append({"id": id, "tokens": tokens, "label_spans": [[2, len(tokens)]], "image": None})
                losses.setdefault(source, []).extend(token / 100 for token in tokens[2:])
            parts.append((f"val-{first:014x}.parquet", rows))
            write_part(str(folder / parts[-1][0]), records)
            first += rows
    return TokenStore(folder=str(folder), parts={"train": [], "val": parts}, rejected=0), losses


def make_job(store: TokenStore, sets: tuple[str, ...]) -> TrainJob:
    return TrainJob(
        base="",
        dtype="fp32",
        adapter=None,  # type: ignore[arg-type]  # the engine is a stand-in
        store=store,
        weights=(),
        images=None,
        encoder=None,
        train=TrainConfig(global_batch=4, token_budget=16),
        optimizer=OptimizerConfig(),
        zero=ZeroConfig(),
        sets=sets,
    )


class Engine:
    """A stand-in whose loss is a hundredth of each labelled token's id."""

    device = torch.device("cpu")
    deepspeed = SimpleNamespace(eval=lambda: None, train=lambda: None)

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor, images: Any) -> torch.Tensor:
        return labels[labels != IGNORE].sum() / 100


def read_here(sampler: ElasticBatchSampler, rank: int, world: int, steps: range) -> Iterator[MicroBatch]:
    """`load_micro_batches` without Ray."""
    for window in range(sampler.windows_per_epoch):
        for table in window_micro_batches({"epoch": [0], "window": [window]}, sampler, steps, rank, world):
            yield from map(collate_micro_batch, table.to_pylist())


def measure(job: TrainJob, world: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The row that `world` workers agree on."""
    gathered: list[torch.Tensor] = []
    monkeypatch.setattr(validation, "load_micro_batches", read_here)

    def all_reduce(final: bool) -> Callable[[torch.Tensor], None]:
        def reduce(totals: torch.Tensor) -> None:
            gathered.append(totals.clone())
            totals.copy_(sum(gathered) if final else torch.ones_like(totals))

        return reduce

    row: dict[str, Any] = {}
    for rank in range(world):
        monkeypatch.setattr(validation.dist, "all_reduce", all_reduce(rank == world - 1))
        featurizer = SimpleNamespace(images=lambda images: None)
        row = validation.measure_validation(Engine(), featurizer, job, rank, world)  # type: ignore[arg-type]
    return row


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_set_has_its_own_mean_and_all_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    store, losses = write_store(tmp_path)
    row = measure(make_job(store, ("a", "b", "c", "d")), world, monkeypatch)
    names = {0: "a", 2: "c", 3: "d"}
    assert row["val_losses"] == pytest.approx({names[i]: sum(listed) / len(listed) for i, listed in losses.items()})
    every = [loss for listed in losses.values() for loss in listed]
    assert row["val_loss"] == pytest.approx(sum(every) / len(every))


def test_one_set_alone_is_not_told_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, losses = write_store(tmp_path)
    one = replace(store, parts={"train": [], "val": store.parts["val"][-1:]})
    row = measure(make_job(one, ("a", "b", "c", "d")), 2, monkeypatch)
    assert row == {"val_loss": pytest.approx(sum(losses[3]) / len(losses[3]))}


def test_the_result_lists_each_set_with_its_records_and_losses(tmp_path: Path) -> None:
    store, _ = write_store(tmp_path)
    job = replace(make_job(store, ("a", "b", "c", "d")), weights=(2.0,))
    store.parts["train"] += [(f"train-{0:014x}.parquet", 9), (f"train-{ROWS_PER_SOURCE:014x}.parquet", 4)]
    rows = [{"step": step, "val_loss": 1.0, "val_losses": {"a": 3.0 - step, "c": 2.0, "d": 1.0}} for step in (0, 1)]
    first, second, *_ = summarize_sets(job, [{"step": 1, "loss": 1.0}, *rows])
    assert first == {
        "set": "a",
        "train_records": 9,
        "train_records_per_epoch": 18,
        "val_records": 7,
        "base_val_loss": 3.0,
        "val_loss": 2.0,
    }
    assert (second["train_records_per_epoch"], second["val_records"], second["val_loss"]) == (4, 0, None)
    one = replace(job, store=replace(store, parts={**store.parts, "val": store.parts["val"][-1:]}))
    assert [row["val_loss"] for row in summarize_sets(one, [{"step": 0, "val_loss": 7.0}])] == [None, None, None, 7.0]
    assert not list(summarize_sets(replace(job, sets=("a",)), rows)), "one set has nothing to be told apart from"
