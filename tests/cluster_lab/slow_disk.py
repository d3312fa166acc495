"""A disk whose writes can be slowed down, made of a file by Linux, as root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")
"""the limit of the machine's topmost control group, version 1, by device: what the kernel writes itself counts too"""


class SlowDisk:
    """A disk of a few MB, for all hosts, that can be made slow. It is mounted before the hosts are made."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder, self.why_not = folder, ""
        folder.mkdir()
        image = folder.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                self.why_not = f"{command[0]}: {done.stderr.strip()}"
                return

    @contextmanager
    def limited_to(self, bytes_per_s: int) -> Iterator[None]:
        """Writes reach the disk at this rate, whoever makes them."""
        if self.why_not or not THROTTLE.exists():
            pytest.skip(self.why_not or f"there is no {THROTTLE} to make a disk slow with")
        found = os.stat(self.folder).st_dev
        device = f"{os.major(found)}:{os.minor(found)}"
        THROTTLE.write_text(f"{device} {bytes_per_s}")
        try:
            yield
        finally:
            THROTTLE.write_text(f"{device} 0")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.folder)], capture_output=True, check=False)
