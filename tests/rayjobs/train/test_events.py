"""The driver is told what the workers do and why one has died, in a sentence of ours."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from rayjobs.cluster.capacity import Capacity
from rayjobs.config import load
from rayjobs.console import setup_logging
from rayjobs.errors import LeaseLostError, StorageError
from rayjobs.runs.trackers import TrackConfig
from rayjobs.storage.files import read_jsonl
from rayjobs.storage.sync import SyncedFolder
from rayjobs.train import callbacks, start_times, trainer
from rayjobs.train.callbacks import EventLog, MetricsLog, describe_death
from rayjobs.train.config import ScaleConfig
from rayjobs.train.start_times import StartTimes
from rayjobs.train.trainer import Monitor

RAYS_TEXT = """A worker health check failed.
Worker info: Worker(actor=Actor(RayTrainWorker, 1), metadata=...)
The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR
"""


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (RAYS_TEXT, "its process was ended"),
        ("The actor died because its node has died. Node Id: 1", "its node is lost"),
        ("Task was killed due to the node running low on memory: memory pressure", "its node ran out of memory"),
        ("A worker health check has been hanging for 60 seconds.", "it does not answer"),
        ('Traceback:\n  File "a", line 1\nRuntimeError: CUDA error: x\nsee the log\n', "RuntimeError: CUDA error: x"),
        (f'  File "a"\nValueError: {"word " * 99}', f"ValueError: {'word ' * 36}word …"),
    ],
)
def test_a_death_has_a_phrase(text: str, phrase: str) -> None:
    assert describe_death(text) == phrase


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Watched:
    """A monitor, and the callback that its events come from."""

    def __init__(self, folder: Path, *scale: str) -> None:
        self.metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
        settings = load(ScaleConfig, None, scale)
        self.callback = EventLog(events, settings.max_failures, settings.max_preemptions)
        self.monitor = Monitor(self.metrics, events, settings, StartTimes())

    def report(self, *rows: dict[str, Any], checkpoint: Any = None, **other: Any) -> None:
        with self.metrics.open("a") as file:
            file.writelines(json.dumps({"loss": 1.0, "lr": 1e-3, "tokens_per_s": 9, **row}) + "\n" for row in rows)
        resumed = {"passed_over": []} if "resumed_at" in other else {}
        self.callback.after_report(None, [{**({"rows": rows} if rows else {}), **resumed, **other}], checkpoint)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(trainer, "time", clock)
    monkeypatch.setattr(trainer, "cluster_capacity", lambda: Capacity(nodes=({"CPU": 2.0},)))
    return clock


@pytest.mark.parametrize(
    ("scale", "needs"),
    [("workers=1", "1 worker"), ("workers=3", "3 workers"), ("workers={min: 1, max: 4}", "1 to 4 workers")],
)
def test_while_there_is_no_step_the_line_says_why(tmp_path: Path, clock: Clock, scale: str, needs: str) -> None:
    watched = Watched(tmp_path, scale)
    assert watched.monitor.refresh() == (0, "starting")
    clock.now += 31
    capacity = "the cluster has 1 node, 2 CPU and 0 GPU in all"
    expected = f"no step for 31 s: waiting for workers; the run needs {needs}, {capacity}"
    assert watched.monitor.refresh() == (0, expected)
    watched.report(doing="loading the model")
    clock.now += 14
    assert watched.monitor.refresh() == (0, "no step for 45 s: the workers are loading the model")
    watched.report(doing="validating before the first step", resumed_at=0)
    assert watched.monitor.refresh() == (0, "no step for 45 s: the workers are validating before the first step")
    watched.report({"step": 1})
    assert watched.monitor.refresh() == (1, "loss 1.0000  lr 1.00e-03  9 tokens/s")


def test_a_death_is_one_line_with_the_step_from_which_the_run_goes_on(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    watched = Watched(tmp_path, "max_failures=1")
    watched.report(doing="training", resumed_at=40)
    watched.report({"step": 41}, {"step": 50})
    watched.report({"step": 51}, saved_step=50)
    for errors in ({1: RuntimeError(RAYS_TEXT)}, {0: RuntimeError(RAYS_TEXT), 1: RuntimeError(RAYS_TEXT)}):
        watched.callback.after_exception(None, errors)
        watched.callback.after_exception(None, errors)  # Ray repeats it until the last worker has ended
        watched.monitor.refresh()
        watched.monitor.refresh()
        watched.report(doing="training", resumed_at=50)
        watched.report({"step": 51})
    assert capsys.readouterr().err.splitlines() == [
        "train: a worker died (its process was ended) after step 51; going on from step 50, 1 step is lost",
        "train: 2 workers died (its process was ended) after step 51, which is more than scale.max_failures=1 allows: "
        "the same command goes on from step 50, and scale.max_failures=-1 sets no limit",
    ]


def test_a_damaged_checkpoint_is_told_with_the_step_that_the_run_went_on_from(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging()
    watched = Watched(tmp_path, "max_failures=2")
    watched.report(doing="training", resumed_at=0)
    watched.report({"step": 41}, saved_step=40)
    watched.report({"step": 81}, saved_step=80)
    watched.report({"step": 93})
    watched.callback.after_exception(None, {1: RuntimeError(RAYS_TEXT)})
    watched.report(doing="training", resumed_at=40, passed_over=["checkpoint_80 is damaged (why)"])
    watched.callback.after_exception(None, {1: RuntimeError(RAYS_TEXT)})
    watched.report(doing="training", resumed_at=40)
    watched.monitor.refresh()
    assert capsys.readouterr().err.splitlines() == [
        "train: a worker died (its process was ended) after step 93; going on from step 80, 13 steps are lost",
        "train: checkpoint_80 is damaged (why)",
        "train: went on from step 40, 53 steps are lost",
        "train: a worker died (its process was ended) after step 40; going on from step 40",
    ]


def test_preemptions_are_told_and_counted_apart_from_failures(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node with a deadline, at which Ray ends the workers without an error; and two that die before theirs."""
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(time=lambda: 1000.0))
    setup_logging()
    watched = Watched(tmp_path, "max_failures=0", "max_preemptions=2")
    watched.report(doing="training", resumed_at=0)
    watched.report({"step": 41}, preemption={"nodes": 1, "deadline_ms": 1_110_000})
    watched.report({"step": 58}, saved_step=57)
    watched.report(doing="training", resumed_at=57)
    reclaimed = RayActorError(preempted=True)
    for step in (60, 70):
        watched.report({"step": step}, preemption={"nodes": 2, "deadline_ms": None})
        watched.callback.after_exception(None, {0: WorkerHealthCheckFailedError("", reclaimed), 1: RuntimeError("x")})
        if step == 60:
            watched.report(doing="training", resumed_at=60)
    watched.monitor.refresh()
    assert capsys.readouterr().err.splitlines() == [
        "train: a node will be taken away in 110 s; every step is saved until then",
        "train: the workers were started again without it; going on from step 57, 1 step is lost",
        "train: 2 nodes will be taken away; every step is saved until then",
        "train: 2 workers died (its node was taken away) after step 60; going on from step 57, 3 steps are lost",
        "train: went on from step 60",
        "train: 2 nodes will be taken away; every step is saved until then",
        "train: 2 workers died (its node was taken away) after step 70, which is more than scale.max_preemptions=2 "
        "allows: the same command goes on from step 60, and scale.max_preemptions=-1 sets no limit",
    ]
    assert watched.callback.failures == 0


