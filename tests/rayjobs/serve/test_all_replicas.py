"""Replicas that load, unload and count together, with a stand-in for Ray Serve's calls between them."""

import asyncio
import itertools
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from adapter import AdaptedModel
from adapter.engine.adapters import AdapterStore
from rayjobs.serve import adapter_folder, replicas
from rayjobs.serve.adapter_folder import AdapterFolder, Change
from rayjobs.serve.api_errors import ApiError
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.replicas import AllReplicas, OneReplica
from tests.rayjobs.serve.serving import write_adapter

GONE: Any = ActorDiedError()
AWAY: Any = ActorUnavailableError("away", b"0" * 16)
OLD: Any = RuntimeError("Tried to call a method 'call_alone' that does not exist.")


class Deployment:
    """The replicas that run, by id, and those of them that Ray Serve has announced, with what they answer instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: AdaptedModel) -> None:
        self.alone: dict[str, OneReplica] = {}
        self.announced: dict[str, BaseException | None] = {}
        self.unavailable: BaseException | None = None
        self.running: int | None = None
        self.release = asyncio.Event()
        self._monkeypatch, self._model = monkeypatch, model
        monkeypatch.setattr(replicas, "broadcast", self.broadcast)
        monkeypatch.setattr(adapter_folder, "LOOK_S", 0)
        monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *_: None)
        monkeypatch.setattr("ray.serve.status", self.status)
        self.release.set()

    def start(self, name: str, folder: Path) -> AllReplicas:
        """A replica that runs, and is not announced."""
        context = SimpleNamespace(replica_tag=name, app_name="app", deployment="replica")
        self._monkeypatch.setattr("ray.serve.get_replica_context", lambda: context)
        model = self._model
        found = AdapterFolder(folder, AdapterStore(model.model, fingerprint=model.fingerprint), model.model)
        found.look()
        served: Any = SimpleNamespace(adapters=found)
        self.alone[name] = OneReplica(served, Metrics())
        return AllReplicas(self.alone[name])

    async def broadcast(self, _: Any, method: str, called: str, *arguments: Any, timeout_s: float) -> list[Any]:
        assert method == "call_alone"
        if self.unavailable:
            raise self.unavailable
        await self.release.wait()
        return [
            error or (name, await getattr(self.alone[name], called)(*arguments))
            for name, error in self.announced.items()
        ]

    def status(self) -> Any:
        running = len(self.announced) if self.running is None else self.running
        states = SimpleNamespace(replica_states={"RUNNING": running})
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments={"replica": states})})

    def served(self) -> dict[str, list[str]]:
        """The adapters of each replica."""
        for one in self.alone.values():
            one.adapters.look()
        return {name: sorted(one.adapters.adapters) for name, one in self.alone.items()}


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    write_adapter(tiny_base, tmp_path / "runs", "plain")
    return tmp_path / "runs"


@pytest.fixture
def deployment(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    return Deployment(monkeypatch, AdaptedModel.from_pretrained(tiny_base))


@pytest.fixture
def both(deployment: Deployment, folder: Path) -> tuple[AllReplicas, AllReplicas]:
    """Two replicas that Ray Serve has announced."""
    deployment.announced = {"a": None, "b": None}
    return deployment.start("a", folder), deployment.start("b", folder)


def refused(call: Awaitable[Any]) -> tuple[int, str | None]:
    """The status and the code with which a call is refused."""

    async def run() -> Any:
        return await call

    with pytest.raises(ApiError) as error:
        asyncio.run(run())
    return error.value.status, error.value.code


def test_changes_hold_in_whatever_order_they_come(deployment: Deployment, folder: Path) -> None:
    changes = [Change(3, True), Change(5, False), Change(7, True), Change(11, False)]
    for n in (3, 4):
        for order in itertools.permutations(changes[:n]):
            deployment.start("a", folder)
            for change in order:
                deployment.alone["a"].adapters.merge({"plain": change})
            assert deployment.served() == {"a": ["plain"] if n == 3 else []}, order


def test_a_change_is_later_than_any_that_is_known(both: Any, deployment: Deployment) -> None:
    ahead = Change(2**62, False)
    for one in deployment.alone.values():
        one.adapters.merge({"plain": ahead})
    assert asyncio.run(both[0].load("plain")) == ""
    assert deployment.served() == {"a": ["plain"], "b": ["plain"]}


def test_unloading_is_known_to_a_replica_that_had_not_noticed_the_run(
    both: Any, deployment: Deployment, tiny_base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tiny_base, folder, "alpaca")
    with monkeypatch.context() as blind:
        blind.setattr(deployment.alone["b"].adapters, "_files", lambda: iter(()))
        assert asyncio.run(both[1].unload("alpaca"))
    assert deployment.served() == {"a": ["plain"], "b": ["plain"]}
    assert not asyncio.run(both[0].unload("nothing"))
    assert all(one.adapters.changes.keys() == {"alpaca"} for one in deployment.alone.values()), "nothing else is kept"


@pytest.mark.parametrize("when", ["before it asks", "before it is announced"])
def test_a_replica_that_starts_learns_what_was_unloaded(
    both: Any, deployment: Deployment, folder: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "PAUSE_S", 0)

    async def start() -> None:
        if when == "before it asks":
            await both[0].unload("plain")
        third = deployment.start("c", folder)
        async with third.joined():
            if when == "before it is announced":
                assert await both[0].unload("plain")
            else:
                assert deployment.served()["c"] == []
            deployment.announced["c"] = None
            while deployment.served()["c"]:
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(start(), 60))
    assert deployment.served() == {"a": [], "b": [], "c": []}


@pytest.mark.parametrize("error", [AWAY, OLD, asyncio.CancelledError()], ids=lambda one: type(one).__name__)
def test_what_a_replica_does_not_answer_is_refused_and_done_on_the_others(
    both: Any, deployment: Deployment, error: BaseException
) -> None:
    deployment.announced["b"] = error
    assert refused(both[0].unload("plain")) == (503, "replica_silent")
    assert refused(both[0].load("plain")) == (503, "replica_silent")
    assert list(asyncio.run(both[0]._ask("metrics", timeout_s=1))[0]) == ["a"]
    deployment.announced["b"] = None
    deployment.announced["c"] = GONE
    assert asyncio.run(both[0].unload("plain"))
    assert deployment.served() == {"a": [], "b": []}


def test_a_replica_that_the_asker_does_not_know_is_missed(both: Any, deployment: Deployment) -> None:
    deployment.running = 3
    assert refused(both[0].load("plain")) == (503, "replica_silent")
    deployment.running = None
    for error in (DeploymentUnavailableError("id"), asyncio.TimeoutError()):  # type: ignore[arg-type]
        deployment.unavailable = error
        assert refused(both[0].load("plain")) == (503, "replica_silent")
        assert b'replica="a"' in asyncio.run(both[0].metrics())


def test_a_change_reaches_the_replica_itself_even_if_no_other_answers(both: Any, deployment: Deployment) -> None:
    for one in deployment.alone.values():
        assert asyncio.run(one.unload("plain"))
    deployment.unavailable = asyncio.TimeoutError()
    assert refused(both[0].load("plain")) == (503, "replica_silent")
    assert deployment.served() == {"a": ["plain"], "b": []}


def test_loading_says_which_replica_lacks_the_run(deployment: Deployment, folder: Path, tmp_path: Path) -> None:
    deployment.announced = {"a": None, "b": None}
    here = deployment.start("a", folder)
    deployment.start("b", tmp_path)
    why = asyncio.run(here.load("plain"))
    assert why == "on 1 of 2 replicas, b: adapters.folder has no run of this name with an adapter"
    assert asyncio.run(here.load("nothing")) == "adapters.folder has no run of this name with an adapter"


def test_few_requests_ask_all_replicas_at_a_time(both: Any, deployment: Deployment) -> None:
    deployment.release.clear()

    async def many() -> list[Any]:
        asked = [asyncio.create_task(both[0].metrics()) for _ in range(7)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        deployment.release.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(many())
    assert [one.status for one in answers if isinstance(one, ApiError)] == [429] * 3
    assert asyncio.run(both[0].metrics()).count(b"rayjobs_ongoing_requests{") == 2
