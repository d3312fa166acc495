"""Loss and perplexity of a base, with or without an adapter, on held-out instruction records, spread over workers."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
import torch
from pydantic import Field
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from adapter.checkpoint import read_adapter
from rayjobs.base import BaseConfig, PoolConfig
from rayjobs.config import config
from rayjobs.order import Order, window_micro_batches
from rayjobs.report import show_table
from rayjobs.runs import recorded
from rayjobs.runtime import Progress, RunConfig, connect, data_context, open_run, unwrapped
from rayjobs.stream import collate
from rayjobs.tables import write_json, write_parquet
from rayjobs.tokens import RecordsConfig, prepare_tokens

LOSSES = pa.schema([("id", pa.int64()), ("loss", pa.float64()), ("labels", pa.int64())])


@config
class Config:
    base: BaseConfig
    adapter: str | None = None
    """An adapter file: ours, official v1, litgpt or PEFT; null measures the bare base."""
    data: RecordsConfig
    token_budget: int = Field(default=8192, ge=1)
    """Tokens per batch and worker, padding included."""
    scale: PoolConfig = PoolConfig()
    run: RunConfig


class Scorer:
    """An actor that holds the model and sums each record's loss over its labels."""

    def __init__(self, base: BaseConfig, adapter: str | None, device: str) -> None:
        self.model = base.load(adapter, device).model
        self.device = device

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> pa.Table:
        rows: dict[str, list[float]] = {"id": [], "loss": [], "labels": []}
        for micro in map(collate, table.to_pylist()):
            labels = micro.labels.to(self.device)
            hidden = self.model.hidden(micro.tokens.to(self.device))
            for i, id in enumerate(micro.ids):
                rows["id"].append(id)
                rows["loss"].append(self.model.output(hidden[i : i + 1], labels[i : i + 1]).item())
                rows["labels"].append(int((micro.labels[i] >= 0).sum()))
        return pa.table(rows, LOSSES)


def check(settings: Config) -> Path:
    """Everything that can be told before a worker starts; returns the tokenizer's path. Raises ValueError."""
    _, tokenizer = settings.base.open()
    if settings.adapter is not None:
        read_adapter(settings.adapter)
    settings.data.prompt_template()
    return tokenizer


def plan(settings: Config) -> None:
    """Shows what `run` would do."""
    check(settings)
    rows = [
        ["base", settings.base.path],
        ["adapter", settings.adapter or "none"],
        ["data", ", ".join(settings.data.path)],
    ]
    show_table("plan", ["", ""], [*rows, ["workers", str(settings.scale.workers)]])


@recorded
def run(settings: Config) -> dict[str, Any]:
    """Returns and writes `result.json`, with every record's loss beside it in `losses.parquet`."""
    tokenizer = check(settings)
    folder = open_run(settings.run, settings)
    connect()
    store = prepare_tokens(settings.data, tokenizer, settings.run.cache_folder)
    order = Order(
        store=store,
        split="train",
        global_batch=512,
        token_budget=settings.token_budget,
        shuffle_records=4096,
        seed=None,
    )
    resources = settings.scale.resources()
    windows = [{"epoch": 0, "window": window} for window in range(order.windows_per_epoch)]
    tables = []
    with (
        data_context(preserve_order=True),
        unwrapped(),
        Progress("eval", unit="records", total=store.rows("train")) as bar,
    ):
        batches = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
            window_micro_batches,
            batch_size=1,
            num_cpus=0.01,
            compute=TaskPoolStrategy(size=min(2, len(windows))),
            fn_kwargs={"order": order, "steps": range(order.steps_per_epoch), "rank": 0, "world": 1},
        )
        scored = batches.map_batches(
            Scorer,
            batch_size=4,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=settings.scale.workers),
            num_cpus=resources["CPU"],
            num_gpus=resources.get("GPU", 0),
            fn_constructor_args=(settings.base, settings.adapter, "cuda" if "GPU" in resources else "cpu"),
        )
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            bar.advance(table.num_rows)
    losses = pa.concat_tables(tables).sort_by("id")
    write_parquet(folder / "losses.parquet", losses, LOSSES)
    labels = sum(losses["labels"].to_pylist())
    loss = math.fsum(losses["loss"].to_pylist()) / labels
    result = {
        "loss": round(loss, 6),
        "perplexity": round(math.exp(loss), 4),
        "records": losses.num_rows,
        "labelled_tokens": labels,
        "rejected_records": store.rejected,
    }
    write_json(folder / "result.json", result)
    show_table(settings.run.name, ["", ""], [[name.replace("_", " "), str(value)] for name, value in result.items()])
    return result
