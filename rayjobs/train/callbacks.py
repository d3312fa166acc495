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
    """Writes the rows that rank 0 reports to `metrics.jsonl` and to trackers.

    It runs in Ray Train's controller, a process on the driver's node. Steps that a resumed run makes again replace
    their earlier rows.
    """

    def __init__(self, synced: SyncedFolder, track: TrackConfig) -> None:
        self.synced, self.track = synced, track
        self.last_step = math.inf
        self.trackers: list[Tracker] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Append the rows that rank 0 reported to metrics.jsonl and send them to the trackers."""
        rows = metrics[0]["rows"]
        if not rows:
            return
        path = self.synced.fetch("metrics.jsonl")
        first_step = rows[0]["step"]
        if first_step <= self.last_step and path.exists():  # the run has resumed from an earlier step
            write_jsonl(path, [row for row in read_jsonl(path) if row["step"] < first_step])
        self.last_step = rows[-1]["step"]
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if not self.trackers:
            opened = open_trackers(self.synced.folder, self.track)
            self.trackers = [TensorBoard(self.synced.local, first_step), *opened]
        log_all(self.trackers, [(row["step"], numbers(row)) for row in rows])
        with suppress(OSError):  # the next report sends it again; an error at the end of the run is raised
            self.synced.send(now=checkpoint is not None)
