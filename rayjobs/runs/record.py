"""What every run records of itself in `run.json`: its job, its state, and when; and the runs of a folder."""

from rayjobs.errors import UserError
import functools
import os
import shlex
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal
import psutil
from pydantic import TypeAdapter, ValidationError
from rayjobs.cluster.hardware import HARDWARE_FILE, describe_hardware
from rayjobs.storage.files import read_json, write_json
from rayjobs.runs.trackers import log_outcome


RECORD_FILE = "run.json"
REPORT_FILE = "report.html"
State = Literal["running", "done", "failed", "interrupted", "cut off"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run's record."""

    job: str
    state: State
    started: str
    """UTC, ISO 8601; of the latest start."""
    seconds: float = 0.0
    """Spent in all starts that came to an end."""
    error: str = ""
    """Why it failed, in one line."""
    command: str = ""
    """The command line, where there was one."""
    host: str = ""
    pid: int = 0
    """Of the driver."""
    pid_since: float = 0.0
    """When that process began, in seconds since 1970: a pid is given again to others."""

    def now(self) -> "RunRecord":
        """The record as of now: a driver that is gone without a word was cut off."""
        gone = self.host == socket.gethostname() and not self._alive()
        return replace(self, state="cut off") if self.state == "running" and gone else self

    def _alive(self) -> bool:
        try:
            began = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return False
        return not self.pid_since or abs(began - self.pid_since) < 5  # a clock that is set moves it a little


_RECORDS = TypeAdapter(RunRecord)


def start_run(folder: Path, settings: Any) -> bool:
    """Notes that the job that `settings` belongs to runs in `folder`. False, and nothing noted, where another job of
    this process is at work there, which this one is then a part of. Raises ValueError if another process of this
    machine is at it."""
    before = read_record(folder)
    if before and _ours(before) and before.job != _job(settings):
        return False
    if before and before.now().state == "running" and before.host == socket.gethostname() and before.pid != os.getpid():
        raise UserError(
            f"{folder} is being run by process {before.pid} of {before.host}: let it end, stop it, or choose another "
            "run.name"
        )
    record = RunRecord(
        job=_job(settings),
        state="running",
        started=_utc().isoformat(timespec="seconds"),
        seconds=before.seconds if before else 0.0,
        command=_command(),
        host=socket.gethostname(),
        pid=os.getpid(),
        pid_since=psutil.Process().create_time(),
    )
    write_json(folder / RECORD_FILE, asdict(record))
    (folder / REPORT_FILE).unlink(missing_ok=True)  # of an earlier start; it would tell another state
    return True


def read_record(folder: Path) -> RunRecord | None:
    """The record of the run in `folder`, if it is one. Raises ValueError for a file that is no record."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        return _RECORDS.validate_python(read_json(path))
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"]))
        raise UserError(f"{path} is no run's record: {field}: {wrong['msg']}".replace(": :", ":")) from error


def find_runs(storage: Path) -> list[Path]:
    """The folders under `storage` that hold a run, the latest start first; a run may hold runs of its own.

    A record that cannot be read is left out, with a word. Raises FileNotFoundError if there is no such folder.
    """
    if not storage.is_dir():
        raise FileNotFoundError(f"{storage} is no folder; give the folder of all runs")
    found = []
    for path in storage.rglob(RECORD_FILE):
        try:
            if record := read_record(path.parent):
                found.append((record.started, path.parent))
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    return [folder for _, folder in sorted(found, reverse=True)]


def headline(folder: Path, record: RunRecord) -> str:
    """The one line that tells how a run came out: its error, or the figure that heads its result, if there is one."""
    if record.error:
        return record.error
    for path in (folder / "test" / "result.json", folder / "result.json"):
        if path.is_file():
            try:
                return str(read_json(path).get("headline", ""))
            except ValueError as error:
                return str(error)
    return ""


def finish_run(settings: Any, state: State, error: str = "") -> bool:
    """Whether a run had begun: settings that were refused before leave no trace, nor does a run that is shown again,
    nor one that is a part of another."""
    folder: Path = settings.run.folder
    record = read_record(folder)
    if record is None or not _ours(record) or record.job != _job(settings):
        return False
    seconds = record.seconds + (_utc() - datetime.fromisoformat(record.started)).total_seconds()
    told = error.splitlines()[0] if state == "failed" else ""
    write_json(folder / RECORD_FILE, asdict(replace(record, state=state, error=told, seconds=seconds)))
    return True


def _ours(record: RunRecord) -> bool:
    """Whether this process is at work on it."""
    return record.now().state == "running" and (record.host, record.pid) == (socket.gethostname(), os.getpid())


def _job(settings: Any) -> str:
    return type(settings).__module__.rpartition(".")[2].replace("_", "-")


def _command() -> str:
    """What was typed, if this process is the command line's."""
    program = Path(sys.argv[0])
    ours = program.name == "rayjobs" or (program.name, program.parent.name) == ("__main__.py", "rayjobs")
    return shlex.join(["python", "-m", "rayjobs", *sys.argv[1:]]) if ours else ""


def _utc() -> datetime:
    return datetime.now(timezone.utc)
