"""Ray Train's controller and the workers' reports: metrics go to a file and to trackers, events to the driver.

The controller is a process on the driver's node.
"""

import json
import math
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import ray.train
from ray.exceptions import RayActorError

from rayjobs.runs.trackers import TensorBoard, TrackConfig, Tracker, log_all, numbers, open_trackers
from rayjobs.storage.files import read_jsonl, write_jsonl
from rayjobs.storage.lease import check_lease
from rayjobs.storage.sync import SyncedFolder

STARTING, TRAINING = "starting", "training"
"""States of workers that have not reported yet, and those that make steps."""


class MetricsLog(ray.train.UserCallback):
    """Writes the rows that rank 0 reports to `metrics.jsonl` and to trackers.

    Steps that a resumed run makes again replace their earlier rows.
    """

    def __init__(self, synced: SyncedFolder, track: TrackConfig) -> None:
        self.synced, self.track = synced, track
        self.last_step = math.inf
        self.trackers: list[Tracker] = []

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Append the rows that rank 0 reported to metrics.jsonl and send them to the trackers."""
        rows = metrics[0].get("rows")
        if not rows:
            return
        with suppress(OSError):  # an outage, which may pass; an error in this process would end the training
            check_lease(self.synced.folder / "metrics.jsonl")
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


DEATHS = (
    (r"its node (has died|was terminated)|node .* (died|preempted)", "its node is lost"),
    (r"memory pressure|\(OOM\)", "its node ran out of memory"),
    (r"health check has been hanging", "it does not answer"),
    (r"actor (has )?died|actor is dead|worker process has (died|exited)", "its process was ended"),
)
"""Text of Ray's errors about workers, and a phrase for it."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that the driver shows."""

    doing: str = ""
    """The present state of the workers; empty if this is not about it."""
    message: str = ""
    started: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase from the workers' start to their first step, which has been made; else empty."""


class EventLog(ray.train.UserCallback):
    """Appends to a file, which the driver reads, what the workers are doing and what has happened to them.

    A node that is taken away, with or without notice, is counted apart from failures, as Ray Train counts it.
    """

    def __init__(self, path: Path, max_failures: int, max_preemptions: int) -> None:
        """max_failures, max_preemptions: failures and preemptions from which the run recovers, -1 for any number."""
        self.path, self.max_failures, self.max_preemptions = path, max_failures, max_preemptions
        self.failures, self.preemptions, self.saved_step, self.last_step = 0, 0, 0, 0
        self.is_noticed = self.is_down = False

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Note what the workers say that they do now, the steps that they made and the newest checkpoint."""
        report = metrics[0]
        if "resumed_at" in report:
            self._note_resume(report["resumed_at"], report["passed_over"])
        if report.get("rows"):
            self.last_step = report["rows"][-1]["step"]
        self.saved_step = report.get("saved_step", self.saved_step)
        if "preemption" in report:
            self._note_notice(**report["preemption"])
        if "doing" in report or "started" in report:
            self._append(Event(doing=report.get("doing", ""), started=report.get("started", {})))

    def _note_resume(self, step: int, passed_over: list[str]) -> None:
        """Tell the driver of damaged checkpoints, and of the step that the run goes on from if it was told another.

        step: the step of the checkpoint that was loaded. passed_over: a sentence for each damaged checkpoint.
        """
        for message in passed_over:
            self._append(Event(message=message))
        lost = _lost(self.last_step - step)
        if self.is_noticed and not self.is_down:  # Ray ends the workers at the deadline, which is no exception
            self.preemptions += 1
            self._append(Event(message=f"the workers were started again without it; going on from step {step}{lost}"))
        elif step != self.saved_step and (self.failures or self.preemptions or passed_over):
            self._append(Event(message=f"went on from step {step}{lost}"))
        self.saved_step = self.last_step = step
        self.is_noticed = self.is_down = False

    def _note_notice(self, nodes: int, deadline_ms: int | None) -> None:
        """Tell that nodes will be taken away. deadline_ms: milliseconds since 1970; None if it is not known."""
        self.is_noticed = True
        which = "a node will be taken away" if nodes == 1 else f"{nodes} nodes will be taken away"
        left_s = "" if deadline_ms is None else f" in {max(0, round(deadline_ms / 1000 - time.time()))} s"
        self._append(Event(message=f"{which}{left_s}; every step is saved until then"))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Note that workers have died, why, from which step the run goes on and how many steps are lost.

        Ray calls it again and again until the last worker has ended; only the first call counts.
        """
        if self.is_down:
            return
        self.is_down = True
        if any(map(is_preemption, worker_exceptions.values())):
            self.preemptions += 1
            count, limit, most = self.preemptions, "max_preemptions", self.max_preemptions
            reason = "its node was taken away"
        else:
            self.failures += 1
            count, limit, most = self.failures, "max_failures", self.max_failures
            reason = describe_death(str(next(iter(worker_exceptions.values()))))
        who = "a worker" if len(worker_exceptions) == 1 else f"{len(worker_exceptions)} workers"
        message = f"{who} died ({reason})" + (f" after step {self.last_step}" if self.last_step else "")
        if most < 0 or count <= most:
            message += f"; going on from step {self.saved_step}{_lost(self.last_step - self.saved_step)}"
        else:
            message += (
                f", which is more than scale.{limit}={most} allows: the same command goes on from step "
                f"{self.saved_step}, and scale.{limit}=-1 sets no limit"
            )
        self._append(Event(doing=STARTING, message=message))

    def _append(self, event: Event) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")


def _lost(steps: int) -> str:
    return f", {steps} step{'s are' if steps > 1 else ' is'} lost" if steps > 0 else ""


def read_events(path: Path) -> list[Event]:
    """The events that an `EventLog` has written so far."""
    return [Event(**row) for row in read_jsonl(path)] if path.exists() else []


def is_preemption(error: Exception) -> bool:
    """Return whether a worker ended because its node was drained and taken away, as Ray Train decides it."""
    cause = getattr(error, "health_check_failure", error)  # Ray Train wraps what its poll of the worker raised
    return isinstance(cause, RayActorError) and cause.preempted


def describe_death(error: str) -> str:
    """A phrase of why a worker ended, from the text of Ray's error: what became of its process, or what it raised."""
    for pattern, phrase in DEATHS:
        if re.search(pattern, error, re.IGNORECASE):
            return phrase
    raised = re.findall(r"^[\w.]+: .*$", error, re.MULTILINE)  # the ends of tracebacks
    return shorten((raised or error.split("\n"))[-1], 200, placeholder=" …") or "of an unknown cause"
