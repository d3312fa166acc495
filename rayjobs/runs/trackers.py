"""Where a run's figures go besides its own files: TensorBoard always, MLflow and Weights & Biases where it asks.

A tracker may be opened again on the same run, by a process that resumes it or by the driver at its end: figures join
those that are there. The run's folder keeps the id that the tracker knows it by; a folder made anew is a new run there.
"""

from rayjobs.errors import UserError
import importlib.util
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol
import yaml
from rayjobs.config import config
from rayjobs.storage.sync import SyncedFolder
from rayjobs.storage.paths import is_url
from rayjobs.config import flatten
from rayjobs.storage.files import read_json, write_json



@config
class TrackConfig:
    """Experiment trackers besides TensorBoard, whose events are in the run's folder."""

    mlflow: str | None = None
    """An MLflow tracking URI, such as http://host:5000; needs the `mlflow` extra."""
    wandb: str | None = None
    """A Weights & Biases project; needs the `wandb` extra. WANDB_MODE=offline keeps it on this machine."""
    experiment: str = "rayjobs"
    """MLflow's experiment."""


Row = tuple[int, Mapping[str, float]]
"""A step and its figures."""


class Tracker(Protocol):
    """An experiment tracker that metrics are sent to."""

    def log(self, rows: Sequence[Row]) -> None: ...

    def close(self, state: str = "running") -> None:
        """Lets go of it, with the run's state; one that runs still may be opened again."""


class TensorBoard:
    """Event files in `folder/tensorboard`; of steps done again, the latest count."""

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
    """One MLflow run for one run's folder, whose `mlflow.json` holds its id."""

    ENDS: ClassVar = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

    def __init__(self, folder: Path, track: TrackConfig) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=track.mlflow)
        known = folder / "mlflow.json"
        if known.exists():
            self.id = read_json(known)["run_id"]
            self.client.update_run(self.id, status="RUNNING")  # again, where it is resumed
            return
        experiment = self.client.get_experiment_by_name(track.experiment)
        at = experiment.experiment_id if experiment else self.client.create_experiment(track.experiment)
        self.id = self.client.create_run(at, run_name=folder.name).info.run_id
        for name, value in _settings(folder).items():
            self.client.log_param(self.id, name, value[:500])
        write_json(known, {"run_id": self.id})

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step)  # other characters are refused
            for step, values in rows
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):  # the most that MLflow takes at once
            self.client.log_batch(self.id, metrics[start : start + 1000])

    def close(self, state: str = "running") -> None:
        if state in self.ENDS:
            self.client.set_terminated(self.id, self.ENDS[state])


class WandB:
    """One Weights & Biases run for one run's folder, whose `wandb.json` holds its id."""

    def __init__(self, folder: Path, track: TrackConfig) -> None:
        import wandb

        known = folder / "wandb.json"
        id = read_json(known)["run_id"] if known.exists() else uuid.uuid4().hex[:16]
        self.run = wandb.init(
            project=track.wandb,
            name=folder.name,
            id=id,
            resume="allow",
            dir=tempfile.gettempdir() if is_url(folder) else str(folder),
            config=_settings(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )
        write_json(known, {"run_id": id})

    def log(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            self.run.log(dict(values), step=step)

    def close(self, state: str = "running") -> None:
        self.run.finish(exit_code=int(state in ("failed", "interrupted")))


def open_trackers(folder: Path, track: TrackConfig) -> list[Tracker]:
    """The trackers besides TensorBoard of the run in `folder`, which its settings are told to.

    Raises ValueError if one is not installed, and the tracker's own errors if it cannot be reached.
    """
    for name in ("mlflow", "wandb"):
        if getattr(track, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"run.track.{name} needs the optional `{name}` extra, which is not installed")
    found: list[Tracker] = [MLflow(folder, track)] if track.mlflow else []
    return [*found, WandB(folder, track)] if track.wandb else found


def log_all(trackers: list[Tracker], rows: Sequence[Row]) -> None:
    """Sends figures to all. One that fails is left out from then on, with a word: it must not end the run."""
    for tracker in list(trackers):
        try:
            tracker.log(rows)
        except Exception as error:
            print(f"{type(tracker).__name__} takes no more figures: {error}", file=sys.stderr)
            trackers.remove(tracker)


def log_outcome(folder: Path, track: TrackConfig, state: str, result: Mapping[str, Any] | None = None) -> None:
    """Tells all how a run ended, with its figures if it came to any. What cannot be reached is told, and is no error:
    the run is over."""
    if result is None:  # a run that failed before it was known to a tracker need not be known to it now
        mlflow, wandb = ((folder / f"{name}.json").exists() for name in ("mlflow", "wandb"))
        track = replace(track, mlflow=track.mlflow if mlflow else None, wandb=track.wandb if wandb else None)
    try:
        with SyncedFolder(folder) as grown:
            trackers = open_trackers(folder, track)
            if result is not None:
                step = result.get("steps", 0)
                trackers.append(TensorBoard(grown.local, step + 1))
                log_all(trackers, [(step, {f"result/{name}": value for name, value in numbers(result).items()})])
            for tracker in trackers:
                tracker.close(state)
    except Exception as error:
        print(f"not told to all trackers that the run is {state}: {error}", file=sys.stderr)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What of a result or a row of metrics can be plotted over steps, that of nested ones as `outer/inner`."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "epoch"):
            found[name] = float(value)
    return found


def _settings(folder: Path) -> dict[str, str]:
    """The run's settings as {"section.key": text}."""
    return flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
