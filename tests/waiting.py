"""Waiting for what other processes do. The limit ends a test that hangs; no test measures time."""

import time
from collections.abc import Callable

PATIENCE_S = 900
"""Far more than anything takes on a slow and busy machine, and less than the timeout of a test (pyproject.toml)."""


def wait_until(ready: Callable[[], object], what: str, pause_s: float = 0.02) -> None:
    """Returns as soon as `ready()` is true; fails if that never happens, and says what was waited for."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(pause_s)
