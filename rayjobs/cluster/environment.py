"""Environment variables that Ray, DeepSpeed and other libraries read. Only this module writes `os.environ`."""

import os
import secrets
from collections.abc import Callable, Mapping

from rayjobs.console import verbose
from rayjobs.storage.lease_files import DRIVER_VARIABLE, driver_id

QUIET = {
    "DS_LOG_LEVEL": "error",  # DeepSpeed logs its whole configuration at level INFO.
    "RAY_AIR_NEW_OUTPUT": "0",  # Ray Tune's status tables would overwrite the progress bar.
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's C++ core logs connections that a lost node closes as errors.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # Ray Data draws a bar for each operator of a pipeline.
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # Ray Data logs each user error with the pipeline's traceback.
    # Ray prints the traceback of every attempt of a task that it tries again, such as a user error in an actor, and a
    # page of advice for each worker that died.
    "RAY_DEDUP_LOGS_SKIP_REGEX": r"failed\. There are infinite retries remaining|^A worker died or was killed while",
    "RAY_SCHEDULER_EVENTS": "0",  # The autoscaler prints its decisions to the driver's terminal.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray Train repeats through its logger what a worker prints.
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # PyTorch's process groups warn about host names and retried connections.
    "TF_CPP_MIN_LOG_LEVEL": "3",  # TensorBoard's libraries announce the CPU features that they use.
    "TQDM_DISABLE": "1",  # Progress bars of libraries would overwrite ours.
}
"""Variables that silence libraries. `--verbose` leaves these out, so nothing here may change how a job runs."""

BEHAVIOUR = {
    # Let threads of OpenMP wait for one another 0.1 ms before they sleep. By default they spin for some milliseconds,
    # also where another process holds the core that the last of them waits for: 4 to 15 times slower.
    "GOMP_SPINCOUNT": "10000",
    # Ask at most 4 s apart whether a worker process or node that does not answer is lost. The pause otherwise grows to
    # 60 s. Ray names these two and the next two in its C++ source only.
    "RAY_core_worker_rpc_server_reconnect_timeout_max_s": "4",
    "RAY_raylet_rpc_server_reconnect_timeout_max_s": "4",
    # Test a silent connection after 15 s and give it up 20 s later. Otherwise a task on a node that lost its power is
    # waited for about seven minutes.
    "RAY_grpc_client_keepalive_time_ms": "15000",
    "RAY_grpc_client_keepalive_timeout_ms": "20000",
    # Wait a minute for Ray Serve's proxy to start. On a busy machine it is not ready in 5 s, and is killed.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Collect the workers' reports every 0.1 s. The default of 2 s delays runs with short steps.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Ask every second whether a node is announced to be taken away. The default is 5 s, of the half minute that some
    # clouds leave.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Try again after 10 s, with fewer workers if the run is elastic, when there is no room for them. Default: 60 s.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # Tokenizers warn about threads in forked processes unless this is set either way. Ray parallelizes over processes.
    "TOKENIZERS_PARALLELISM": "false",
    # Workers whose peer has died end after 3 s instead of waiting 30 s for its process group.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
    # Trials write their own result files; Tune would add a CSV, a JSON and a TensorBoard file for each.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ctrl-C ends the whole job. Tune's own handler would end the current sweep only.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
"""Variables that change how Ray and PyTorch work."""


def environment() -> dict[str, str]:
    """Return the variables for this process and for every worker. Values that are set already are kept."""
    variables = BEHAVIOUR if verbose() else {**BEHAVIOUR, **QUIET}
    return {name: os.environ.get(name, value) for name, value in variables.items()}


def worker_environment() -> dict[str, str]:
    """Return the variables for every worker: `environment()`, and the driver on whose behalf it writes into runs."""
    return {**environment(), DRIVER_VARIABLE: driver_id()}


def set_environment(*, show_library_output: bool = False) -> None:
    """Set the variables of `environment()` in this process. Ray and DeepSpeed read some of them when imported."""
    if show_library_output:
        os.environ["RAYJOBS_VERBOSE"] = "1"
    os.environ.update(environment())


def set_unless_given(variables: Mapping[str, str]) -> None:
    """Set variables that another library reads, those excepted that the process was started with."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def set_auth_mode(mode: str) -> None:
    """Tell Ray whether to send its token ("token" or "disabled"), unless RAY_AUTH_MODE says so already.

    Ray reads the variable when it is imported.
    """
    os.environ["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE") or mode


def set_local_token() -> None:
    """Give a cluster that this process starts a token of its own, which its processes then ask of one another.

    Ray alone would write one into the home folder, for all clusters of the user. What RAY_AUTH_MODE, RAY_AUTH_TOKEN and
    RAY_AUTH_TOKEN_PATH say is kept. Ray reads these variables when a cluster is started.
    """
    if not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def worker_setup() -> Callable[[], None]:
    """Return the function that Ray runs in every worker before anything else.

    It sets what Gloo needs (`set_gloo_interface`), and the variables of the Hugging Face hub as they are in this
    process, such as HF_TOKEN and HF_HUB_OFFLINE, where the worker's node has no value of its own. They do not go into
    Ray's `env_vars`, because Ray writes those into its logs and its dashboard, and HF_TOKEN is a secret.
    """
    of_hub = {name: value for name, value in os.environ.items() if name.startswith("HF_")}

    def set_up_worker() -> None:
        for name, value in of_hub.items():
            os.environ.setdefault(name, value)
        set_gloo_interface()

    return set_up_worker


def set_gloo_interface() -> None:
    """Let Gloo use the network interface of the address by which Ray knows this node.

    By default Gloo takes the address of the machine's name, which on many machines is a loopback address that no other
    machine reaches. A value that is set already is kept.
    """
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
