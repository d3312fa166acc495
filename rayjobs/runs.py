"""What every run records of itself in `run.json`: its job, its state, and when; and the runs of a folder."""

import functools
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import psutil

from rayjobs.tables import read_json, write_json
from rayjobs.tracking import log_result

RECORD = "run.json"
State = Literal["running", "done", "failed", "interrupted", "cut off"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run's record."""

    job: str
    state: State
    started: str
    """UTC, ISO 8601; of the latest start."""
    seconds: float = 0.0
    """Spent in all starts that came to an end."""
    error: str = ""
    """Why it failed, in one line."""
    host: str = ""
    pid: int = 0
    """Of the driver."""

    def now(self) -> "Record":
        """The record as of now: a driver that is gone without a word was cut off."""
        gone = self.host == socket.gethostname() and not psutil.pid_exists(self.pid)
        return replace(self, state="cut off") if self.state == "running" and gone else self


def begin(folder: Path, settings: Any) -> None:
    """Notes that the job that `settings` belongs to runs in `folder`. Raises ValueError if another process of this
    machine is at it."""
    job = type(settings).__module__.rpartition(".")[2].replace("_", "-")
    before = read_record(folder)
    if before and before.state == "running" and before.pid != os.getpid() and _at_work(before):
        raise ValueError(
            f"{folder} is being run by process {before.pid} of {before.host}: let it end, stop it, or choose another "
            "run.name"
        )
    record = Record(
        job=job,
        state="running",
        started=_utc().isoformat(timespec="seconds"),
        seconds=before.seconds if before else 0.0,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    write_json(folder / RECORD, asdict(record))


def recorded(run: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A job's `run` that also notes how it ended, and leaves `report.html` in its folder."""

    @functools.wraps(run)
    def whole(settings: Any) -> dict[str, Any]:
        try:
            result = run(settings)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            _end(settings.run.folder, "interrupted" if interrupted else "failed", "" if interrupted else str(error))
            raise
        if _end(settings.run.folder, "done"):
            log_result(settings.run.folder, settings.run.track, result)
        from rayjobs.report import write_report  # matplotlib is slow to import

        write_report(settings.run.folder)
        return result

    return whole


def read_record(folder: Path) -> Record | None:
    """The record of the run in `folder`, if it is one."""
    path = folder / RECORD
    return Record(**read_json(path)) if path.is_file() else None


def find_runs(storage: Path) -> list[Path]:
    """The folders under `storage` that hold a run, the latest start first; a run may hold runs of its own.

    Raises FileNotFoundError if there is no such folder.
    """
    if not storage.is_dir():
        raise FileNotFoundError(f"{storage} is no folder; give the folder of all runs")
    found = [(record.started, path.parent) for path in storage.rglob(RECORD) if (record := read_record(path.parent))]
    return [folder for _, folder in sorted(found, reverse=True)]


def headline(folder: Path) -> str:
    """The one figure that tells how a run came out; empty as long as there is none."""
    for path in (folder / "test" / "result.json", folder / "result.json"):
        if path.is_file():
            return str(read_json(path).get("headline", ""))
    return ""


def _end(folder: Path, state: State, error: str = "") -> bool:
    """Whether a run had begun: settings that were refused before leave no trace, nor does a run that is shown again."""
    record = read_record(folder)
    begun = record and record.state == "running" and (record.host, record.pid) == (socket.gethostname(), os.getpid())
    if record and begun:
        seconds = (_utc() - datetime.fromisoformat(record.started)).total_seconds()
        told = next(iter(error.splitlines()), "")
        write_json(folder / RECORD, asdict(replace(record, state=state, error=told, seconds=record.seconds + seconds)))
    return bool(begun)


def _at_work(record: Record) -> bool:
    """Whether the driver still runs; a process that began after its run has only got its number."""
    if record.host != socket.gethostname():
        return False  # it cannot be seen from here
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(record.pid).create_time() < datetime.fromisoformat(record.started).timestamp() + 1
    return False


def _utc() -> datetime:
    return datetime.now(timezone.utc)
