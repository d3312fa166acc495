"""Unwrap Ray's exceptions, so that a user sees the error that a worker raised."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rayjobs.errors import USER_ERRORS


@contextmanager
def reraise_user_errors() -> Iterator[None]:
    """Let a user error that was raised in a Ray task through as itself, without Ray's wrapping."""
    try:
        yield
    except Exception as error:
        for cause in iterate_causes(error):
            if type(cause).__module__.partition(".")[0] != "ray" and isinstance(cause, USER_ERRORS):
                message, ray_added, _ = str(cause).partition("\nFailed to apply UDF transform")
                if ray_added:
                    cause.args = (message,)
                raise cause from None
        raise


def iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it was raised from, outermost first."""
    seen: list[BaseException] = []
    pending: list[Any] = [error]
    while pending:
        current = pending.pop(0)
        if not isinstance(current, BaseException) or any(current is one for one in seen):
            continue
        seen.append(current)
        yield current
        failures = getattr(current, "worker_failures", {})
        controller = getattr(current, "controller_failure", None)
        pending += [getattr(current, "cause", None), current.__cause__, controller, *failures.values()]
