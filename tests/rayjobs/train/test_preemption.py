"""What the training loop does when a node is announced to be taken away."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train import PreemptionInfo

from rayjobs.cluster.environment import BEHAVIOUR, QUIET
from rayjobs.train.config import ScaleConfig, TrainConfig
from rayjobs.train.metric_rows import MetricRows
from rayjobs.train.worker import TrainingLoop


def info(node: str, deadline_ms: int | None = None) -> PreemptionInfo:
    return PreemptionInfo(deadline_ms=deadline_ms, preempted_node_to_ranks={node: [0]})


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> TrainingLoop:
    """A loop after step 3 of 1,000, whose reports are noted."""
    made = TrainingLoop.__new__(TrainingLoop)
    made.job = SimpleNamespace(train=TrainConfig(checkpoint_every_steps=50), total_steps=1000)  # type: ignore[assignment]
    made.step, made.rows, made.seen_preemption = 3, MetricRows(), None
    made.rows.add({"step": 3})
    made.reports = []  # type: ignore[attr-defined]
    monkeypatch.setattr(ray.train, "report", lambda metrics: made.reports.append("metrics"))  # type: ignore[attr-defined]
    monkeypatch.setattr(made, "report_checkpoint", lambda: made.reports.append("checkpoint"))  # type: ignore[attr-defined]
    return made


def reports(loop: Any, monkeypatch: pytest.MonkeyPatch, preemption: PreemptionInfo | None, *, due: bool) -> list[str]:
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: preemption)
    loop.reports.clear()
    loop.report(due)
    return list(loop.reports)


def test_each_announcement_saves_one_checkpoint(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reports(loop, monkeypatch, None, due=True) == ["metrics"]
    assert reports(loop, monkeypatch, info("a", 99), due=True) == ["checkpoint"]
    assert loop.rows.unreported == []
    assert reports(loop, monkeypatch, info("a", 99), due=True) == ["metrics"], "the same announcement"
    assert reports(loop, monkeypatch, info("b"), due=True) == ["checkpoint"], "another node"


def test_workers_ask_at_the_same_steps_only(loop: TrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking is a barrier: a worker that asked alone would wait forever."""
    assert reports(loop, monkeypatch, info("a"), due=False) == []
    assert loop.seen_preemption is None
    loop.step = 50
    assert reports(loop, monkeypatch, info("a"), due=False) == ["checkpoint"], "the regular one"


def test_preemptions_are_counted_apart_from_failures_and_watched_for_whether_verbose_or_not() -> None:
    assert ScaleConfig().max_preemptions == -1, "any number"
    switches = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_METRICS_ENABLED"}
    assert not switches & {*QUIET, *BEHAVIOUR}
