"""Figures reach the trackers that a run asks for, on this machine alone."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayjobs.config import config
from rayjobs.runs import recorded
from rayjobs.runtime import RunConfig, open_run
from rayjobs.tracking import TensorBoard, TrackConfig, log_all, open_trackers


@config
class Config:
    lr: float = 0.5
    run: RunConfig


@recorded
def train(settings: Config) -> dict:
    folder = open_run(settings.run, settings)
    trackers = [TensorBoard(folder, 1), *open_trackers(folder, settings.run.track)]
    log_all(trackers, [(step, {"loss": 3.0 - step}) for step in (1, 2)])
    return {"steps": 2, "val_loss": 0.25, "adapter": "a.safetensors"}


def test_mlflow_and_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track = TrackConfig(mlflow=f"file:{tmp_path}/mlflow", wandb="adapters")
    settings = Config(run=RunConfig(name="r", storage=str(tmp_path), track=track))
    train(settings)
    client = mlflow.MlflowClient(tracking_uri=track.mlflow)
    (run,) = client.search_runs([client.get_experiment_by_name("rayjobs").experiment_id])
    assert run.data.params["lr"] == "0.5"
    assert run.data.metrics == {"loss": 1.0, "result/val_loss": 0.25, "result/steps": 2.0}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert run.info.status == "FINISHED"
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    assert events.Scalars("result/val_loss")[0].value == 0.25


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Gone:
        def log(self, rows: object) -> None:
            raise ConnectionError("no route")

        def close(self) -> None: ...

    trackers = [Gone(), TensorBoard(tmp_path, 0)]
    log_all(trackers, [(1, {"loss": 1.0})])
    assert [type(tracker) for tracker in trackers] == [TensorBoard]
    assert "Gone takes no more figures: no route" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.track\.wandb needs the optional `wandb` extra"):
        open_trackers(tmp_path, TrackConfig(wandb="p"))
