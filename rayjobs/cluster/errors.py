"""Unwrap Ray's exceptions, so that a user sees the error that a worker raised; outlast one that passes."""

import gc
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rayjobs.errors import USER_ERRORS, is_user_error

logger = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS, AGAIN_AFTER_S = 4, 5.0
"""Attempts at work for which Ray could not prepare a node, and the time between two of them."""

RETRY_NOTE = "\nFailed to apply UDF transform"
"""Ray Data appends this note to the message of an error in a pipeline."""


@contextmanager
def reraise_user_errors() -> Iterator[None]:
    """Raise the user error that a Ray task, actor or Train worker has raised in place of Ray's exception around it.

    The error holds no actor of the pipeline that failed: who keeps it, as a notebook does, does not keep their CPUs.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except Exception as error:
        found = _find_user_error(error)
        if found is None:
            raise
        _release_actors(error, handled)
        raise found from None


def call_on_prepared_nodes(call: Callable[[], T]) -> T:
    """Call a function that goes on where it was, again if Ray could not prepare a node for it, a few times at most.

    On a node that has just come up, Ray may unpack a job's files twice at the same time, once for each of two kinds of
    workers, and the one removes what the other has unpacked and is about to use.
    """
    for left in reversed(range(ATTEMPTS)):
        try:
            return call()
        except Exception as error:
            if not left or all(type(cause).__name__ != "RuntimeEnvSetupError" for cause in iterate_causes(error)):
                raise
            logger.warning("Ray could not prepare a node for the workers, which are started again")
            time.sleep(AGAIN_AFTER_S)
    raise AssertionError("the last attempt returns or raises")


def _find_user_error(error: BaseException) -> BaseException | None:
    """Return the user error that an exception of Ray's came from, without Ray's note; None if there is none."""
    for cause in iterate_causes(error):
        if type(cause).__module__.partition(".")[0] != "ray" and is_user_error(cause):
            message, note, _ = str(cause).partition(RETRY_NOTE)
            if note:
                cause.args = (message,)
            return cause
        if type(cause).__name__ == "ActorDiedError" and (parsed := parse_user_error(str(cause))):
            return parsed
    return None


def _release_actors(error: BaseException, handled: BaseException | None) -> None:
    """Let go of a pipeline that has failed, and of its actors: the frames of its error and a cycle refer to them.

    error: Ray's exception. It and those that it came from or follows lose their tracebacks.
    handled: an exception that was being handled when the pipeline began, and stays as it is.
    """
    seen, pending = {id(handled)}, [error]
    while pending:
        current = pending.pop()
        seen.add(id(current))
        current.__traceback__ = None
        linked = (current.__cause__, current.__context__, getattr(current, "cause", None))
        pending += [one for one in linked if isinstance(one, BaseException) and id(one) not in seen]
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("StreamingExecutor"):
            thread.join(timeout=10)
    gc.collect()


def iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all errors that it was raised from, outermost first."""
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


def parse_user_error(traceback: str) -> BaseException | None:
    """Return the user error at the end of a printed traceback; None if it ends with another error.

    Ray keeps an error of an actor's constructor as printed text only, in the message of its ActorDiedError.
    """
    known = {_printed_name(error): error for base in USER_ERRORS for error in _with_subclasses(base)}
    for start in reversed(list(re.finditer(r"^([\w.]+): ", traceback, flags=re.M))):
        if start[1] in known:
            return known[start[1]](traceback[start.end() :].partition(RETRY_NOTE)[0].strip())
    return None


def _printed_name(error: type[BaseException]) -> str:
    return error.__qualname__ if error.__module__ == "builtins" else f"{error.__module__}.{error.__qualname__}"


def _with_subclasses(error: type[BaseException]) -> Iterator[type[BaseException]]:
    yield error
    for subclass in error.__subclasses__():
        yield from _with_subclasses(subclass)
