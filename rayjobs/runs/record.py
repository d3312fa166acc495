"""The record `run.json` of every run: its job, its state, and when it ran; and the list of a folder's runs."""

import logging
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import TypeAdapter

from rayjobs.console import printable
from rayjobs.errors import ResourceError
from rayjobs.storage.credentials import mask_credentials
from rayjobs.storage.files import read_json, read_typed, write_json
from rayjobs.storage.lease import describe_held, hold, release
from rayjobs.storage.lease_files import LeaseFiles, process_lives

logger = logging.getLogger(__name__)

RECORD_FILE = "run.json"
REPORT_FILE = "report.html"
RESULT_FILE = "result.json"
State = Literal["running", "done", "failed", "interrupted", "cut off"]

_jobs_here: dict[str, str] = {}
"""The job that this process is running in each run folder."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run's record."""

    job: str
    state: State
    started: str
    """Time of the latest start, UTC, ISO 8601."""
    seconds: float = 0.0
    """Time spent in all starts that came to an end."""
    error: str = ""
    """First line of the error that ended the run."""
    command: str = ""
    """The command line; empty for a run that was not started from one."""
    host: str = ""
    pid: int = 0
    """Process id of the driver."""
    pid_since: float = 0.0
    """Start of the driver's process, in seconds since 1970. The system reuses process ids, but not with this time."""

    def now(self) -> "RunRecord":
        """The record with its present state: `cut off` if the driver ended without recording an end."""
        gone = self.host == socket.gethostname() and not process_lives(self.pid, self.pid_since)
        return replace(self, state="cut off") if self.state == "running" and gone else self


_RECORDS = TypeAdapter(RunRecord)


def hold_run(folder: Path) -> None:
    """Hold the folder of a run for this process. Raises what `hold` raises.

    Versions without leases held nothing: where there is no lease, the record says whether a process of this machine is
    running there.
    """
    record = read_record(folder)
    is_others = record is not None and record.host == socket.gethostname() and record.pid != os.getpid()
    if record and is_others and record.now().state == "running" and LeaseFiles(folder).newest() is None:
        holder = f"process {record.pid} of {record.host} since {record.started}"
        raise ResourceError(describe_held(folder, holder))
    hold(folder)


def start_run(folder: Path, job: str) -> bool:
    """Hold `folder` for this process, and write the record of a job that begins to run there.

    Returns False and writes nothing if this process is running another job there: the new one is then a part of its
    run. Raises ResourceError if another process is running there, on whatever machine.
    """
    if _jobs_here.get(str(folder), job) != job:
        return False
    hold_run(folder)
    before = read_record(folder)
    record = RunRecord(
        job=job,
        state="running",
        started=_utc().isoformat(timespec="seconds"),
        seconds=before.seconds if before else 0.0,
        command=_command(),
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_since=psutil.Process().create_time(),
    )
    write_json(folder / RECORD_FILE, asdict(record))
    (folder / REPORT_FILE).unlink(missing_ok=True)  # it shows the state of an earlier start
    _jobs_here[str(folder)] = job
    return True


def is_running_here(folder: Path, job: str) -> bool:
    """Return whether this process has started the job in `folder`, as a run of its own, and has not finished it."""
    return _jobs_here.get(str(folder)) == job


def finish_run(folder: Path, job: str, state: State, error: str = "") -> bool:
    """Record how a job's run ended.

    Returns False and writes nothing if this process did not start the job in `folder`: its settings were refused, its
    finished result was only shown again, or it was a part of another job's run.
    """
    if not is_running_here(folder, job):
        return False
    del _jobs_here[str(folder)]
    record = read_record(folder)
    if record is None:  # the folder was removed in the meantime
        return False
    seconds = record.seconds + (_utc() - datetime.fromisoformat(record.started)).total_seconds()
    first_line = printable(error).strip().partition("\n")[0] if state == "failed" else ""
    write_json(folder / RECORD_FILE, asdict(replace(record, state=state, error=first_line, seconds=seconds)))
    return True


def leave_run(folder: Path) -> None:
    """Let `folder` go for other processes, unless this process still runs a job there, of which another was a part."""
    if str(folder) not in _jobs_here:
        release(folder)


def forget_run(folder: Path) -> None:
    """End this process's part in a run that another has taken over: its record is the other's by now."""
    _jobs_here.pop(str(folder), None)
    release(folder)


def read_record(folder: Path) -> RunRecord | None:
    """The record of the run in `folder`, or None if there is none. Raises DataError for a file that is no record."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    return read_typed(path, _RECORDS, "the record of a run")


def find_runs(storage: Path) -> list[Path]:
    """The folders under `storage` that hold a run, the latest start first; a run may hold runs of its own.

    A record that cannot be read is left out with a warning. Raises FileNotFoundError if there is no such folder.
    """
    if not storage.is_dir():
        raise FileNotFoundError(f"{storage} is not a folder; give the folder that holds all runs")
    started: list[tuple[str, Path]] = []
    for path in storage.rglob(RECORD_FILE):
        try:
            record = read_record(path.parent)
        except ValueError as error:
            logger.warning("left out: %s", error)
            continue
        if record:
            started.append((record.started, path.parent))
    return [folder for _, folder in sorted(started, reverse=True)]


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a job's result into its run folder, with the credentials of URLs masked."""
    write_json(folder / RESULT_FILE, mask_credentials(result))


def headline(folder: Path, record: RunRecord) -> str:
    """The outcome of a run in one printable line: its error, or the headline of its result if there is one."""
    return " ".join(printable(record.error or _result_headline(folder)).split())


def _result_headline(folder: Path) -> str:
    for path in (folder / "test" / RESULT_FILE, folder / RESULT_FILE):
        if path.is_file():
            try:
                result = read_json(path)
                return str(result.get("headline", "")) if isinstance(result, dict) else f"{path} is no result"
            except ValueError as error:
                return str(error)
    return ""


def _command() -> str:
    """The command line without credentials, if this process was started from it; empty in a notebook or a test."""
    program = Path(sys.argv[0])
    from_cli = program.name == "rayjobs" or (program.name, program.parent.name) == ("__main__.py", "rayjobs")
    return mask_credentials(shlex.join(["python", "-m", "rayjobs", *sys.argv[1:]])) if from_cli else ""


def _utc() -> datetime:
    return datetime.now(timezone.utc)
