"""Join a Ray cluster, or start one on this machine."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil

from rayjobs.cluster import environment as environment_module
from rayjobs.cluster.environment import set_environment, set_local_token, worker_environment, worker_setup
from rayjobs.cluster.ray_workarounds import discard_stderr, end_new_processes, on_loopback_only
from rayjobs.cluster.shared_storage import check_shared_storage
from rayjobs.console import verbose
from rayjobs.errors import ResourceError
from rayjobs.storage.paths import is_url

logger = logging.getLogger(__name__)

_STARTS = 3
"""A node of Ray gives up if its agents need more than 15 s, which happens where others use the processors."""

_TOO_BUSY = (
    f"Ray did not start on this machine in {_STARTS} attempts, as if other programs used all its processors or memory: "
    "end some of them; RAYJOBS_VERBOSE=1 shows what Ray says"
)

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C or SIGTERM has ended."""


def connect(*shared: Path) -> None:
    """Join the cluster that RAY_ADDRESS names, as `ray job submit` sets it, or start one on this machine.

    If this process is connected to a cluster already, that connection is used as it is; its creator has set the
    workers' environment. Ray allows one worker setup hook per job, and refuses a job that was submitted with another.

    shared: folders that nodes share; URLs are skipped. Raises UserError if a node does not see one of the folders.
    """
    set_environment()
    import ray

    if not ray.is_initialized():
        _start_or_join()
    for folder in dict.fromkeys(shared):
        if not is_url(folder):
            check_shared_storage(folder)


def _start_or_join() -> None:
    import ray

    local = "RAY_ADDRESS" not in os.environ
    if local:
        set_local_token()
    # The hook runs before a worker knows the driver's import path, and would import another copy of rayjobs or none.
    ray.cloudpickle.register_pickle_by_value(environment_module)
    try:
        for attempt in range(1, _STARTS + 1):
            before = psutil.Process().children(recursive=True)
            try:
                _init(local=local)
                break
            except Exception as error:  # Ray has no class of its own for it
                if "timed out during startup" not in str(error):
                    raise
                if local:
                    end_new_processes(before)
                if attempt == _STARTS:
                    raise ResourceError(_TOO_BUSY) from error
                logger.warning("Ray took too long to start on this busy machine; it is started again")
    finally:
        ray.cloudpickle.unregister_pickle_by_value(environment_module)
    handle_interrupts()  # ray.init has installed a handler that exits without an exception


def _init(*, local: bool) -> None:
    import ray

    with on_loopback_only() if local else nullcontext(), nullcontext() if verbose() else discard_stderr():
        ray.init(
            address="local" if local else None,
            include_dashboard=False if local else None,
            logging_level="INFO" if verbose() else "ERROR",
            log_to_driver=verbose(),
            runtime_env={"env_vars": worker_environment(), "worker_process_setup_hook": worker_setup()},
        )


def handle_interrupts() -> None:
    """Let Ctrl-C, and SIGTERM, which `ray job stop` sends, raise KeyboardInterrupt once: the run can then be resumed.

    The second one ends the process at once, whatever it is doing by then: writing a report, or shutting Ray down.
    """
    _on_signals(_interrupt)


def end_at_next_interrupt(message: str = "") -> None:
    """Let the next Ctrl-C or SIGTERM end the process at once, with INTERRUPTED and the message on stderr."""

    def end(*_: Any) -> None:
        os.write(2, message.encode())
        os._exit(INTERRUPTED)

    _on_signals(end)


def _interrupt(*_: Any) -> None:
    end_at_next_interrupt("\nrayjobs: interrupted twice; the same command resumes what was interrupted\n")
    raise KeyboardInterrupt


def _on_signals(handler: Callable[..., None]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)
