"""The demo's stages: what comes next, about how long is left, and what each took when it was made."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rayjobs.demo.cache_dir import kept
from rayjobs.storage.files import read_json, write_json


class Stage(NamedTuple):
    """A part of the demo."""

    title: str
    seconds: float
    """that it takes on two idle cores, about"""
    leaves: Sequence[Path]
    """what is there once it has been made"""

    def made(self) -> bool:
        return all(path.exists() for path in self.leaves)


class Stages:
    """Announces each stage in turn. One that was made before is taken from the cache, and takes no time to speak of."""

    def __init__(self, stages: Sequence[Stage], cache: Path) -> None:
        self.stages, self.cache = stages, cache
        self.kept = [stage.made() for stage in stages]
        self.took: list[float] = []

    @contextmanager
    def next(self) -> Iterator[None]:
        """The block makes the next stage."""
        number, began = len(self.took), time.monotonic()
        stage, left = self.stages[number], self.left()
        told = (["from the cache"] if self.kept[number] else []) + ([f"about {left:.0f} s left in all"] if left else [])
        print(f"{number + 1}/{len(self.stages)}  {stage.title}  ({', '.join(told)})", flush=True)
        yield
        self.took.append(time.monotonic() - began)
        if not self.kept[number]:
            write_json(self._record(stage), {"seconds": self.took[number]})

    def left(self) -> float:
        """Seconds until the end, at the pace of what was made so far."""
        to_make = [(i, stage.seconds) for i, stage in enumerate(self.stages) if not self.kept[i]]
        planned = sum(seconds for i, seconds in to_make if i < len(self.took))
        took = sum(self.took[i] for i, _ in to_make if i < len(self.took))
        return sum(seconds for i, seconds in to_make if i >= len(self.took)) * (took / planned if planned else 1.0)

    def seconds(self) -> list[dict[str, Any]]:
        """A row for each stage: what it took when it was made, and when that was."""
        rows = []
        for stage, cached in zip(self.stages, self.kept, strict=True):
            record = self._record(stage)
            took = f"{read_json(record)['seconds']:.0f}" if record.exists() else ""
            rows.append({"stage": stage.title, "seconds": took, "made": "before, from the cache" if cached else "now"})
        return rows

    def _record(self, stage: Stage) -> Path:
        return kept(self.cache, "seconds", *map(str, stage.leaves)).with_suffix(".json")
