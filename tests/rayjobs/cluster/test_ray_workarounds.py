"""Each test here fails when Ray has made a workaround of rayjobs/cluster/ray_workarounds.py unnecessary."""

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import ray
import ray.autoscaler.sdk
from ray._private.runtime_env.packaging import get_uri_for_directory
from ray._private.runtime_env.working_dir import WorkingDirPlugin

from rayjobs.cluster.environment import BEHAVIOUR, QUIET
from rayjobs.cluster.ray_workarounds import HEAD_RESOURCE, broadcast, remove_upload_folder
from tests.conftest import ROOT

START = "import ray; ray.init(address='local', include_dashboard=False, logging_level='ERROR', log_to_driver=False)"


@pytest.mark.ray
def test_ray_s_core_still_writes_to_stderr_before_it_has_read_its_log_level() -> None:
    """Otherwise `discard_stderr` can go."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**environment, **BEHAVIOUR, **QUIET, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr


def test_ray_serve_s_status_still_does_not_tell_its_address() -> None:
    """Otherwise `serve_address` can go."""
    from ray.serve.schema import ServeStatus

    assert set(ServeStatus.__dataclass_fields__) == {"proxies", "applications", "target_capacity"}


def test_ray_serve_still_gives_no_answers_of_a_broadcast_if_one_is_missing() -> None:
    """Otherwise `broadcast` can go."""
    from ray.serve.handle import DeploymentBroadcastResponse

    assert set(inspect.signature(DeploymentBroadcastResponse.results_async).parameters) == {
        "self", "timeout_s", "return_exceptions",
    }  # fmt: skip


def test_a_broadcast_returns_what_came_in_time() -> None:
    class Call:
        def __init__(self, answer: Any) -> None:
            self.answer = answer

        async def get_async(self) -> Any:
            if isinstance(self.answer, BaseException):
                raise self.answer
            if self.answer == "nothing":
                await asyncio.Event().wait()
            return self.answer

    class Handle:
        def broadcast(self, *arguments: Any) -> Any:
            return self

        async def _fetch_replica_results_async(self) -> list[Call]:
            return [Call("one"), Call("nothing"), Call(KeyError("gone"))]

    one, silent, error = asyncio.run(broadcast(Handle(), "method", timeout_s=0.05))
    assert one == "one"
    assert isinstance(silent, asyncio.TimeoutError)
    assert isinstance(error, KeyError)


@pytest.mark.ray
def test_one_node_has_the_head_s_resource(cluster: None) -> None:
    """If this fails, Ray has renamed it; `HEAD_RESOURCE` must follow."""
    assert sum(HEAD_RESOURCE in node["Resources"] for node in ray.nodes()) == 1


def test_a_working_directory_is_still_unpacked_under_the_hash_of_its_upload(tmp_path: Path) -> None:
    """If this fails, Ray has renamed the folder, which `remove_upload_folder` must follow, or keeps one path for all
    uploads, and it can go."""
    (tmp_path / "a.py").write_text("1")
    name = urlsplit(get_uri_for_directory(str(tmp_path), include_gitignore=False)).netloc.removesuffix(".zip")
    folder = WorkingDirPlugin(str(tmp_path / "session"), None)._resources_dir
    assert remove_upload_folder(f'["{folder}/{name}/data/a.json"]') == '["data/a.json"]'


def test_the_autoscaler_still_has_no_public_way_to_ask_for_its_limits() -> None:
    """Otherwise `find_autoscaler_config` can go."""
    names = {name for name in dir(ray.autoscaler.sdk) if not name.startswith("_")}
    assert names == {
        "bootstrap_config", "configure_logging", "create_or_update_cluster", "fillout_defaults",
        "get_docker_host_mount_location", "get_head_node_ip", "get_worker_node_ips", "register_callback_handler",
        "request_resources", "rsync", "run_on_cluster", "sdk", "teardown_cluster",
    }  # fmt: skip


LOST_NODE = """
import ray
from ray.cluster_utils import Cluster

from rayjobs.cluster.ray_workarounds import resources_of_lost_nodes
from tests.waiting import wait_until

machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
worker = machines.add_node(num_cpus=2)
ray.init(address=machines.address, log_to_driver=False)
print(resources_of_lost_nodes())
machines.remove_node(worker)
wait_until(lambda: [node["Alive"] for node in ray.nodes()].count(True) == 1, "the loss of the node")
print([resources["CPU"] for resources in resources_of_lost_nodes().values()])
print(*(node["Resources"] for node in ray.nodes() if not node["Alive"]))
"""


@pytest.mark.ray
def test_ray_still_shows_no_resources_of_a_lost_node() -> None:
    """Otherwise `resources_of_lost_nodes` can go."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    code = [sys.executable, "-c", LOST_NODE]
    done = subprocess.run(code, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.splitlines() == ["{}", "[2.0]", "{}"], done.stderr[-3000:]
