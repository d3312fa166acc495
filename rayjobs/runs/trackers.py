"""Experiment trackers: TensorBoard for every run, MLflow and Weights & Biases where a run asks for them.

A tracker can be opened again on the same run, by a process that resumes it or by the driver at its end: new metrics
join the old ones. The run's folder keeps the id by which the tracker knows it; a folder made anew is a new run there.
"""

import importlib.util
import logging
import re
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rayjobs.config import config, flatten
from rayjobs.console import printable
from rayjobs.errors import ConfigError
from rayjobs.storage.credentials import drop_mask, mask_credentials
from rayjobs.storage.files import read_object, write_json
from rayjobs.storage.paths import is_url
from rayjobs.storage.sync import SyncedFolder
from rayjobs.storage.yaml_file import read_yaml

logger = logging.getLogger(__name__)


@config
class TrackConfig:
    """Experiment trackers besides TensorBoard, whose event files are in the run's folder."""

    mlflow: str | None = None
    """MLflow tracking URI, such as http://host:5000; needs the `mlflow` extra."""
    wandb: str | None = None
    """Weights & Biases project; needs the `wandb` extra. With WANDB_MODE=offline its files stay on this machine."""
    experiment: str = "rayjobs"
    """MLflow experiment."""


Row = tuple[int, Mapping[str, float]]
"""A step and its metrics."""


class Tracker(Protocol):
    """An experiment tracker that metrics are sent to."""

    def log(self, rows: Sequence[Row]) -> None:
        """Send rows of (step, metrics)."""

    def close(self, state: str = "running") -> None:
        """Close the connection and report the run's state; a run that is still `running` may be opened again."""


class TensorBoard:
    """Event files in `folder/tensorboard`; a step that is done again replaces its earlier metrics."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, state: str = "running") -> None:
        self.writer.close()


class MLflow:
    """The MLflow run of a run folder, whose `mlflow.json` holds its id."""

    STATUS: ClassVar = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
    METRICS_PER_REQUEST = 1000
    """MLflow's limit."""

    def __init__(self, folder: Path, track: TrackConfig) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=drop_mask(str(track.mlflow)))
        id_file = folder / "mlflow.json"
        if id_file.exists():
            self.id = read_object(id_file)["run_id"]
            self.client.update_run(self.id, status="RUNNING")  # again, if the run is resumed
            return
        experiment = self.client.get_experiment_by_name(track.experiment)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(track.experiment)
        self.id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
        for name, value in _settings(folder).items():
            self.client.log_param(self.id, name, value[:500])
        write_json(id_file, {"run_id": self.id})

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step)  # MLflow refuses other characters
            for step, values in rows
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), self.METRICS_PER_REQUEST):
            self.client.log_batch(self.id, metrics[start : start + self.METRICS_PER_REQUEST])

    def close(self, state: str = "running") -> None:
        if state in self.STATUS:
            self.client.set_terminated(self.id, self.STATUS[state])


class WandB:
    """The Weights & Biases run of a run folder, whose `wandb.json` holds its id."""

    def __init__(self, folder: Path, track: TrackConfig) -> None:
        import wandb

        id_file = folder / "wandb.json"
        run_id = read_object(id_file)["run_id"] if id_file.exists() else uuid.uuid4().hex[:16]
        self.run = wandb.init(
            project=track.wandb,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=tempfile.gettempdir() if is_url(folder) else str(folder),
            config=_settings(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )
        write_json(id_file, {"run_id": run_id})

    def log(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            self.run.log(dict(values), step=step)

    def close(self, state: str = "running") -> None:
        self.run.finish(exit_code=int(state in ("failed", "interrupted")))


def open_trackers(folder: Path, track: TrackConfig) -> list[Tracker]:
    """Open the trackers besides TensorBoard of the run in `folder`, and send them its settings if they are new to them.

    Raises ConfigError if a tracker is not installed, and the tracker's own error if it cannot be reached.
    """
    for name in ("mlflow", "wandb"):
        if getattr(track, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.track.{name} needs the optional `{name}` extra, which is not installed")
    trackers: list[Tracker] = []
    if track.mlflow:
        trackers.append(MLflow(folder, track))
    if track.wandb:
        trackers.append(WandB(folder, track))
    return trackers


def log_all(trackers: list[Tracker], rows: Sequence[Row]) -> None:
    """Send metrics to all trackers. One that fails is removed with a warning, so that it does not end the run."""
    for tracker in list(trackers):
        try:
            tracker.log(rows)
        except Exception as error:
            reason = printable(str(error))
            logger.warning("%s gets no more metrics, because it failed: %s", type(tracker).__name__, reason)
            trackers.remove(tracker)


def log_outcome(folder: Path, track: TrackConfig, state: str, result: Mapping[str, Any] | None = None) -> None:
    """Tell all trackers the final state of a run and the numbers of its result, if it has one.

    A tracker that cannot be reached costs a warning: the run itself is over.
    """
    if result is None:  # a run that failed before it was known to a tracker need not become known now
        mlflow, wandb = ((folder / f"{name}.json").exists() for name in ("mlflow", "wandb"))
        track = replace(track, mlflow=track.mlflow if mlflow else None, wandb=track.wandb if wandb else None)
    try:
        with SyncedFolder(folder) as synced:
            trackers = open_trackers(folder, track)
            if result is not None:
                step = result.get("steps", 0)
                trackers.append(TensorBoard(synced.local, step + 1))
                log_all(trackers, [(step, {f"result/{name}": value for name, value in numbers(result).items()})])
            for tracker in trackers:
                tracker.close(state)
    except Exception as error:
        logger.warning("not every tracker knows that the run is %s: %s", state, printable(str(error)))


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values of a result or of a row of metrics; nested ones are named `outer/inner`."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "epoch"):
            flat[name] = float(value)
    return flat


def _settings(folder: Path) -> dict[str, str]:
    """The run's settings as {"section.key": text}."""
    return flatten(mask_credentials(read_yaml(folder / "config.yaml")))
