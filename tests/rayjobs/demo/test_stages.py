"""What the demo tells of its stages: how much is left, and what came from the cache."""

from pathlib import Path

import pytest

from rayjobs.demo import stages
from rayjobs.demo.stages import Stage, Stages


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stages, "time", clock)
    return clock


def run(folder: Path, clock: Clock, seconds: list[float]) -> list[dict]:
    """Three stages, each of which takes so long and leaves a file."""
    planned = [Stage(f"stage {i}", 10.0 * (i + 1), [folder / str(i)]) for i in range(3)]
    told = Stages(planned, folder)
    for stage, took in zip(planned, seconds, strict=True):
        with told.next():
            clock.now += took
            stage.outputs[0].touch()
    return told.rows()


def test_what_is_left_goes_at_the_pace_of_what_was_made(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, clock, [20, 40, 60])  # twice as long as planned
    assert capsys.readouterr().out.splitlines() == [
        "1/3  stage 0  (about 60 s left in all)",
        "2/3  stage 1  (about 100 s left in all)",
        "3/3  stage 2  (about 60 s left in all)",
    ]
    assert [(row["seconds"], row["made"]) for row in rows] == [("20", "now"), ("40", "now"), ("60", "now")]


def test_what_is_in_the_cache_is_not_waited_for_and_keeps_its_seconds(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, clock, [20, 40, 60])
    (tmp_path / "1").unlink()
    capsys.readouterr()
    rows = run(tmp_path, clock, [1, 41, 1])
    assert capsys.readouterr().out.splitlines() == [
        "1/3  stage 0  (from the cache, about 20 s left in all)",
        "2/3  stage 1  (about 20 s left in all)",
        "3/3  stage 2  (from the cache)",
    ]
    cached = "before, from the cache"
    assert [(row["seconds"], row["made"]) for row in rows] == [("20", cached), ("41", "now"), ("60", cached)]
