"""Ray Train around the engine: one training run that reports, checkpoints, and resumes wherever it was cut off.

The global batch is the unit: loss is the mean over its labelled tokens and the learning rate a function of the step, so
neither knows the number of workers. A checkpoint holds the trainable state and the step; the stream does the rest.
"""

import threading
import time
from pathlib import Path
from typing import Any

import ray.train
import torch

from rayjobs.cluster.capacity import cluster_capacity
from rayjobs.cluster.errors import reraise_user_errors
from rayjobs.cluster.ray_init import environment
from rayjobs.console import Progress, verbose
from rayjobs.errors import NonFiniteLossError, UserError
from rayjobs.runs.trackers import TrackConfig
from rayjobs.storage.files import read_jsonl
from rayjobs.storage.sync import SyncedFolder
from rayjobs.train.callbacks import MetricsLog
from rayjobs.train.checkpoint import list_checkpoints, newest_readable
from rayjobs.train.config import ScaleConfig, TrainJob
from rayjobs.train.ray_workarounds import Network, RefreshClusterResources, Trainer, delete_truncated_snapshot
from rayjobs.train.worker import train_worker

SILENT_S = 30.0
"""Without a step for so long, the progress display says what there is to run on."""


def fit(job: TrainJob, scale: ScaleConfig, folder: Path, track: TrackConfig) -> dict[str, torch.Tensor]:
    """Trains, or resumes what `folder` holds, with a progress bar. Returns the final trainable state.

    Raises NonFiniteLossError if the loss ceased to be finite, ValueError if the workers can never fit.
    """
    resources, grown = scale.resources(), SyncedFolder(folder)
    fewest, most = scale.workers.min, scale.workers.max
    storage = f"{folder}/train"
    delete_truncated_snapshot(storage)
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
            callbacks=[MetricsLog(grown, track), RefreshClusterResources()],
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
                told = f"no step for {silent:.0f} s: {scale.workers} workers are wanted, there are {cluster_capacity()}"
                progress.update(now[0], told)
    with reraise_user_errors():
        if "error" in outcome:
            raise outcome["error"]
        result = outcome["result"]
        if result.error is not None:
            raise result.error
    returned = result.return_value or {}
    if refused := returned.get("refused"):
        raise UserError(refused)
    if stopped := returned.get("stopped"):
        raise NonFiniteLossError(stopped)
    final = newest_readable([result.checkpoint] if result.checkpoint else list_checkpoints(storage))
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
