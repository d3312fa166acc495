"""A run's record: written last when the run ends, and what keeps a second driver out of a run without a lease."""

import subprocess
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from rayjobs import lifecycle
from rayjobs.config import config
from rayjobs.errors import ResourceError, StorageError
from rayjobs.lifecycle import job
from rayjobs.runs.file_digests import changed_files, write_digests
from rayjobs.runs.record import RECORD_FILE, finish_run, leave_run, read_record, start_run
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage.files import read_json, write_json
from rayjobs.storage.lease_files import LeaseFiles
from rayjobs.train.resume_check import lock_run


@config
class Config:
    JOB: ClassVar = "test-record"
    run: RunConfig


@job
def run(settings: Config) -> dict:
    write_json(open_run(settings.run, settings) / "result.json", {"steps": 3})
    return {"steps": 3}


@pytest.mark.parametrize("error", [None, StorageError("the disk is full"), KeyboardInterrupt()])
def test_a_run_is_done_only_once_its_digests_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    states = []

    def digest(folder: Path) -> None:
        states.append(read_record(folder).state)
        if error:
            raise error
        write_digests(folder)

    monkeypatch.setattr(lifecycle, "write_digests", digest)
    settings = Config(run=RunConfig(name="r", storage=str(tmp_path)))
    if error is None:
        run(settings)
        assert read_record(tmp_path / "r").state == "done"
        assert changed_files(tmp_path / "r")[1] == []
    else:
        with pytest.raises(type(error)):
            run(settings)
        assert read_record(tmp_path / "r").state == ("failed" if isinstance(error, StorageError) else "interrupted")
    assert states == ["running"]
    assert LeaseFiles(tmp_path / "r").newest().holder.released


def test_a_driver_of_a_version_without_leases_keeps_its_run(tmp_path: Path) -> None:
    assert start_run(tmp_path, "test-record")
    record = read_json(tmp_path / RECORD_FILE)

    def start(**other: str | int | float) -> bool:
        """Start the job in a folder whose record says something else and which has no lease."""
        finish_run(tmp_path, "test-record", "done")
        leave_run(tmp_path)
        LeaseFiles(tmp_path).remove_below(10**6)
        write_json(tmp_path / RECORD_FILE, {**record, **other})
        return start_run(tmp_path, "test-record")

    with subprocess.Popen(["sleep", "60"]) as other:
        driver = {"pid": other.pid, "pid_since": psutil.Process(other.pid).create_time()}
        assert start(**driver, state="failed")
        assert start(**driver, host="node-7"), "a process id of another machine says nothing here"
        assert start(**{**driver, "pid_since": 1.0}), "the id belongs to another process by now"
        with pytest.raises(ResourceError, match=f"is being run by process {other.pid} of .* choose another run.name"):
            start(**driver)
        with pytest.raises(ResourceError, match=f"is being run by process {other.pid} "):
            lock_run(tmp_path, Config(run=RunConfig(name="r")), {}, ())
        assert LeaseFiles(tmp_path).newest() is None
        other.kill()
    assert start(**driver)
    finish_run(tmp_path, "test-record", "done")
    leave_run(tmp_path)
