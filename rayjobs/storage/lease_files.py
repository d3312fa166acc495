"""The lease files of a folder, and who holds it: what `rayjobs.storage.lease` is made of."""

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from pydantic import TypeAdapter, ValidationError

from adapter.atomic_file import atomic_path
from rayjobs.storage.paths import as_storage_error, is_url, make_folder, read_bytes

LEASES = ".lease"
"""Folder of the lease files, within the folder that is held."""
REMEMBERED = 64
"""Earlier drivers that a lease names."""

DRIVER_VARIABLE = "RAYJOBS_DRIVER"
"""Environment variable by which a worker knows for which driver it works."""

_PROCESS = uuid.uuid4().hex[:16]


def driver_id() -> str:
    """Return a name of this process, or in a worker of its driver, that no other driver has."""
    return os.environ.get(DRIVER_VARIABLE) or _PROCESS


def process_lives(pid: int, since: float = 0.0) -> bool:
    """Return whether a process of this machine still runs. A zombie, which its parent has not waited for, does not.

    since: start of the process, in seconds since 1970; 0 for any, or if it is unknown. The system reuses ids, but not
    with this time.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not since or abs(process.create_time() - since) < 5  # adjusting the clock moves it a little
    except (psutil.NoSuchProcess, ValueError):  # the latter for what is no id
        return False


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a folder: the content of a lease's file."""

    driver: str
    host: str
    machine: str
    """The machine and, in a container, its processes: a process id means the same where this is the same."""
    pid: int
    pid_since: float
    since: str
    """Time at which the folder was taken, by the holder's clock, UTC, ISO 8601."""
    beat: int = 0
    released: bool = False
    superseded: tuple[str, ...] = ()
    """Drivers that held the folder before, the latest first."""

    @classmethod
    def here(cls, before: "Holder | None") -> "Holder":
        """Return this process as the holder after `before`."""
        driver = driver_id()
        earlier = (before.driver, *before.superseded) if before else ()
        return cls(
            driver=driver,
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            pid_since=psutil.Process().create_time(),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            superseded=tuple(one for one in earlier if one != driver)[:REMEMBERED],
        )

    def is_gone(self) -> bool:
        """Return whether the holder has let the folder go, or certainly does not run any more."""
        if self.released or self.driver == driver_id():  # held by another worker of this same driver, which has
            return True  # replaced it by this one
        return self.machine == this_machine() and not process_lives(self.pid)

    def is_seen(self) -> bool:
        """Return whether the holder certainly runs.

        A process of its id that began at another time is no sign either way: the system may have given the id to
        another one, or its clock, which the start is told by, was set.
        """
        return self.machine == this_machine() and process_lives(self.pid, self.pid_since)

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host} since {self.since}"


_HOLDERS = TypeAdapter(Holder)


class Entry(NamedTuple):
    """A lease as it was read."""

    number: int
    content: bytes

    @property
    def holder(self) -> Holder | None:
        """The holder; None if its file is not written yet, or is damaged."""
        try:
            return _HOLDERS.validate_json(self.content)
        except ValidationError:
            return None


class LeaseFiles:
    """The lease files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / LEASES
        self.url: Any = self.folder if is_url(folder) else None

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.json"

    def numbers(self) -> list[int]:
        """Return the numbers of all leases, the highest last. Raises StorageError."""
        try:
            with as_storage_error(self.folder, "listed"):
                if self.url is None:
                    names = os.listdir(self.folder)
                else:
                    names = [str(path).rpartition("/")[2] for path in self.url.fs.ls(self.url.path, detail=False)]
        except OSError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return []
            raise
        stems = [name.partition(".")[0] for name in names if name.endswith(".json")]
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def newest(self) -> Entry | None:
        """Return the lease that counts; None if the folder has never been held. Raises StorageError."""
        for number in reversed(self.numbers()):
            content = self.read(number)
            if content is not None:
                return Entry(number, content)
        return None

    def read(self, number: int) -> bytes | None:
        """Return the content of a lease; None if it was removed. Raises StorageError."""
        path = self.path(number)
        try:
            with as_storage_error(path, "read"):
                return read_bytes(path)
        except OSError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def create(self, number: int, holder: Holder) -> bool:
        """Make the file of this number; return False if another process has made it. Raises StorageError."""
        path, content = self.path(number), _to_bytes(holder)
        with as_storage_error(path, "written"):
            if self.url is None:
                make_folder(self.folder)
                try:
                    with path.open("xb") as file:
                        file.write(content)
                except FileExistsError:
                    return False
                except OSError:  # a full disk; without a holder's name, the file would have to be waited for
                    path.unlink(missing_ok=True)
                    raise
                return True
            try:
                self.url.fs.pipe_file(path.path, content, mode="create")  # type: ignore[attr-defined]
            except Exception:  # a backend has its own error for a file that is there, or none for the condition
                if self.read(number) is None:
                    raise
        # A request that was sent twice is refused because of itself, and a store may not know the condition.
        return self.read(number) == content

    def write(self, number: int, holder: Holder) -> None:
        """Write a lease that this process has made. Raises StorageError."""
        path = self.path(number)
        with as_storage_error(path, "written"):
            if self.url is not None:
                self.url.fs.pipe_file(path.path, _to_bytes(holder))  # type: ignore[attr-defined]
            elif self.folder.is_dir():  # the folder may be removed while it is held
                with atomic_path(path) as temporary:
                    temporary.write_bytes(_to_bytes(holder))

    def remove_below(self, number: int) -> None:
        """Remove the leases of lower numbers, as far as that is possible."""
        with suppress(OSError):
            for older in self.numbers():
                if older < number:
                    self.path(older).unlink(missing_ok=True)


def _to_bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


@lru_cache(maxsize=1)
def this_machine() -> str:
    """Return a name of this machine and of the processes that this one sees, such as those of its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")])
    except OSError:  # not Linux
        return socket.gethostname()
