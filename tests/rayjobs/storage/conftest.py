"""A run folder, a process of another machine that holds it, and a clock, for the tests of leases."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rayjobs.storage import lease as leases
from rayjobs.storage.lease import release
from rayjobs.storage.lease_files import Holder
from rayjobs.storage.paths import resolve_path

ELSEWHERE = Holder(
    driver="other", host="node-7", machine="node-7", pid=4711, pid_since=0.0, since="2026-01-02T03:04:05+00:00"
)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A run folder, which nobody holds in the end."""
    root = str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    path = resolve_path(root) / "r"
    yield path
    release(path)


class Clock:
    """A clock that goes on only while somebody sleeps; `meanwhile` is what other machines do in each pause."""

    def __init__(self) -> None:
        self.now, self.meanwhile = 1000.0, (lambda: None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))
    return clock
