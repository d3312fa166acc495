"""Ray Train around the engine: one training run that reports, checkpoints, and resumes wherever it was cut off.

The global batch is the unit: loss is the mean over its labelled tokens and the learning rate a function of the step, so
neither knows the number of workers. A checkpoint holds the trainable state and the step; the stream does the rest.
"""

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray.train
import torch
import torch.distributed as dist
from pydantic import Field
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

from adapter.adaption import AdaptionConfig
from rayjobs.base import PoolConfig
from rayjobs.capacity import capacity
from rayjobs.checkpoints import Kept, listed, mend, newest_whole, resumed, write_checkpoint
from rayjobs.config import config
from rayjobs.encoder import Tower
from rayjobs.engine import Dtype, Engine, OptimizerConfig, ZeroConfig, adapted_model
from rayjobs.order import Order
from rayjobs.pictures import Pictures
from rayjobs.places import Growing, check_seen
from rayjobs.runtime import Progress, environment, unwrapped, verbose
from rayjobs.stream import stream
from rayjobs.tables import read_jsonl, write_jsonl
from rayjobs.tokens import TokenStore
from rayjobs.tracking import TensorBoard, TrackConfig, Tracker, log_all, numbers, open_trackers
from rayjobs.vision import Eyes

REPORT_EVERY_S = 1.0
SILENT_S = 30.0
"""Without a step for so long, the progress display says what there is to run on."""


@config
class TrainConfig:
    """The recipe; the defaults are LLaMA-Adapter's for Alpaca."""

    epochs: float = Field(default=5, gt=0)
    """Passes over the training records."""
    warmup_epochs: float = Field(default=2, ge=0)
    """Linear warm-up, then half a cosine down to 0."""
    global_batch: int = Field(default=64, ge=1)
    """Records per optimizer step, over all workers."""
    token_budget: int = Field(default=4096, ge=1)
    """Tokens per micro-batch and worker, padding included: the knob for memory."""
    shuffle_records: int = Field(default=65536, ge=1)
    """Records shuffled together; a data set up to this size is shuffled as a whole."""
    seed: int = Field(default=0, ge=0)
    """Of the prompts' initial values and of the order of records."""
    checkpoint_activations: bool = False
    """Recompute the adapted layers in the backward pass: less memory, about a third more time."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """How much work a failure may cost."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Validate this often, besides before the first step and after the last; null for once an epoch."""

    def learning_rate(self, step: int, steps_per_epoch: int, peak: float) -> float:
        """The rate of one step: reaches `peak` at the end of warm-up; the last step's is just above 0."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.total_steps(steps_per_epoch)
        if step + 1 <= warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))

    def total_steps(self, steps_per_epoch: int) -> int:
        return max(1, round(self.epochs * steps_per_epoch))


@config
class ScaleConfig(PoolConfig):
    """How many Ray Train workers, one DeepSpeed rank each, and what each may use."""

    max_failures: int = Field(default=3, ge=-1)
    """Worker failures that the run survives; -1 for any number."""
    grow_every_s: float = Field(default=60, ge=0)
    """Below workers.max, how often it is asked whether there is room for more; growing costs a start, and the steps
    since the last checkpoint."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """Threads of a worker without a GPU; null shares the machine's cores among its workers. A tiny model is fastest on
    one, and a sum's last bits depend on how many there are."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs to know."""

    base: str
    dtype: Dtype
    adaption: AdaptionConfig
    store: TokenStore
    weights: tuple[float, ...]
    """How often each source's records are trained on in an epoch."""
    pictures: Pictures | None
    """Where images come from; None for text alone."""
    tower: Tower | None
    """What workers encode images with, if they come as pixels."""
    train: TrainConfig
    optimizer: OptimizerConfig
    zero: ZeroConfig

    def order(self, split: str) -> Order:
        return Order(
            store=self.store,
            split="train" if split == "train" else "val",
            global_batch=self.train.global_batch,
            token_budget=self.train.token_budget,
            shuffle_records=self.train.shuffle_records,
            seed=self.train.seed if split == "train" else None,
            weights=self.weights if split == "train" else (),
            pictures=self.pictures,
        )

    @property
    def total_steps(self) -> int:
        return self.train.total_steps(self.order("train").steps_per_epoch)

    @property
    def peak_lr(self) -> float:
        return self.optimizer.base_lr * self.train.global_batch / 256

    def validates_after(self, step: int) -> bool:
        every = self.train.validate_every_steps or self.order("train").steps_per_epoch
        return bool(self.store.rows("val")) and (step % every == 0 or step == self.total_steps)


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
    engine, eyes = Engine(model, job.zero, job.optimizer), Eyes(job.tower, device)
    step = 0
    try:
        begun: list[Any] = [resumed(loop["storage"]) if rank == 0 else None]
    except ValueError as error:
        begun = [{"refused": str(error)}]
    dist.broadcast_object_list(begun, device=device)  # one worker reads, so that all of them go on from the same step
    if isinstance(begun[0], dict):
        return begun[0]
    kept: Kept | None = begun[0]
    if kept:
        engine.load_state(kept.state)
        step = kept.step

    order = job.order("train")
    rows: list[dict[str, Any]] = kept.rows if kept else []
    if step == 0 and job.validates_after(0):
        rows.append({"step": 0, "val_loss": validate(engine, eyes, job, rank, world)})
    began = reported = time.monotonic()
    for micros in _by_step(stream(order, rank, world, range(step, job.total_steps))):
        waited = time.monotonic() - began
        lr = job.train.learning_rate(step, order.steps_per_epoch, job.peak_lr)
        losses = []
        for micro in micros:
            loss = engine.loss(micro.tokens, micro.labels, eyes.images(micro.images)) / micro.step_labels
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
            rows.append({"step": step, "val_loss": validate(engine, eyes, job, rank, world)})
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


