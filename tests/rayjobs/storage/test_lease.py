"""A run folder has one writer. Others are refused while it lives; one that was taken over from writes no more."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from rayjobs.config import config
from rayjobs.errors import LeaseLostError, ResourceError, StorageError
from rayjobs.lifecycle import job
from rayjobs.runs.run_dir import RunConfig, open_run
from rayjobs.storage import lease as leases
from rayjobs.storage.files import read_json, write_json
from rayjobs.storage.lease import EXPIRES_S, check_lease, hold, lost_lease, release
from rayjobs.storage.lease_files import DRIVER_VARIABLE, Holder, LeaseFiles, process_lives
from rayjobs.storage.sync import SyncedFolder
from tests.conftest import ROOT
from tests.rayjobs.storage.conftest import ELSEWHERE, Clock
from tests.waiting import PATIENCE_S, wait_until


def taken_over(folder: Path) -> None:
    """Another machine takes the folder over from whoever holds it."""
    files = LeaseFiles(folder)
    newest = files.newest()
    before = newest.holder.driver
    assert files.create(newest.number + 1, replace(ELSEWHERE, superseded=(before,)))


def test_a_living_driver_of_another_machine_keeps_its_folder(folder: Path, clock: Clock) -> None:
    files = LeaseFiles(folder)
    assert files.create(1, ELSEWHERE)
    began = clock.now

    def beats_after_5_s() -> None:
        if clock.now - began >= 5:
            files.write(1, replace(ELSEWHERE, beat=1))

    clock.meanwhile = beats_after_5_s
    with pytest.raises(ResourceError) as refused:
        hold(folder)
    message = str(refused.value)
    for part in (str(folder), "process 4711 of node-7 since 2026-01-02T03:04:05+00:00", "choose another run.name"):
        assert part in message
    assert clock.now - began == 3 * leases.POLL_S, "refused as soon as it shows that it lives"
    check_lease(folder / "run.json")


@pytest.mark.parametrize("since", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_a_silent_driver_is_taken_over_within_a_minute_whatever_its_clock_says(
    folder: Path, clock: Clock, since: str
) -> None:
    assert LeaseFiles(folder).create(3, replace(ELSEWHERE, since=since))
    hold(folder)
    assert clock.now - 1000 == EXPIRES_S < 60
    newest = LeaseFiles(folder).newest()
    assert (newest.number, newest.holder.pid, newest.holder.superseded) == (4, os.getpid(), ("other",))
    hold(folder)
    assert LeaseFiles(folder).newest().number == 4, "held once"
    release(folder)
    assert LeaseFiles(folder).newest().holder.released
    hold(folder)
    assert LeaseFiles(folder).numbers() == [5], "numbers only grow, and a released folder is not waited for"
    assert clock.now - 1000 == EXPIRES_S


def test_a_driver_that_was_taken_over_from_writes_no_more(folder: Path) -> None:
    hold(folder)
    write_json(folder / "run.json", "ours")
    ours = leases._held[str(folder)]
    ours.beat()
    taken_over(folder)
    with pytest.raises(LeaseLostError, match=r"is now run by process 4711 of node-7 since 2026-.* writes no more"):
        write_json(folder / "run.json", "late")
    with pytest.raises(LeaseLostError):
        write_json(folder / "test" / "result.json", "late")
    with pytest.raises(LeaseLostError):
        SyncedFolder(folder).send(now=True)
    with pytest.raises(LeaseLostError):
        ours.beat()
    assert read_json(folder / "run.json") == "ours"
    assert not (folder / "test" / "result.json").exists()
    assert isinstance(lost_lease(folder), LeaseLostError)
    write_json(folder.with_name("other") / "run.json", "not held")
    release(folder)
    assert LeaseFiles(folder).newest().holder == replace(ELSEWHERE, superseded=(ours.holder.driver,))


def test_workers_write_as_long_as_their_driver_holds_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LeaseFiles(folder)
    files.create(1, replace(ELSEWHERE, driver="first"))
    for driver in ("first", "unrelated"):
        monkeypatch.setenv(DRIVER_VARIABLE, driver)
        write_json(folder / "trials" / "a.json", driver)
    files.create(2, replace(ELSEWHERE, driver="second", superseded=("first",)))
    for driver in ("second", "unrelated"):
        monkeypatch.setenv(DRIVER_VARIABLE, driver)
        write_json(folder / "trials" / "a.json", driver)
    monkeypatch.setenv(DRIVER_VARIABLE, "first")
    with pytest.raises(LeaseLostError):
        write_json(folder / "trials" / "a.json", "first")
    assert read_json(folder / "trials" / "a.json") == "unrelated"


def test_a_failed_look_for_leases_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(files: LeaseFiles) -> list[int]:
        raise StorageError("the bucket does not answer")

    monkeypatch.setenv(DRIVER_VARIABLE, "first")
    write_json(folder / "a.json", "nobody holds the folder")
    LeaseFiles(folder).create(1, replace(ELSEWHERE, superseded=("first",)))
    with monkeypatch.context() as outage:
        outage.setattr(LeaseFiles, "numbers", no_answer)
        check_lease(folder / "a.json")
    with pytest.raises(LeaseLostError):
        write_json(folder / "a.json", "late")


def test_one_of_many_takes_a_number(tmp_path: Path) -> None:
    holders = [replace(ELSEWHERE, pid=pid) for pid in range(16)]
    with ThreadPoolExecutor(len(holders)) as pool:
        won = list(pool.map(lambda holder: LeaseFiles(tmp_path / "r").create(1, holder), holders))
    assert won.count(True) == 1
    assert LeaseFiles(tmp_path / "r").newest().holder.pid == won.index(True)


def test_a_store_refuses_a_number_that_is_taken(folder: Path) -> None:
    files = LeaseFiles(folder)
    assert files.create(1, ELSEWHERE)
    assert not files.create(1, replace(ELSEWHERE, pid=1))
    assert files.newest().holder == ELSEWHERE


def test_a_process_of_this_machine_is_asked_whether_it_lives(tmp_path: Path, clock: Clock) -> None:
    files = LeaseFiles(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:
        its = replace(Holder.here(None), driver="x", pid=other.pid, pid_since=psutil.Process(other.pid).create_time())
        files.create(1, its)
        with pytest.raises(ResourceError, match=f"is being run by process {other.pid} of "):
            hold(tmp_path)
        other.kill()
    hold(tmp_path)
    release(tmp_path)
    assert files.newest().number == 2
    assert clock.now == 1000, "nothing was waited for"


@pytest.mark.parametrize("beats", [True, False])
def test_a_start_at_another_time_is_no_proof_that_a_process_is_gone(tmp_path: Path, clock: Clock, beats: bool) -> None:
    """The system may have used the id again, or the clock may have been set while the process ran."""
    files = LeaseFiles(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:
        its = replace(
            Holder.here(None), driver="x", pid=other.pid, pid_since=psutil.Process(other.pid).create_time() - 9
        )
        files.create(1, its)
        if beats:
            clock.meanwhile = lambda: files.write(1, replace(its, beat=1))
            with pytest.raises(ResourceError, match=f"is being run by process {other.pid} of "):
                hold(tmp_path)
        else:
            hold(tmp_path)
            release(tmp_path)
            assert clock.now - 1000 == EXPIRES_S
        other.kill()


def test_who_lost_a_folder_is_told_no_more_than_is_known(folder: Path) -> None:
    """Its driver may have ended, or have been silent, and the one that took the folder over saw one or the other."""
    hold(folder)
    taken_over(folder)
    with pytest.raises(LeaseLostError, match="the one before had ended, or had shown no sign of itself for 40 s"):
        check_lease(folder / "run.json")


def test_a_process_that_was_killed_and_that_nobody_has_waited_for_is_gone(tmp_path: Path, clock: Clock) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        began = psutil.Process(other.pid).create_time()
        LeaseFiles(tmp_path).create(1, replace(Holder.here(None), driver="x", pid=other.pid, pid_since=began))
        assert process_lives(other.pid, began)
        other.kill()
        wait_until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE, "a zombie")
        assert not process_lives(other.pid, began)
        hold(tmp_path)
        release(tmp_path)
    assert clock.now == 1000, "nothing was waited for"


def test_a_folder_that_is_removed_while_it_is_held_is_not_made_again_by_the_heartbeat(folder: Path) -> None:
    hold(folder)
    ours = leases._held[str(folder)]
    LeaseFiles(folder).remove_below(2)
    ours.beat()
    release(folder)
    assert LeaseFiles(folder).newest() is None


@config
class Config:
    JOB: ClassVar = "test-lease"
    run: RunConfig


@pytest.mark.parametrize("notices", ["its heartbeat", "a write"])
def test_a_job_whose_run_was_taken_over_ends_and_leaves_the_run_to_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, notices: str
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.01 if notices == "its heartbeat" else PATIENCE_S)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    @job
    def run(settings: Config) -> dict:
        folder = open_run(settings.run, settings)
        taken_over(folder)
        if notices == "its heartbeat":
            threading.Event().wait(PATIENCE_S)
        write_json(folder / "result.json", {})
        return {}

    with pytest.raises(LeaseLostError, match="is now run by process 4711 of node-7"):
        run(Config(run=RunConfig(name="r", storage=str(tmp_path))))
    assert read_json(tmp_path / "r" / "run.json")["state"] == "running", "as the other left it"
    assert not (tmp_path / "r" / "result.json").exists()
    assert not (tmp_path / "r" / "report.html").exists()
    assert not lost_lease(tmp_path / "r")


def test_a_job_lets_its_run_go_when_it_ends(tmp_path: Path) -> None:
    @job
    def run(settings: Config) -> dict:
        open_run(settings.run, settings)
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        run(Config(run=RunConfig(name="r", storage=str(tmp_path))))
    assert LeaseFiles(tmp_path / "r").newest().holder.released


DRIVER = """
import sys, time
from rayjobs.storage import lease, lease_files
from rayjobs.storage.files import write_json
from rayjobs.storage.paths import resolve_path
folder = resolve_path(sys.argv[1])
lease_files.this_machine = lease.this_machine = lambda: sys.argv[2]
lease.HEARTBEAT_S, lease.EXPIRES_S, lease.POLL_S = 0.2, 3.0, 0.1
lease.hold(folder)
print("holds", flush=True)
try:
    for number in range(10**6):
        write_json(folder / "run.json", [sys.argv[2], number])
        time.sleep(0.01)
except KeyboardInterrupt:
    raise lease.lost_lease(folder)
"""


@pytest.mark.slow
def test_of_two_processes_one_writes_even_if_the_first_only_slept(folder: Path) -> None:
    def start(machine: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", DRIVER, str(folder), machine], cwd=ROOT, **pipes)

    first = start("a")
    try:
        assert first.stdout.readline() == "holds\n"
        refused = start("b")
        assert "ResourceError" in refused.communicate(timeout=PATIENCE_S)[1]
        os.kill(first.pid, signal.SIGSTOP)
        second = start("b")
        try:
            assert second.stdout.readline() == "holds\n"
            wait_until(lambda: read_json(folder / "run.json")[0] == "b", "the second writes")
            os.kill(first.pid, signal.SIGCONT)
            assert "LeaseLostError" in first.communicate(timeout=PATIENCE_S)[1]
            assert read_json(folder / "run.json")[0] == "b"
            assert second.poll() is None
        finally:
            second.kill()
            second.communicate()
    finally:
        first.kill()
        first.communicate()
