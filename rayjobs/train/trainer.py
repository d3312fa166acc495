"""Run Ray Train from the driver: start or resume a training run, show its progress and return the trained weights.

The global batch is the unit: the loss is the mean over its labelled tokens and the learning rate a function of the
step, so that neither depends on the number of workers. A checkpoint holds the trainable state and the step; the sampler
derives the position in the data from the step.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from pathlib import Path

import ray.train
from ray.train.torch import TorchConfig
from torch import Tensor

from rayjobs.cluster.capacity import cluster_capacity
from rayjobs.cluster.environment import worker_environment
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.console import Progress, verbose
from rayjobs.errors import StorageError
from rayjobs.runs.trackers import TrackConfig
from rayjobs.storage.files import read_jsonl
from rayjobs.storage.sync import SyncedFolder
from rayjobs.train.callbacks import STARTING, TRAINING, Event, EventLog, MetricsLog, read_events
from rayjobs.train.checkpoint import list_checkpoints, newest_readable
from rayjobs.train.config import ScaleConfig
from rayjobs.train.ray_workarounds import (
    ABORTED_WITHIN_S,
    RefreshClusterResources,
    Trainer,
    abort_training,
    delete_truncated_snapshot,
)
from rayjobs.train.start_times import StartTimes
from rayjobs.train.train_job import TrainJob
from rayjobs.train.worker import WorkerResult, train_worker

logger = logging.getLogger(__name__)

EXPERIMENT = "train"
"""Folder of Ray Train within the run's folder."""
REFRESH_S = 0.5
WAITING_AFTER_S = 30.0
"""Time without a step after which the progress line shows what the run needs and what the cluster has."""


def fit(job: TrainJob, scale: ScaleConfig, folder: Path, track: TrackConfig, times: StartTimes) -> dict[str, Tensor]:
    """Train, or resume the run in `folder`, and return the trainable state after the last step.

    times: what was needed so far; the phases up to the first step are added to it.

    Raises NonFiniteLossError if the loss becomes infinite or NaN, ResourceError if the workers can never fit.
    """
    storage, synced = f"{folder}/{EXPERIMENT}", SyncedFolder(folder)
    delete_truncated_snapshot(storage)
    with synced, tempfile.TemporaryDirectory(prefix="rayjobs-") as temporary:
        events = Path(temporary) / "events.jsonl"
        callbacks = [MetricsLog(synced, track), EventLog(events, scale.max_failures, scale.max_preemptions)]
        trainer = build_trainer(job, scale, folder, callbacks)
        monitor = Monitor(synced.local / "metrics.jsonl", events, scale, times)
        result = run_with_progress(trainer, monitor, job.last_step)
    return read_result(result, storage, job.last_step)


def build_trainer(
    job: TrainJob, scale: ScaleConfig, folder: Path, callbacks: Sequence[ray.train.UserCallback]
) -> Trainer:
    """Return the trainer with the scaling, failure and checkpoint settings of a run."""
    resources = scale.resources()
    fewest, most = scale.workers.min, scale.workers.max
    return Trainer(
        train_worker,
        train_loop_config={"job": job, "storage": f"{folder}/{EXPERIMENT}", "threads": scale.threads_per_worker},
        scaling_config=ray.train.ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=scale.grow_every_s,
        ),
        torch_config=TorchConfig(backend="nccl" if "GPU" in resources else "gloo"),
        run_config=ray.train.RunConfig(
            name=EXPERIMENT,
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(
                max_failures=scale.max_failures, max_preemption_failures=scale.max_preemptions
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[*callbacks, RefreshClusterResources()],
            worker_runtime_env={"env_vars": worker_environment()},
            logging_config=ray.train.LoggingConfig(log_level="INFO" if verbose() else "CRITICAL"),
        ),
    )