def validate(engine: Engine, eyes: Eyes, job: TrainJob, rank: int, world: int) -> float:
    """The mean loss per labelled token of the whole validation split."""
    order = job.order("val")
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    engine.engine.eval()
    with torch.no_grad():
        for micro in stream(order, rank, world, range(order.steps_per_epoch)):
            total[0] += engine.loss(micro.tokens, micro.labels, eyes.images(micro.images))
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
        write_checkpoint(folder, Kept(state, step, rows))
        ray.train.report({"rows": rows}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _unseen(*folders: str) -> str | None:
    """Why this worker cannot work with the driver's folders, if it cannot."""
    try:
        check_seen(*folders)
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


class MetricsLog(ray.train.UserCallback):
    """Writes rank 0's rows to `metrics.jsonl` and to trackers, from the controller, which sits beside the driver."""

    def __init__(self, grown: Growing, track: TrackConfig) -> None:
        self.grown, self.track = grown, track
        self.last_step = math.inf
        self.trackers: list[Tracker] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        rows = metrics[0]["rows"]
        if not rows:
            return
        path = self.grown.fetch("metrics.jsonl")
        if rows[0]["step"] <= self.last_step and path.exists():  # resumed: these steps are being done again
            write_jsonl(path, [row for row in read_jsonl(path) if row["step"] < rows[0]["step"]])
        self.last_step = rows[-1]["step"]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if not self.trackers:
            there = open_trackers(self.grown.folder, self.track)
            self.trackers = [TensorBoard(self.grown.local, rows[0]["step"]), *there]
        log_all(self.trackers, [(row["step"], numbers(row)) for row in rows])
        with suppress(OSError):  # it may be back by the next report, and is told of at the end if not
            self.grown.send(now=checkpoint is not None)


class Recount(ControllerCallback):
    """Has Ray count what the cluster has at once when something failed: its own count (2.60) is up to 20 s old, and
    until the next one an elastic run would wait for workers on a machine that is lost."""

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        with suppress(Exception):  # without it the run goes on as well, only later
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=10)


class Network(TorchConfig):
    """Gloo on the network that Ray itself uses: by itself it takes the address of the machine's name, which on many
    machines is a loopback that no other one reaches."""

    @property
    def backend_cls(self) -> type:
        return _NetworkBackend


class _NetworkBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    ours = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == ours for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class Trainer(TorchTrainer):
    """Ray's cleaner of placement groups (2.60) does not answer when it is told to stop, and every run would end in the
    twelve seconds of waiting for it."""

    CLEANER_STOP_S = 0.5

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        for callback in callbacks:
            if isinstance(callback, PlacementGroupCleanerCallback):
                callback._stop_timeout = self.CLEANER_STOP_S
        return callbacks


def fit(job: TrainJob, scale: ScaleConfig, folder: Path, track: TrackConfig) -> dict[str, torch.Tensor]:
    """Trains, or resumes what `folder` holds, with a progress bar. Returns the final trainable state.

    Raises FloatingPointError if the loss ceased to be finite, ValueError if the workers can never fit.
    """
    resources, grown = scale.resources(), Growing(folder)
    fewest, most = scale.workers.min, scale.workers.max
    storage = f"{folder}/train"
    mend(storage)
    trainer = Trainer(
        train_worker,
        train_loop_config={"job": job, "storage": storage, "threads": scale.threads_per_worker},
        scaling_config=ray.train.ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=scale.grow_every_s,
        ),
        torch_config=Network(backend="nccl" if "GPU" in resources else "gloo"),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[MetricsLog(grown, track), Recount()],
            worker_runtime_env={"env_vars": environment()},
            logging_config=ray.train.LoggingConfig(log_level="INFO" if verbose() else "CRITICAL"),
        ),
    )
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    # In a thread of its own, so that Ctrl-C reaches this one, and this one can draw the bar.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with grown, Progress("train", unit="steps", total=job.total_steps) as progress:
        shown, stepped = (0, ""), time.monotonic()
        while thread.is_alive():
            thread.join(0.5)
            now = _last_step(grown.local / "metrics.jsonl")
            silent = time.monotonic() - stepped
            if now != shown:
                progress.update(*now)
                shown, stepped = now, time.monotonic()
            elif silent > SILENT_S and thread.is_alive():
                told = f"no step for {silent:.0f} s: {scale.workers} workers are wanted, there are {capacity()}"
                progress.update(now[0], told)
    with unwrapped():
        if "error" in outcome:
            raise outcome["error"]
        result = outcome["result"]
        if result.error is not None:
            raise result.error
    returned = result.return_value or {}
    if refused := returned.get("refused"):
        raise ValueError(refused)
    if stopped := returned.get("stopped"):
        raise FloatingPointError(stopped)
    final = newest_whole([result.checkpoint] if result.checkpoint else listed(storage))
    if final is None or final.step < job.total_steps:
        raise OSError(f"{storage}: the last checkpoint cannot be read; the same command makes it again")
    return final.state


def _last_step(metrics: Path) -> tuple[int, str]:
    """The last step, 0 before the first, and its figures in words."""
    rows = read_jsonl(metrics, last_bytes=1 << 14) if metrics.exists() else []
    losses = [row for row in rows if "loss" in row]
    if not losses:
        return 0, "starting"
    last = losses[-1]
    told = f"loss {last['loss']:.4f}  lr {last['lr']:.2e}  {last['tokens_per_s']:,} tokens/s"
    validated = [row["val_loss"] for row in rows if "val_loss" in row]
    return last["step"], told + (f"  val {validated[-1]:.4f}" if validated else "")
