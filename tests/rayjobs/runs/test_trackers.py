"""Figures reach the trackers that a run asks for, on this machine alone."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayjobs.config import config
from rayjobs.lifecycle import job
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.runs.trackers import TensorBoard, TrackConfig, log_all, open_trackers
from rayjobs.storage.files import read_json


@config
class Config:
    JOB: ClassVar = "test-trackers"
    lr: float = 0.5
    run: RunConfig


@job
def train(settings: Config) -> dict:
    folder = open_run(settings.run, settings)
    trackers = [TensorBoard(folder, 1), *open_trackers(folder, settings.run.track)]
    log_all(trackers, [(step, {"loss": 3.0 - step}) for step in (1, 2)])
    return {"steps": 2, "val_loss": 0.25, "adapter": "a.safetensors", "eval": {"α, 16 shots": 93.5}}


@pytest.fixture
def track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackConfig:
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return TrackConfig(mlflow=f"file:{tmp_path}/mlflow", wandb="adapters")


def known(track: TrackConfig) -> Any:
    """MLflow's client, and the runs that it knows, the latest first."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=track.mlflow)
    return client, client.search_runs([client.get_experiment_by_name("rayjobs").experiment_id])


def test_mlflow_and_wandb_offline(tmp_path: Path, track: TrackConfig) -> None:
    train(Config(run=RunConfig(name="r", storage=str(tmp_path), track=track)))
    client, (run,) = known(track)
    assert run.data.params["lr"] == "0.5"
    of_result = {"result/val_loss": 0.25, "result/steps": 2.0, "result/eval/α_ 16 shots": 93.5}
    assert run.data.metrics == {"loss": 1.0, **of_result}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert run.info.status == "FINISHED"
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]
    assert events.Scalars("result/val_loss")[0].value == 0.25


@pytest.mark.parametrize(("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_mlflow_knows_a_run_as_running_until_it_ends(
    tmp_path: Path, track: TrackConfig, error: BaseException, status: str
) -> None:
    settings = Config(run=RunConfig(name="r", storage=str(tmp_path), track=replace(track, wandb=None)))

    @job
    def fails(settings: Config) -> dict:
        open_run(settings.run, settings)
        assert known(track)[1][0].info.status == "RUNNING"
        raise error

    for _ in range(2):  # a run that is resumed is running again
        with pytest.raises(type(error)):
            fails(settings)
        (run,) = known(track)[1]
        assert run.info.status == status
    train(settings)
    (run,) = known(track)[1]
    assert run.info.status == "FINISHED"


def test_a_folder_made_anew_is_a_new_run(tmp_path: Path, track: TrackConfig) -> None:
    settings = Config(run=RunConfig(name="r", storage=str(tmp_path), track=replace(track, mlflow=None)))
    ids = []
    for _ in range(2):
        open_run(settings.run, settings)
        ids.append(read_json(tmp_path / "r" / "wandb.json")["run_id"])
        open_run(settings.run, settings)
        assert read_json(tmp_path / "r" / "wandb.json")["run_id"] == ids[-1], "the same folder, the same run"
        assert list((tmp_path / "r" / "wandb").glob(f"offline-run-*/run-{ids[-1]}.wandb"))
        shutil.rmtree(tmp_path / "r")
    assert ids[0] != ids[1]


def test_a_tracker_that_is_gone_at_the_end_does_not_undo_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @job
    def run(settings: Config) -> dict:
        open_run(settings.run, settings)
        monkeypatch.setattr("rayjobs.runs.trackers.open_trackers", gone)
        return {"steps": 1}

    def gone(*_: object) -> None:
        raise ConnectionError("no route")

    assert run(Config(run=RunConfig(name="r", storage=str(tmp_path)))) == {"steps": 1}
    assert "no route" in caplog.text


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Gone:
        def log(self, rows: object) -> None:
            raise ConnectionError("no route")

        def close(self, state: str = "running") -> None: ...

    trackers = [Gone(), TensorBoard(tmp_path, 0)]
    log_all(trackers, [(1, {"loss": 1.0})])
    assert [type(tracker) for tracker in trackers] == [TensorBoard]
    assert "Gone gets no more metrics, because it failed: no route" in caplog.text


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.track\.wandb needs the optional `wandb` extra"):
        open_trackers(tmp_path, TrackConfig(wandb="p"))