class FitThread(threading.Thread):
    """Runs `trainer.fit()`, so that the main thread can draw the progress bar and receives Ctrl-C.

    A daemon, because the process must be able to end after Ctrl-C while `fit` is still waiting.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.future: Future[ray.train.Result] = Future()

    def run(self) -> None:
        try:
            self.future.set_result(self.trainer.fit())
        except BaseException as error:
            self.future.set_exception(error)

    def end(self) -> None:
        """Abort the training, also if it has only begun to start, and wait for `fit` to notice, a minute at most."""
        deadline = time.monotonic() + ABORTED_WITHIN_S
        while not self.future.done() and time.monotonic() < deadline:
            abort_training()
            wait([self.future], timeout=REFRESH_S)


class Monitor:
    """The state of a running `fit`, read from the files that Ray Train's controller writes."""

    def __init__(self, metrics: Path, events: Path, scale: ScaleConfig, times: StartTimes) -> None:
        self.metrics, self.events, self.scale, self.times = metrics, events, scale, times
        self.logged = 0
        self.doing = STARTING
        self.progress, self.changed_at = last_step(metrics), time.monotonic()

    def refresh(self) -> tuple[int, str]:
        """Log the messages that are new; return the last step and a phrase with its metrics, or why there is none."""
        events = read_events(self.events)
        for event in events[self.logged :]:
            self.doing = event.doing or self.doing
            if event.message:
                logger.warning("train: %s", event.message)
            self._account(event)
        self.logged = len(events)
        progress = last_step(self.metrics)
        if progress != self.progress:
            self.progress, self.changed_at = progress, time.monotonic()
        waiting_s = time.monotonic() - self.changed_at
        if waiting_s >= WAITING_AFTER_S:
            return progress[0], f"no step for {waiting_s:.0f} s: {self.describe_waiting()}"
        return progress if progress[0] else (0, self.doing)

    def _account(self, event: Event) -> None:
        """Add the phases of the first start, and tell them when the first step is made."""
        if "the first step" in self.times.seconds:
            return
        if event.doing and event.doing != STARTING and "starting workers" not in self.times.seconds:
            self.times.end("starting workers")
        if event.started:
            self.times.seconds |= event.started
            logger.info("train: %s", self.times)

    def describe_waiting(self) -> str:
        """A phrase of what the run waits for."""
        if self.doing not in (STARTING, TRAINING):
            return f"the workers are {self.doing}"
        # Ray Train also restarts workers without an error, for instance to add some.
        needed = f"{self.scale.workers} worker{'' if self.scale.workers.max == 1 else 's'}"
        starting = "waiting for workers; " if self.doing == STARTING else ""
        return f"{starting}the run needs {needed}, the cluster has {cluster_capacity()}"


def run_with_progress(trainer: Trainer, monitor: Monitor, total_steps: int) -> ray.train.Result:
    """Run the trainer to its end; meanwhile show how far it is. Ctrl-C ends the training and frees its workers.

    Raises what the workers raised, a user error without Ray's wrapping.
    """
    thread = FitThread(trainer)
    thread.start()
    try:
        last = monitor.refresh()
        with Progress("train", unit="steps", total=total_steps, done=last[0]) as progress:
            while not thread.future.done():
                wait([thread.future], timeout=REFRESH_S)
                current = monitor.refresh()
                if current != last:
                    progress.update(*current)
                    last = current
    except BaseException:
        thread.end()
        raise
    with reraise_user_errors():
        result = thread.future.result()
        if result.error is not None:
            raise result.error
    return result


def read_result(result: ray.train.Result, storage: str, steps: int) -> dict[str, Tensor]:
    """Return the trainable state of the last checkpoint, or raise the error that the workers returned."""
    returned: WorkerResult | None = result.return_value  # None if Ray found the run finished and started no worker
    if returned and returned.error:
        raise returned.error
    final = newest_readable([result.checkpoint] if result.checkpoint else list_checkpoints(storage))
    if final is None or final.content.step < steps:
        raise StorageError(f"{storage}: the last checkpoint cannot be read; the same command makes it again")
    return final.content.state


def last_step(metrics: Path) -> tuple[int, str]:
    """Return the last step in the metrics file, 0 before the first, and a phrase with its metrics."""
    rows = read_jsonl(metrics, last_bytes=1 << 14) if metrics.exists() else []
    steps = [row for row in rows if "loss" in row]
    if not steps:
        return 0, ""
    last = steps[-1]
    phrase = f"loss {last['loss']:.4f}  lr {last['lr']:.2e}  {last['tokens_per_s']:,} tokens/s"
    validated = [row["val_loss"] for row in rows if "val_loss" in row]
    return last["step"], phrase + (f"  val {validated[-1]:.4f}" if validated else "")
