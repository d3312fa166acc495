"""Ray started or joined, quietly; run folders; progress; errors in the words of whoever raised them."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rayjobs.cluster.shared_storage import check_every_node_sees
from rayjobs.console import verbose
from rayjobs.storage.paths import is_url

QUIET = {
    "DS_LOG_LEVEL": "error",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TQDM_DISABLE": "1",
}
"""What keeps libraries from writing over the progress display."""

BEHAVIOUR = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_core_worker_rpc_server_reconnect_timeout_max_s": "4",
    "RAY_grpc_client_keepalive_time_ms": "15000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    "RAY_raylet_rpc_server_reconnect_timeout_max_s": "4",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
}
"""Reports are polled often, so that they do not hold up short steps; workers that find no place are asked for again,
perhaps fewer of them; the workers that one of them has left alone are ended rather than asked to part in good order;
where a process does not answer, it is asked every 4 s, and not every minute, whether its machine is lost; who waits for
a task's answer makes sure of the connection after 15 s, and gives it up after another 20, not after seven minutes."""


def environment() -> dict[str, str]:
    """Environment variables for this process and every worker; what is set already stays."""
    wanted = BEHAVIOUR if verbose() else {**BEHAVIOUR, **QUIET}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def connect(*shared: Path) -> None:
    """Joins the cluster that RAY_ADDRESS names (as `ray job submit` sets it), or starts one on this machine.

    A cluster that this process is connected to already is used as it is.

    shared: folders that its nodes write to, and read. Raises ValueError if one of them does not see one.
    """
    os.environ.update(environment())  # some of it is read when Ray's libraries are imported
    import ray

    if not ray.is_initialized():
        _join()
    for folder in dict.fromkeys(shared):
        if not is_url(folder):
            check_every_node_sees(folder)


def _join() -> None:
    import ray

    local = "RAY_ADDRESS" not in os.environ
    if local:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with nullcontext() if verbose() else _without_stderr():
        ray.init(
            address="local" if local else None,
            include_dashboard=False if local else None,
            logging_level="INFO" if verbose() else "ERROR",
            log_to_driver=verbose(),
            runtime_env={"env_vars": environment()},
        )
    interrupt_on_sigterm()  # Ray has made it an exit of its own


def interrupt_on_sigterm() -> None:
    """Lets SIGTERM, which `ray job stop` sends, end this process as Ctrl-C does: a run that is left can be resumed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's core announces its log level on the file descriptor itself, before it takes notice of that level."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
