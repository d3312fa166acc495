"""Hold a folder for one process, local or at a URL: leases with a heartbeat, which every write is checked against.

The lease of a folder is its file `.lease/NUMBER.json` with the highest number. Whoever wants the folder makes the file
of the next number, which all local file systems, S3 and Google's storage let one process do only. The holder rewrites
its file every `HEARTBEAT_S`, with a counter. Another process takes the folder over if the holder has released it, if it
sees on the same machine that the holder is gone, or if by its own clock the file has not changed for `EXPIRES_S`:
clocks of two machines are never compared.

Before each write into the folder, the writer reads who holds it (`check_lease`), and a process that was taken over from
writes no more, whatever had stopped it. The check and the write are two requests. A write whose check was made before
the takeover, and which then takes longer than `EXPIRES_S`, is not prevented.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rayjobs.errors import LeaseLostError, ResourceError
from rayjobs.storage.lease_files import DRIVER_VARIABLE, Entry, Holder, LeaseFiles, driver_id

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
EXPIRES_S = 40.0
POLL_S = 2.0


class Lease:
    """A folder that this process holds: a thread writes its heartbeat until it is released or lost."""

    def __init__(self, folder: Path, number: int, holder: Holder) -> None:
        self.folder, self.files, self.number, self.holder = folder, LeaseFiles(folder), number, holder
        self.lost: LeaseLostError | None = None
        self._ended = threading.Event()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat_until_ended, name=f"lease of {folder}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError if another process holds the folder by now, or a run that it is a part of.

        Raises StorageError if that cannot be read.
        """
        newest = self.files.newest()
        try:
            # None: the folder was removed; what is written makes it again
            if newest and not (newest.number == self.number and _is_same(newest.holder, self.holder)):
                raise LeaseLostError(_describe_loss(self.folder, newest.holder))
            check_lease(self.folder)
        except LeaseLostError as error:
            self.lost = error
            raise

    def beat(self) -> None:
        """Write the heartbeat. Raises LeaseLostError if another process holds the folder by now, and StorageError."""
        self.check()
        if self.files.read(self.number) is not None:
            self.holder = replace(self.holder, beat=self.holder.beat + 1)
            self.files.write(self.number, self.holder)

    def release(self) -> None:
        """Let the folder go, so that the next process need not wait."""
        self._ended.set()
        self._thread.join()
        with suppress(OSError, LeaseLostError):  # then the next process waits
            self.check()
            if self.files.read(self.number) is not None:
                self.files.write(self.number, replace(self.holder, released=True))

    def _beat_until_ended(self) -> None:
        while not self._ended.wait(HEARTBEAT_S) and not self.lost:
            try:
                self.beat()
            except LeaseLostError:
                if self._in_main_thread:
                    # It may wait for hours before it writes something. A signal also ends its waiting for a lock.
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            except OSError as error:
                logger.warning("the lease of %s was not renewed: %s", self.folder, error)


_held: dict[str, Lease] = {}


def hold(folder: Path) -> None:
    """Hold a folder for this process until `release`; nothing happens if it does so already.

    Waits up to `EXPIRES_S` to see whether a holder lives, unless this machine knows it. Raises ResourceError if the
    folder is held by another process, LeaseLostError if the folder is within a run that was taken over from this
    process's driver, StorageError if the lease cannot be read or written.
    """
    lease = _held.get(str(folder))
    if lease is not None and not lease.lost:
        return
    files = LeaseFiles(folder)
    before = files.newest()
    if before is not None:
        before = _wait_until_free(files, before)
    check_lease(folder)
    number, holder = (before.number if before else 0) + 1, Holder.here(before and before.holder)
    if not files.create(number, holder):
        newest = files.newest()
        raise ResourceError(describe_held(folder, newest and newest.holder))
    files.remove_below(number)
    _held[str(folder)] = Lease(folder, number, holder)


