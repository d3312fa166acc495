"""Workarounds that rely on internals of Ray 2.60 outside Ray Train, because Ray has no public way.

tests/rayjobs/cluster/test_ray_workarounds.py fails when a workaround can go.
"""

import asyncio
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rayjobs.storage.yaml_file import parse_yaml

HEAD_RESOURCE = "node:__internal_head__"
"""The resource that only the head node has. Ray has no public way to tell which node is the head."""

KUBERNETES_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""The file in which Kubernetes names the namespace of a pod."""

_UPLOAD_FOLDER = re.compile(r'/[^"]*/working_dir_files/_ray_pkg_[0-9a-f]+/')


def remove_upload_folder(text: str) -> str:
    """Make paths in JSON relative that lie in a submitted job's working directory.

    Ray unpacks it to a different path for each upload, and has no public way to tell that path from others.
    """
    return _UPLOAD_FOLDER.sub("", text)


@contextmanager
def discard_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2: Ray's C++ core writes a line before it has read its log level."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def end_new_processes(before: Collection[psutil.Process]) -> None:
    """End this process's children that were not there before.

    A start of Ray that has timed out leaves all that it has started, which Ray has no public way to end.
    """
    for process in psutil.Process().children(recursive=True):
        if process not in before:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def resources_of_lost_nodes() -> dict[str, dict[str, float]]:
    """Return {address: resources} of the nodes that the connected cluster has lost, of those on one address the last.

    `ray.nodes()` lists such nodes without their resources, which Ray's control store still has.
    """
    from ray._private.worker import global_worker

    nodes = sorted(global_worker.gcs_client.get_all_node_info().values(), key=lambda node: node.start_time_ms)
    return {node.node_manager_address: dict(node.resources_total) for node in nodes if node.state}


def find_autoscaler_config(gcs_address: str) -> dict[str, Any] | None:
    """Return the cluster file that the autoscaler of this cluster was started with; None if none runs on this machine.

    `ray up` starts the autoscaler on the head node. Ray has no public way to ask it for its limits, so that the file is
    found through the command line of the autoscaler's process.
    """
    for process in psutil.process_iter(["cmdline"]):
        arguments = dict(part.partition("=")[::2] for part in process.info["cmdline"] or [])
        if arguments.get("--gcs-address") == gcs_address and "--autoscaling-config" in arguments:
            return parse_yaml(Path(arguments["--autoscaling-config"]).expanduser().read_text())
    return None


def find_kuberay_config() -> dict[str, Any] | None:
    """Return the limits of a KubeRay cluster in the form of a cluster file; None if this process cannot see them.

    They are in the cluster's RayCluster object, which the pod of the head may read if its autoscaler is enabled. Ray's
    autoscaler reads it in the same way, and Ray has no public way to ask for the limits.
    """
    name = os.environ.get("RAY_CLUSTER_NAME")
    if not name or not autoscaled_by_kubernetes():
        return None
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        namespace = KUBERNETES_NAMESPACE.read_text().strip()
        return _derive_autoscaling_config_from_ray_cr(KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}"))
    except OSError:  # the pod's account may not read it, or the API does not answer
        return None


def serve_address() -> tuple[str | None, int] | None:
    """Return the host and port of Ray Serve's proxies on the connected cluster; None if Ray Serve does not run there.

    The host is None if it has no proxies. Ray Serve ignores the address that it is asked to start at when it runs
    already, and has no public way to tell at which it runs.
    """
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else (client.http_config.host, client.http_config.port)


async def broadcast(handle: Any, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """Call a method on every running replica of a deployment of Ray Serve. handle: the deployment's.

    Returns what each replica returned or raised, with a TimeoutError for each that did not answer in time. Ray Serve's
    own `results_async` gives no answer at all if one is missing.

    Raises asyncio.TimeoutError if Ray Serve does not tell in time which replicas there are, and
    DeploymentUnavailableError if there are none.
    """
    end = time.monotonic() + timeout_s
    calls = await asyncio.wait_for(handle.broadcast(method, *arguments)._fetch_replica_results_async(), timeout_s)
    left = max(0.0, end - time.monotonic())
    answers = (asyncio.wait_for(call.get_async(), left) for call in calls)
    return await asyncio.gather(*answers, return_exceptions=True)


@contextmanager
def on_loopback_only() -> Iterator[None]:
    """Let a cluster that is started in this block listen on 127.0.0.1 only, as Ray does on Windows and macOS.

    On Linux, Ray takes the address of this machine even if it is told to use 127.0.0.1.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def autoscaled_by_kubernetes() -> bool:
    """Return whether KubeRay's operator starts this cluster's nodes, so that Ray does not know how many may come."""
    return "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")
