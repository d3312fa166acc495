"""The environment of the driver and its workers."""

import ast
import os
import subprocess
import sys

import pytest
import ray

from rayjobs.cluster import environment as environment_module
from rayjobs.cluster.environment import BEHAVIOUR, QUIET, environment, set_auth_mode, worker_setup
from tests.conftest import ROOT
from tests.waiting import PATIENCE_S


def test_one_module_writes_environment_variables() -> None:
    writers = set()
    for file in (ROOT / "rayjobs").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                writers |= {file.name} if ast.unparse(node.value) == "os.environ" else set()
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "os.environ.update", "os.environ.setdefault", "os.environ.pop", "os.putenv",
            ):  # fmt: skip
                writers.add(file.name)
    assert writers == {"environment.py"}


def test_verbose_shows_more_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*QUIET, *BEHAVIOUR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAYJOBS_VERBOSE", "1")
    assert environment() == BEHAVIOUR
    monkeypatch.delenv("RAYJOBS_VERBOSE")
    assert environment() == {**BEHAVIOUR, **QUIET}
    monkeypatch.setenv("TQDM_DISABLE", "0")
    assert environment()["TQDM_DISABLE"] == "0", "what is set already is kept"


def test_an_auth_mode_that_is_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    set_auth_mode("token")
    set_auth_mode("disabled")
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_worker_gets_the_hubs_variables_that_its_node_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"HF_TOKEN": "of the driver", "HF_HOME": "/driver", "OTHER": "1"})
    set_up = worker_setup()
    monkeypatch.setattr("os.environ", {"HF_HOME": "/node"})
    monkeypatch.setattr(environment_module, "set_gloo_interface", lambda: None)
    set_up()
    assert os.environ == {"HF_TOKEN": "of the driver", "HF_HOME": "/node"}
    assert "HF_TOKEN" not in environment()


JOIN = """
import os, sys
from pathlib import Path

os.environ |= {"HF_HOME": "/node", "RAY_AUTH_MODE": "disabled"}

from ray.cluster_utils import Cluster

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
os.environ |= {"RAY_ADDRESS": nodes.address, "HF_HOME": "/driver", "HF_TOKEN": "hf_a_secret"}

import ray
from rayjobs.cluster.ray_init import connect

connect()
print(ray.get([ray.remote(os.getenv).remote(name) for name in ("HF_TOKEN", "HF_HOME")]))
logs = Path(ray._private.worker.global_worker.node.get_session_dir_path(), "logs")
print([file.name for file in logs.rglob("*") if file.is_file() and b"hf_a_secret" in file.read_bytes()])
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_the_hubs_token_reaches_the_workers_of_a_cluster_and_no_log() -> None:
    done = subprocess.run([sys.executable, "-c", JOIN], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.splitlines() == ["['hf_a_secret', '/node']", "[]"], done.stderr[-2000:]


def has_rayjobs() -> bool:
    return "rayjobs" in sys.modules


@pytest.mark.ray
def test_a_new_worker_has_not_imported_rayjobs(cluster: None) -> None:
    """It does not know the driver's import path yet, and would import another copy, if there is one."""
    this = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this)
    try:
        new_worker = ray.remote(has_rayjobs).options(num_cpus=0, runtime_env={"env_vars": {"NEW": "1"}})
        assert not ray.get(new_worker.remote())
    finally:
        ray.cloudpickle.unregister_pickle_by_value(this)


@pytest.mark.ray
def test_gloo_uses_rays_network_in_every_worker_with_variables_of_its_own_or_not(cluster: None) -> None:
    import psutil

    read = ray.remote(os.getenv)
    with_variables = read.options(runtime_env={"env_vars": {"A": "1"}})
    interfaces = ray.get([read.remote("GLOO_SOCKET_IFNAME"), with_variables.remote("GLOO_SOCKET_IFNAME")])
    assert interfaces[0] == interfaces[1]
    addresses = {address.address for address in psutil.net_if_addrs()[interfaces[0]]}
    assert ray.util.get_node_ip_address() in addresses


@pytest.mark.ray
def test_threads_of_every_worker_sleep_soon_while_they_wait(cluster: None) -> None:
    read = ray.remote(os.getenv)
    with_variables = read.options(runtime_env={"env_vars": {"A": "1"}})
    assert ray.get([read.remote("GOMP_SPINCOUNT"), with_variables.remote("GOMP_SPINCOUNT")]) == ["10000", "10000"]
