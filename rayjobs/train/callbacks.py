"""Write each reported step to the run's metrics file and to experiment trackers."""

import json
import math
from contextlib import suppress
from typing import Any

import ray.train

from rayjobs.runs.trackers import TensorBoard, TrackConfig, Tracker, log_all, numbers, open_trackers
from rayjobs.storage.files import read_jsonl, write_jsonl
from rayjobs.storage.sync import SyncedFolder


class MetricsLog(ray.train.UserCallback):
    """Writes rank 0's rows to `metrics.jsonl` and to trackers, from the controller, which sits beside the driver."""

    def __init__(self, grown: SyncedFolder, track: TrackConfig) -> None:
        self.grown, self.track = grown, track
        self.last_step = math.inf
        self.trackers: list[Tracker] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        rows = metrics[0]["rows"]
        if not rows:
            return
        path = self.grown.fetch("metrics.jsonl")
        if rows[0]["step"] <= self.last_step and path.exists():  # resumed: these steps are being done again
            write_jsonl(path, [row for row in read_jsonl(path) if row["step"] < rows[0]["step"]])
        self.last_step = rows[-1]["step"]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if not self.trackers:
            there = open_trackers(self.grown.folder, self.track)
            self.trackers = [TensorBoard(self.grown.local, rows[0]["step"]), *there]
        log_all(self.trackers, [(row["step"], numbers(row)) for row in rows])
        with suppress(OSError):  # it may be back by the next report, and is told of at the end if not
            self.grown.send(now=checkpoint is not None)
