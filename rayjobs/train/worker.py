"""The training loop that every Ray Train worker runs."""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from rayjobs.cluster.shared_storage import assert_shared_storage
from rayjobs.data.loader import load_micro_batches
from rayjobs.models.image_conditioning import ImageFeaturizer
from rayjobs.train.checkpoint import TrainingCheckpoint, find_resumable, write_checkpoint
from rayjobs.train.config import TrainJob
from rayjobs.train.engine import Engine, adapted_model

REPORT_EVERY_S = 1.0


def train_worker(loop: dict[str, Any]) -> dict[str, Any]:
    """What one Ray Train worker does. Returns {"stopped": reason} if the loss ceased to be finite, {"refused": reason}
    for what another attempt would not change."""
    job: TrainJob = loop["job"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    unseen = _everyones(_unseen(os.path.dirname(loop["storage"]), job.store.folder))
    if any(unseen):
        return {"refused": next(filter(None, unseen))}
    if device.type == "cpu":
        torch.set_num_threads(loop["threads"] or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    model = adapted_model(job.base, job.adaption, dtype=job.dtype, zero=job.zero, seed=job.train.seed, device=device)
    model.checkpoint_activations = job.train.checkpoint_activations
    engine, featurizer = Engine(model, job.zero, job.optimizer), ImageFeaturizer(job.encoder, device)
    step = 0
    try:
        begun: list[Any] = [find_resumable(loop["storage"]) if rank == 0 else None]
    except ValueError as error:
        begun = [{"refused": str(error)}]
    dist.broadcast_object_list(begun, device=device)  # one worker reads, so that all of them go on from the same step
    if isinstance(begun[0], dict):
        return begun[0]
    kept: TrainingCheckpoint | None = begun[0]
    if kept:
        engine.load_state(kept.state)
        step = kept.step

    order = job.order("train")
    rows: list[dict[str, Any]] = kept.rows if kept else []
    if step == 0 and job.validates_after(0):
        rows.append({"step": 0, "val_loss": validate(engine, featurizer, job, rank, world)})
    began = reported = time.monotonic()
    for micros in _by_step(load_micro_batches(order, rank, world, range(step, job.total_steps))):
        waited = time.monotonic() - began
        lr = job.train.learning_rate(step, order.steps_per_epoch, job.peak_lr)
        losses = []
        for micro in micros:
            loss = engine.loss(micro.tokens, micro.labels, featurizer.images(micro.images)) / micro.step_labels
            engine.backward(loss)
            losses.append(loss.detach())
        total = torch.stack(losses).sum().item()  # the step's one wait for the device
        due = rank == 0 and time.monotonic() - reported > REPORT_EVERY_S
        tokens = sum(micro.n_tokens for micro in micros)
        mine = [total, float(due), float(tokens), waited / (time.monotonic() - began)]
        shared = torch.tensor(mine, dtype=torch.float64, device=engine.device)
        dist.all_reduce(shared)
        mean_loss, due_any, all_tokens, idle = shared.tolist()
        if not math.isfinite(mean_loss):
            bad = [id for micro, loss in zip(micros, losses, strict=True) if not loss.isfinite() for id in micro.ids]
            ray.train.report({"rows": rows})  # which lead up to it
            return {"stopped": _blame(step, lr, mean_loss, bad)}
        engine.step(lr)
        step += 1
        rows.append(
            {
                "step": step,
                "epoch": round(step / order.steps_per_epoch, 4),
                "loss": mean_loss,
                "lr": lr,
                "tokens_per_s": round(all_tokens / (time.monotonic() - began)),
                "busy": round(100 * (1 - idle / world), 1),
                "workers": world,
            }
        )
        if job.validates_after(step):
            rows.append({"step": step, "val_loss": validate(engine, featurizer, job, rank, world)})
        if step % job.train.checkpoint_every_steps == 0 or step == job.total_steps:
            _report(rows, rank, engine, step)
            rows = []
        elif due_any:
            ray.train.report({"rows": rows})
            rows = []
        if not rows:
            reported = time.monotonic()
        began = time.monotonic()
    if rows:  # of a last checkpoint after which nothing was left to do
        ray.train.report({"rows": rows})
    return {"steps": step}


def validate(engine: Engine, featurizer: ImageFeaturizer, job: TrainJob, rank: int, world: int) -> float:
    """The mean loss per labelled token of the whole validation split."""
    order = job.order("val")
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.engine.eval()
    with torch.no_grad():
        for micro in load_micro_batches(order, rank, world, range(order.steps_per_epoch)):
            total[0] += engine.loss(micro.tokens, micro.labels, featurizer.images(micro.images))
            total[1] += micro.step_labels if micro.last and rank == 0 else 0
    engine.engine.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def _by_step(micros: Iterator[Any]) -> Iterator[list[Any]]:
    """Micro-batches in the lists that make a step."""
    mine = []
    for micro in micros:
        mine.append(micro)
        if micro.last:
            yield mine
            mine = []


def _report(rows: list[dict[str, Any]], rank: int, engine: Engine, step: int) -> None:
    """Reports with a checkpoint, which rank 0 writes; gathering the state takes all ranks."""
    state = engine.state()
    if rank:
        ray.train.report({"rows": rows})
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, TrainingCheckpoint(state, step, rows))
        ray.train.report({"rows": rows}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _unseen(*folders: str) -> str | None:
    """Why this worker cannot work with the driver's folders, if it cannot."""
    try:
        assert_shared_storage(*folders)
    except ValueError as error:
        return str(error)
    return None


def _everyones(mine: Any) -> list[Any]:
    """What every worker has to say, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _blame(step: int, lr: float, loss: float, bad: list[int]) -> str:
    ids = sorted(id for part in _everyones(bad) for id in part)
    return (
        f"the loss became {loss} at step {step + 1} (lr {lr:.3g}) on records with ids {ids}; nothing was updated. "
        "Lower optimizer.base_lr, set optimizer.clip_norm, or look at these records; the same command resumes from "
        "the last checkpoint"
    )