def test_the_time_to_the_first_step_is_accounted_for_once(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start_times, "time", clock)
    setup_logging()
    watched = Watched(tmp_path)
    times = watched.monitor.times
    clock.now += 2.2
    times.end("starting Ray")
    clock.now += 0.3
    times.end("reading the records")
    for doing, seconds in (("loading the model", 5), ("training", 3)):
        clock.now += seconds
        watched.report(doing=doing)
        watched.monitor.refresh()
    phases = {"loading the model": 3.1, "the first step": 0.9}
    for _ in range(2):  # the second one after the workers have been started again
        watched.report(started=phases)
        watched.monitor.refresh()
    assert times.seconds == {"starting Ray": 2.2, "reading the records": 0.3, "starting workers": 5.0, **phases}
    assert capsys.readouterr().err == (
        "train: 12 s to the first step: starting Ray 2 s, starting workers 5 s, loading the model 3 s, "
        "the first step 1 s\n"
    )


def test_the_first_phase_begins_with_the_command_of_its_job_and_with_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 100.0, time=lambda: 5000.0)
    monkeypatch.setattr(start_times, "time", clock)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(create_time=lambda: 4996.5))
    start_times.begin_command("adapter-train")
    seconds = []
    for job in ("demo", "adapter-train", "adapter-train"):  # the last is run again by the same process
        times = StartTimes(job)
        times.end("importing and checking")
        seconds.append(times.seconds["importing and checking"])
    assert seconds == [0.0, 3.5, 0.0]


@pytest.mark.parametrize("error", [StorageError("the bucket does not answer"), LeaseLostError("now run by another")])
def test_metrics_outlast_an_outage_but_not_a_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An error in the controller ends the training: Ray starts the workers again only for errors of theirs."""

    def refuse(path: Path) -> None:
        raise error

    monkeypatch.setattr(callbacks, "check_lease", refuse)
    monkeypatch.setattr(callbacks, "log_all", lambda *_: None)
    log = MetricsLog(SyncedFolder(tmp_path), TrackConfig())
    reports = [{"rows": [{"step": 1}]}, {"rows": [{"step": 2}]}]
    is_lost = isinstance(error, LeaseLostError)
    for report in reports:
        with pytest.raises(LeaseLostError) if is_lost else nullcontext():
            log.after_report(None, [report], None)
    metrics = tmp_path / "metrics.jsonl"
    assert metrics.exists() != is_lost
    assert is_lost or [row["step"] for row in read_jsonl(metrics)] == [1, 2]
