"""The demo's stages: announce each with the time that is left, and record how long it took."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rayjobs.demo.cache_dir import cache_folder
from rayjobs.storage.files import read_json, write_json

logger = logging.getLogger(__name__)


class Stage(NamedTuple):
    """A stage of the demo."""

    title: str
    seconds: float
    """about how long it takes on two idle cores"""
    outputs: Sequence[Path]
    """paths that exist when it is done"""

    def done(self) -> bool:
        return all(path.exists() for path in self.outputs)


class Stages:
    """Announces each stage in turn. A stage whose outputs exist is taken from the cache and counts as no time."""

    def __init__(self, stages: Sequence[Stage], cache: Path) -> None:
        self.stages, self.cache = stages, cache
        self.cached = [stage.done() for stage in stages]
        self.durations: list[float] = []

    @contextmanager
    def next(self) -> Iterator[None]:
        """Announce the next stage, which the block runs, and record how long it took."""
        number, started = len(self.durations), time.monotonic()
        stage, left = self.stages[number], self.seconds_left()
        notes = ["from the cache"] if self.cached[number] else []
        notes += [f"about {left:.0f} s left in all"] if left else []
        logger.info("%d/%d  %s  (%s)", number + 1, len(self.stages), stage.title, ", ".join(notes))
        yield
        self.durations.append(time.monotonic() - started)
        if not self.cached[number]:
            write_json(self._record(stage), {"seconds": self.durations[number]})

    def seconds_left(self) -> float:
        """Estimated seconds until the end: the stages' own estimates, scaled by the pace of those that were run."""
        to_run = [(i, stage.seconds) for i, stage in enumerate(self.stages) if not self.cached[i]]
        finished = len(self.durations)
        estimated = sum(seconds for i, seconds in to_run if i < finished)
        measured = sum(self.durations[i] for i, _ in to_run if i < finished)
        pace = measured / estimated if estimated else 1.0
        return sum(seconds for i, seconds in to_run if i >= finished) * pace

    def rows(self) -> list[dict[str, Any]]:
        """A table row for each stage: how long it took when it was run, and whether that was in this run."""
        rows = []
        for stage, cached in zip(self.stages, self.cached, strict=True):
            record = self._record(stage)
            seconds = f"{read_json(record)['seconds']:.0f}" if record.exists() else ""
            made = "before, from the cache" if cached else "now"
            rows.append({"stage": stage.title, "seconds": seconds, "made": made})
        return rows

    def _record(self, stage: Stage) -> Path:
        """The file that holds the stage's duration."""
        return cache_folder(self.cache, "seconds", *map(str, stage.outputs)).with_suffix(".json")
