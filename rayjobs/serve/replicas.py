"""All replicas of a server as one: adapters that are loaded or unloaded on each, and the metrics of all.

A request reaches any replica. What it asks about the server must not depend on which, so the replica that answers asks
the others through Ray Serve.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from rayjobs.serve.api_errors import ApiError
from rayjobs.serve.metrics import merge_texts

if TYPE_CHECKING:
    from rayjobs.serve.metrics import Metrics
    from rayjobs.serve.text_model import TextModel

PATIENCE_S = 20.0
"""Seconds that replicas have to answer one another. One that hangs for longer is replaced by Ray Serve."""


class Replicas(Protocol):
    """The replicas that serve the same models, the one that answers among them."""

    async def load(self, name: str) -> bool:
        """Serve a run's adapter, also one that was unloaded. Returns whether every replica found it."""

    async def unload(self, name: str) -> bool:
        """Serve an adapter no longer, until it is loaded again. Returns whether any replica served it."""

    async def unloaded(self) -> set[str]:
        """The adapters that are served no longer until they are loaded again."""

    async def metrics(self) -> bytes:
        """Everything that the replicas have counted, in Prometheus' text format."""


class OneReplica:
    """A replica alone."""

    def __init__(self, model: TextModel, metrics: Metrics) -> None:
        self._adapters, self._metrics = model.adapters, metrics

    async def load(self, name: str) -> bool:
        """As in `Replicas`."""
        return await asyncio.to_thread(self._adapters.load, name)

    async def unload(self, name: str) -> bool:
        """As in `Replicas`."""
        return await asyncio.to_thread(self._adapters.unload, name)

    async def unloaded(self) -> set[str]:
        """As in `Replicas`."""
        return self._adapters.unloaded

    async def metrics(self) -> bytes:
        """As in `Replicas`."""
        return self._metrics.text()


class AllReplicas:
    """The replicas of the deployment of Ray Serve that this process belongs to.

    Each has a method `call(name, *arguments)`, which calls a method of its `OneReplica` and returns the replica's id
    and the result.
    """

    def __init__(self) -> None:
        from ray import serve

        context = serve.get_replica_context()
        self._application, self._deployment = context.app_name, context.deployment
        self._handle = serve.get_deployment_handle(self._deployment, self._application)

    async def load(self, name: str) -> bool:
        """As in `Replicas`."""
        return all((await self._call("load", name)).values())

    async def unload(self, name: str) -> bool:
        """As in `Replicas`."""
        return any((await self._call("unload", name)).values())

    async def unloaded(self) -> set[str]:
        """As in `Replicas`. A replica that starts asks those that run already; there may be none yet."""
        if not await asyncio.to_thread(self._running):
            return set()
        return set().union(*(await self._call("unloaded")).values())

    async def metrics(self) -> bytes:
        """As in `Replicas`, with the label `replica` at each value."""
        return merge_texts(await self._call("metrics"))

    async def _call(self, name: str, *arguments: Any) -> dict[str, Any]:
        """Call a method on every replica. Returns {id of the replica: result}, without those that have just died.

        Raises ApiError with status 503 if a replica does not answer in time.
        """
        from ray.exceptions import RayActorError

        asked = self._handle.broadcast("call", name, *arguments)
        try:
            results = await asked.results_async(timeout_s=PATIENCE_S, return_exceptions=True)
        except TimeoutError as error:
            raise ApiError("a replica does not answer: ask again later", status=503, code="replica_silent") from error
        alive = [one for one in results if not isinstance(one, RayActorError)]
        for one in alive:
            if isinstance(one, BaseException):
                raise one
        return dict(alive)

    def _running(self) -> bool:
        from ray import serve

        application = serve.status().applications.get(self._application)
        deployment = application and application.deployments.get(self._deployment)
        return bool(deployment and deployment.replica_states.get("RUNNING"))