def release(folder: Path) -> None:
    """Let a folder go that this process may hold."""
    lease = _held.pop(str(folder), None)
    if lease is not None:
        lease.release()


def lost_lease(folder: Path) -> LeaseLostError | None:
    """Return the error of a folder that this process held and another has taken over; None otherwise."""
    lease = _held.get(str(folder))
    if lease is None:
        return None
    with suppress(LeaseLostError, OSError):
        lease.check()
    return lease.lost


def check_lease(path: Path) -> None:
    """Check, before a file is written, that no other driver has taken over the folder that holds it.

    A path in a folder that nobody holds passes. Raises LeaseLostError, and StorageError if the lease cannot be read.
    """
    for folder in path.parents:
        if lease := _held.get(str(folder)):
            return lease.check()
    if DRIVER_VARIABLE in os.environ:
        for leased, holder in _leases_above(path):
            if driver_id() in holder.superseded:
                raise LeaseLostError(_describe_loss(leased, holder))


_leased: dict[str, tuple[Path, ...]] = {}
"""The folders with leases, among each folder that was asked about and those above it."""


def _find_leased(folder: Path) -> tuple[Path, ...]:
    """Return those with leases of a folder and the ones above it, the nearest first.

    Remembered only if there are some and every folder could be listed: a run is held before what is within it.
    """
    if known := _leased.get(str(folder)):
        return known
    found, could_list_all = [], True
    for one in (folder, *folder.parents):
        try:
            if LeaseFiles(one).numbers():
                found.append(one)
        except OSError:  # a bucket may be closed above the folder
            could_list_all = False
    if found and could_list_all:
        _leased[str(folder)] = tuple(found)
    return tuple(found)


def _leases_above(path: Path) -> Iterator[tuple[Path, Holder]]:
    """Yield the folders with leases that a path is in, and who holds each. Raises StorageError."""
    for leased in _find_leased(path.parent):
        newest = LeaseFiles(leased).newest()
        if newest and newest.holder:
            yield leased, newest.holder


def _wait_until_free(files: LeaseFiles, seen: Entry) -> Entry:
    """Return the newest lease when it is free. Raises ResourceError as soon as its holder is known to live.

    A worker of a driver that has lost the run that the folder is within is given `EXPIRES_S` to notice it: its process
    may live, and its heartbeat ends.
    """
    folder, holder = files.folder.parent, seen.holder
    if holder and holder.is_gone():
        return seen
    ending = {driver for _, outer in _leases_above(folder) for driver in outer.superseded}
    if holder and holder.is_seen() and holder.driver not in ending:
        raise ResourceError(describe_held(folder, holder))
    logger.info("%s is held by %s: seeing for %.0f s whether it lives", folder, holder or "a process", EXPIRES_S)
    last_beat_by = time.monotonic() + EXPIRES_S
    deadline = last_beat_by
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        now = files.newest() or seen
        if now.holder and now.holder.released:
            return now
        if now != seen:
            if not (now.holder and now.holder.driver in ending and time.monotonic() < last_beat_by):
                raise ResourceError(describe_held(folder, now.holder))
            seen, deadline = now, time.monotonic() + EXPIRES_S
    return seen


def describe_held(folder: Path, holder: Holder | str | None) -> str:
    """Return the message that another process runs in `folder`. holder: that process; None if it is not known."""
    return f"{folder} is being run by {holder or 'another process'}: let it end, stop it, or choose another run.name"


def _describe_loss(folder: Path, holder: Holder | None) -> str:
    return (
        f"{folder} is now run by {holder or 'another process'}; the one before had ended, or had shown no sign of "
        f"itself for {EXPIRES_S:.0f} s. This process writes no more there: let the other end, or choose another "
        "run.name"
    )


def _is_same(one: Holder | None, other: Holder) -> bool:
    return one is None or (one.driver, one.machine, one.pid) == (other.driver, other.machine, other.pid)
