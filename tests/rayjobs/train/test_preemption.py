"""When the training loop saves a checkpoint: by time, by steps, and when a node is announced to be taken away."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from ray.train import PreemptionInfo

from rayjobs.cluster.environment import BEHAVIOUR, QUIET
from rayjobs.train import worker
from rayjobs.train.checkpoint import TrainingCheckpoint
from rayjobs.train.checkpoint_writer import CheckpointWriter
from rayjobs.train.config import ScaleConfig, TrainConfig
from rayjobs.train.metric_rows import MetricRows
from rayjobs.train.worker import TrainingLoop
from tests.waiting import wait_until


def info(node: str, deadline_ms: int | None = None) -> PreemptionInfo:
    return PreemptionInfo(deadline_ms=deadline_ms, preempted_node_to_ranks={node: [0]})


class Reports:
    """A loop of 1,000 steps as rank 0 runs it, and what it reports: metrics, saved steps, notices."""

    def __init__(self, storage: Path, monkeypatch: pytest.MonkeyPatch, **train: Any) -> None:
        self.preemption: PreemptionInfo | None = None
        self.now, self.asked, self.reported = 0.0, 0, list[dict[str, Any]]()
        monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(ray.train, "get_preemption_info", self.ask)
        monkeypatch.setattr(ray.train, "report", lambda metrics, **_: self.reported.append(metrics))
        self.loop = TrainingLoop.__new__(TrainingLoop)
        self.loop.job = SimpleNamespace(train=TrainConfig(**train))  # type: ignore[assignment]
        self.loop.engine = SimpleNamespace(tensors=self.tensors)  # type: ignore[assignment]
        self.loop.rank, self.loop.step, self.loop.last_step = 0, 0, 1000
        self.loop.saved = self.loop.reported = 0.0
        self.loop.rows, self.loop.writer, self.loop.preemption = MetricRows(), CheckpointWriter(str(storage)), None

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [("prompt", torch.full((3, 5), float(self.loop.step)))]

    def ask(self) -> PreemptionInfo | None:
        self.asked += 1
        return self.preemption

    def make_step(self, seconds: float) -> list[dict[str, Any]]:
        """Make a step that ends so many seconds after the one before; return its reports."""
        self.now += seconds
        due = self.loop.due_after(self.loop.step + 1)
        self.loop.step += 1
        self.loop.rows.add({"step": self.loop.step})
        self.reported.clear()
        self.loop.end_step(due)
        if not self.loop.writer.is_idle:  # written before the next step ends
            wait_until(lambda: self.loop.writer.is_done, "the checkpoint")
        return list(self.reported)


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reports:
    return Reports(tmp_path, monkeypatch, checkpoint_every_s=None)


def steps(*numbers: int) -> dict[str, Any]:
    return {"rows": [{"step": number} for number in numbers]}


def test_checkpoints_are_due_by_time_by_steps_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is reported after the step in which it was written."""
    reports = Reports(tmp_path, monkeypatch, checkpoint_every_s=10, checkpoint_every_steps=7)
    seen = [reports.make_step(0.4) for _ in range(40)]
    saved = [(number, one["saved_step"]) for number, made in enumerate(seen, 1) for one in made if "saved_step" in one]
    assert saved == [(8, 7), (15, 14), (22, 21), (29, 28), (36, 35)], "each step that was saved restarts the clock"
    reports.loop.job = SimpleNamespace(train=TrainConfig(checkpoint_every_s=3))  # type: ignore[assignment]
    seen = [reports.make_step(0.4) for _ in range(20)]
    saved = [(number, one["saved_step"]) for number, made in enumerate(seen, 41) for one in made if "saved_step" in one]
    assert saved == [(44, 43), (52, 51), (60, 59)]
    reports.loop.step = 999
    reports.make_step(0.4)
    reports.loop.report(wait=True)
    assert reports.reported[-1]["saved_step"] == 1000
    reported = [row["step"] for made in seen for one in made for row in one["rows"]]
    assert reported == sorted(set(reported)), "each row once"


def test_a_checkpoint_by_time_waits_for_the_last_one_and_one_by_steps_makes_the_step_wait(
    reports: Reports, tmp_path: Path
) -> None:
    reports.loop.job = SimpleNamespace(train=TrainConfig(checkpoint_every_s=1, checkpoint_every_steps=5))  # type: ignore[assignment]
    reports.now = 100.0
    assert reports.loop.due_after(3).checkpoint
    reports.loop.writer.start(TrainingCheckpoint({"prompt": torch.zeros(2)}, 3, []))
    assert not reports.loop.due_after(4).checkpoint
    assert reports.loop.due_after(5).checkpoint


def test_from_the_notice_on_every_step_is_saved(reports: Reports) -> None:
    assert reports.make_step(2) == [steps(1)]
    reports.preemption = info("a", 99)
    notice = {"preemption": {"nodes": 1, "deadline_ms": 99}}
    assert reports.make_step(2) == [notice, steps(2)], "saved at once, and reported when it is written"
    assert reports.make_step(0.1) == [{**steps(3), "saved_step": 2}]
    assert reports.make_step(0.1) == [{**steps(4), "saved_step": 3}]
    assert reports.asked == 2, "the notice holds until the workers are started again"


def test_workers_ask_at_the_same_steps_only(reports: Reports) -> None:
    """Asking is a barrier: a worker that asked alone would wait forever."""
    reports.preemption = info("a")
    assert reports.make_step(0.5) == []
    assert reports.asked == 0


@pytest.mark.parametrize(
    ("deadline_ms", "held_s"), [(None, [10.0]), (1_000_000, [10.0]), (1_018_000, [20.0]), (9e6, [40.0]), ("none", [])]
)
def test_the_error_of_a_lost_peer_is_held_back_until_ray_has_seen_its_node_go(
    monkeypatch: pytest.MonkeyPatch, deadline_ms: Any, held_s: list[float]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(worker, "time", SimpleNamespace(time=lambda: 1000.0, sleep=slept.append))
    preemption = None if deadline_ms == "none" else info("a", deadline_ms)
    loop = SimpleNamespace(run=lambda: 1 // 0, preemption=preemption)
    monkeypatch.setattr(worker, "TrainingLoop", lambda: loop)
    with pytest.raises(ZeroDivisionError):
        worker.train_worker({})
    assert slept == held_s


def test_preemptions_are_counted_apart_from_failures_and_watched_for_whether_verbose_or_not() -> None:
    assert ScaleConfig().max_preemptions == -1, "any number"
    switches = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_METRICS_ENABLED"}
    assert not switches & {*QUIET, *BEHAVIOUR}
