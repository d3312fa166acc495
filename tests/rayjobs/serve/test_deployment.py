"""On a cluster where Ray Serve runs already, nothing is deployed at another address, and others' applications stay."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.routing import Router

from rayjobs.config import load
from rayjobs.errors import ResourceError
from rayjobs.serve import deployment
from rayjobs.serve.deployment import APPLICATION, serving
from rayjobs.serve.guard import Guard
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.settings import LimitsConfig, ServedConfig

OURS = ("127.0.0.1", 8123)
LOCAL = [(b"host", b"127.0.0.1")]


class Cluster:
    """A Ray Serve that notes what it is told to do. If it runs already, it stays at its address."""

    def __init__(self, address: tuple[str | None, int] | None, applications: list[str], fails: bool = False) -> None:
        self.address, self.applications, self.fails = address, applications, fails
        self.done: list[str] = []

    def start(self, http_options: Any, **_: Any) -> None:
        self.address = self.address or (http_options["host"], http_options["port"])

    def status(self) -> Any:
        return SimpleNamespace(applications=dict.fromkeys(self.applications))

    def run(self, *_: Any, name: str, **__: Any) -> None:
        self.done.append(f"run {name}")
        if self.fails:
            raise RuntimeError("no replica")

    def delete(self, name: str) -> None:
        self.done.append(f"delete {name}")

    def shutdown(self) -> None:
        self.done.append("shutdown")


@pytest.fixture
def settings(tiny_base: Path) -> ServedConfig:
    return load(ServedConfig, {"base": {"path": str(tiny_base)}, "server": {"host": OURS[0], "port": OURS[1]}})


def connect(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    from ray import serve

    for name in ("start", "status", "run", "delete", "shutdown"):
        monkeypatch.setattr(serve, name, getattr(cluster, name))
    monkeypatch.setattr(deployment, "serve_address", lambda: cluster.address)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("address", "end"), [(None, "shutdown"), (OURS, f"delete {APPLICATION}")])
def test_only_what_was_started_here_is_ended(
    settings: ServedConfig, monkeypatch: pytest.MonkeyPatch, address: Any, end: str, fails: bool
) -> None:
    cluster = Cluster(address, ["other"] if address else [], fails)
    connect(monkeypatch, cluster)
    if fails:
        with pytest.raises(RuntimeError, match="no replica"), serving(settings, 0.0):
            pass
    else:
        with serving(settings, 0.0):
            assert cluster.done == [f"run {APPLICATION}"]
    assert cluster.done == [f"run {APPLICATION}", end]


@pytest.mark.parametrize(
    ("address", "applications", "said"),
    [
        (("0.0.0.0", 8123), [], r"at 0\.0\.0\.0:8123, not at server\.host=127\.0\.0\.1 server\.port=8123"),
        (("127.0.0.1", 8000), ["other"], r"at 127\.0\.0\.1:8000"),
        ((None, 8123), ["other"], "at None:8123"),
        (OURS, [APPLICATION], "already runs the application"),
    ],
)
def test_a_server_at_another_address_or_of_another_process_is_left_alone(
    settings: ServedConfig, monkeypatch: pytest.MonkeyPatch, address: Any, applications: list[str], said: str
) -> None:
    cluster = Cluster(address, applications)
    connect(monkeypatch, cluster)
    with pytest.raises(ResourceError, match=said), serving(settings, 0.0):
        pass
    assert cluster.done == []


def test_nothing_is_deployed_if_ray_serve_has_ended_meanwhile(
    settings: ServedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(None, [])
    connect(monkeypatch, cluster)
    monkeypatch.setattr(deployment, "serve_address", lambda: None)
    with pytest.raises(ResourceError, match="Ray Serve has ended"), serving(settings, 0.0):
        pass
    assert cluster.done == ["shutdown"]


@pytest.mark.parametrize("address", [("0.0.0.0", 8123), ("127.0.0.1", 8000)])
def test_a_config_file_is_not_deployed_where_ray_serve_listens_elsewhere(
    settings: ServedConfig, monkeypatch: pytest.MonkeyPatch, address: Any
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    (application,) = deployment.serve_config(settings)["applications"]
    connect(monkeypatch, Cluster(OURS, []))
    assert deployment.build_app(application["args"])._bound_deployment.name == "replica"
    connect(monkeypatch, Cluster(address, []))
    with pytest.raises(ResourceError, match=f"at {address[0]}:{address[1]}, not at"):
        deployment.build_app(application["args"])


def test_a_client_that_leaves_within_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    from ray.exceptions import TaskCancelledError

    metrics, sent = Metrics(), list[Any]()
    application = deployment.with_disconnects(Guard(Router(), limits=LimitsConfig(), metrics=metrics))

    async def receive() -> Any:
        raise TaskCancelledError

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(application({"type": "http", "method": "POST", "path": "/", "headers": LOCAL}, receive, send))
    assert (sent, caplog.records) == ([], [])
    assert b'rayjobs_requests_total{route="other",status="left"} 1.0' in metrics.text()
