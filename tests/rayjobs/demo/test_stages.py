"""The demo announces its stages: the time that is left, and what came from the cache."""

import logging
from pathlib import Path

import pytest

from rayjobs.demo import stages
from rayjobs.demo.stages import Stage, Stages


class Clock:
    """A clock whose time the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.INFO, "rayjobs")
    clock = Clock()
    monkeypatch.setattr(stages, "time", clock)
    return clock


def run(folder: Path, clock: Clock, seconds: list[float]) -> list[dict]:
    """Run three stages, each of which takes some seconds and leaves a file; return the table's rows."""
    planned = [Stage(f"stage {i}", 10.0 * (i + 1), [folder / str(i)]) for i in range(3)]
    announced = Stages(planned, folder)
    for stage, took in zip(planned, seconds, strict=True):
        with announced.next():
            clock.now += took
            stage.outputs[0].touch()
    return announced.rows()


def test_what_is_left_goes_at_the_pace_of_what_was_made(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    rows = run(tmp_path, clock, [20, 40, 60])  # twice as long as planned
    assert caplog.messages == [
        "1/3  stage 0  (about 60 s left in all)",
        "2/3  stage 1  (about 100 s left in all)",
        "3/3  stage 2  (about 60 s left in all)",
    ]
    assert [(row["seconds"], row["made"]) for row in rows] == [("20", "now"), ("40", "now"), ("60", "now")]


def test_what_is_in_the_cache_is_not_waited_for_and_keeps_its_seconds(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, clock, [20, 40, 60])
    (tmp_path / "1").unlink()
    caplog.clear()
    rows = run(tmp_path, clock, [1, 41, 1])
    assert caplog.messages == [
        "1/3  stage 0  (from the cache, about 20 s left in all)",
        "2/3  stage 1  (about 20 s left in all)",
        "3/3  stage 2  (from the cache)",
    ]
    cached = "before, from the cache"
    assert [(row["seconds"], row["made"]) for row in rows] == [("20", cached), ("41", "now"), ("60", cached)]
