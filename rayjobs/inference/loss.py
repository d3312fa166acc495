"""Held-out loss: cross-entropy of every record's output, computed by a pool of workers with Ray Data."""

import math
from typing import Any

import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from rayjobs.cluster.device import worker_device
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_data import ray_data_context
from rayjobs.cluster.worker_pool import TASK_CPUS, WorkerPoolConfig, actor_cpus
from rayjobs.console import Progress
from rayjobs.data.image_source import ImageSource, StoredFeatures
from rayjobs.data.loader import collate_micro_batch
from rayjobs.data.sampler import ElasticBatchSampler, window_micro_batches
from rayjobs.data.token_store import Split, TokenStore
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.models.image_conditioning import ImageConditioning, ImageFeaturizer

LOSSES = pa.schema([("id", pa.int64()), ("loss", pa.float64()), ("labels", pa.int64())])
"""A record's id, its loss summed over its labelled tokens, and how many of these it has."""


def record_losses(
    model: AdapterSourceConfig,
    conditioning: ImageConditioning | None,
    store: TokenStore,
    images: ImageSource | None,
    token_budget: int,
    pool: WorkerPoolConfig,
    split: Split = "train",
) -> pa.Table:
    """The losses of all records of one split of a token store: a table of `LOSSES`, ordered by id.

    token_budget: tokens per batch of a worker, padding included.
    """
    sampler = ElasticBatchSampler(
        store=store,
        split=split,
        global_batch=512,
        token_budget=token_budget,
        shuffle_records=4096,
        seed=None,
        images=images,
    )
    windows = [{"epoch": 0, "window": window} for window in range(sampler.windows_per_epoch)]
    resources = pool.resources()
    stored, device = isinstance(images, StoredFeatures), worker_device(resources)
    progress = Progress("eval", unit="records", total=store.rows(split))
    with ray_data_context(preserve_order=True), reraise_user_errors(), progress as bar:
        batches = ray.data.from_items(windows, override_num_blocks=len(windows)).map_batches(
            window_micro_batches,
            batch_size=1,
            num_cpus=TASK_CPUS,
            compute=TaskPoolStrategy(size=min(2, len(windows))),
            fn_kwargs={"sampler": sampler, "steps": range(sampler.steps_per_epoch), "rank": 0, "world": 1},
        )
        scored = batches.map_batches(
            LossWorker,
            batch_size=4,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.workers.max),
            num_cpus=actor_cpus(resources),
            num_gpus=resources.get("GPU", 0),
            fn_constructor_args=(model, conditioning, stored, device),
        )
        tables = []
        for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            bar.advance(table.num_rows)
    return pa.concat_tables(tables).sort_by("id")


def summarize_losses(losses: pa.Table) -> dict[str, Any]:
    """Mean loss per labelled token and perplexity, for `result.json`."""
    labels = sum(losses["labels"].to_pylist())
    loss = math.fsum(losses["loss"].to_pylist()) / labels
    return {
        "headline": f"loss {loss:.4f}, perplexity {math.exp(loss):.2f}",
        "loss": round(loss, 6),
        "perplexity": round(math.exp(loss), 4),
        "records": losses.num_rows,
        "labelled_tokens": labels,
    }


class LossWorker:
    """An actor that holds the model and sums each record's loss over its labels."""

    def __init__(
        self, model: AdapterSourceConfig, conditioning: ImageConditioning | None, stored: bool, device: str
    ) -> None:
        """stored: images come as features, so the worker needs no image encoder."""
        self.model = model.load(device, conditioning).model
        self.featurizer = ImageFeaturizer(None if conditioning is None or stored else conditioning.encoder, device)
        self.device = device

    @torch.no_grad()
    def __call__(self, table: pa.Table) -> pa.Table:
        rows: dict[str, list[float]] = {"id": [], "loss": [], "labels": []}
        for batch in map(collate_micro_batch, table.to_pylist()):
            if not batch.ids:  # a micro-batch that keeps training workers in step
                continue
            images = self.featurizer.images(batch.images)
            if images is not None:
                images = images[0].to(self.device), images[1].to(self.device)
            rows["id"] += batch.ids
            rows["loss"] += self.model.losses(batch.tokens, batch.labels, images).tolist()
            rows["labels"] += (batch.labels >= 0).sum(1).tolist()
        return pa.table(rows, LOSSES)
