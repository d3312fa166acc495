"""Starting Ray on a machine that is busy."""

import signal
import subprocess
from contextlib import nullcontext

import pytest
import ray

from rayjobs.cluster import ray_init
from rayjobs.errors import ResourceError

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


def start(monkeypatch: pytest.MonkeyPatch, failures: list[Exception]) -> int:
    """Start Ray where the first attempts fail; return the number of those that were left."""

    def init(**_: object) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray_init, "handle_interrupts", lambda: None)
    ray_init._start_or_join()
    return len(failures)


def test_a_node_that_was_too_slow_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(monkeypatch, [Exception(SLOW), Exception(SLOW)]) == 0
    with pytest.raises(ResourceError, match="did not start on this machine in 3 attempts"):
        start(monkeypatch, [Exception(SLOW)] * 3)


def test_what_a_failed_start_has_left_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    own = subprocess.Popen(["sleep", "1000"])
    left = []

    def init(**_: object) -> None:
        if not left:
            left.append(subprocess.Popen(["sleep", "1000"]))
            raise Exception(SLOW)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_init, "set_local_token", lambda: None)
    monkeypatch.setattr(ray_init, "on_loopback_only", nullcontext)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray_init, "handle_interrupts", lambda: None)
    try:
        ray_init._start_or_join()
        assert left[0].wait() == -signal.SIGKILL
        assert own.poll() is None
    finally:
        own.kill()
        own.wait()


def test_another_failure_to_start_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [ConnectionError("second"), ConnectionError("no such cluster")]
    with pytest.raises(ConnectionError, match="no such cluster"):
        start(monkeypatch, failures)
    assert len(failures) == 1
