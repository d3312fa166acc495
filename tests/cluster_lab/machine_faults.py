"""Faults of a machine itself: no memory left for a process, a clock that jumps.

Each is made by what Linux offers to root, and is skipped where a machine lacks it. What is made here is removed by the
same function or block.
"""

import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster_lab.cluster import Cluster

CGROUPS = Path("/sys/fs/cgroup")
SOURCE = Path(__file__).with_name("clock_offset.c")


@contextmanager
def no_memory_left() -> Iterator["MemoryLimit"]:
    """A control group that has no memory for its processes: the kernel kills one as soon as it needs a page more."""
    of_version_1 = (CGROUPS / "memory" / "memory.limit_in_bytes").exists()
    parent, limit = CGROUPS, "memory.max"
    if of_version_1:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
        parent, limit = CGROUPS / "memory" / own.lstrip("/"), "memory.limit_in_bytes"
    group = parent / f"rayjobs-lab-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory can be withheld from a process here: {error}")
    if not (group / limit).exists():
        group.rmdir()
        pytest.skip(f"no memory can be withheld from a process here: {group} has no {limit}")
    try:
        (group / limit).write_text("0")
        yield MemoryLimit(group, "memory.oom_control" if of_version_1 else "memory.events")
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        time.sleep(1)  # until the kernel has let go of them
        group.rmdir()


class MemoryLimit:
    """A control group whose processes get no memory."""

    def __init__(self, group: Path, events: str) -> None:
        self.group, self.events = group, group / events

    def add(self, pid: int) -> None:
        (self.group / "cgroup.procs").write_text(str(pid))

    def killed(self) -> int:
        """The number of processes that the kernel has killed for want of memory, once all are gone from the group."""
        if (self.group / "cgroup.procs").read_text().split():
            return 0
        counts = dict(line.split() for line in self.events.read_text().splitlines())
        return int(counts["oom_kill"])


class HostClock:
    """The wall clock of a worker host, as every process of Ray there reads it: Ray is started again with a library."""

    def __init__(self, cluster: Cluster, host: int) -> None:
        self.cluster, self.host, self.file = cluster, host, cluster.shared / f"clock-{host}"
        library = cluster.shared / "clock_offset.so"
        if not library.exists():
            compile_it = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
            try:
                subprocess.run(compile_it, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"a host's clock is set by a library that a C compiler makes: {error}")
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self.file)}

    def __enter__(self) -> "HostClock":
        self.file.write_bytes(bytes(8))
        self.cluster.restart_ray(self.host, self.environment)
        return self

    def set(self, seconds: int) -> None:
        """Sets the clock forward, or back if negative, in all processes at once."""
        with self.file.open("r+b") as file:  # the processes have this very file in their memory
            file.write(struct.pack("q", seconds))

    def now(self) -> float:
        """The time that a process reads there."""
        known = [f"{name}={value}" for name, value in self.environment.items()]
        return float(self.cluster.hosts.run(self.host, "env", *known, "date", "+%s.%N"))

    def __exit__(self, *_: object) -> None:
        self.cluster.restart_ray(self.host, {})
