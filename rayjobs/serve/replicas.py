"""All replicas of a server as one: adapters that are loaded or unloaded on each, and the metrics of all.

A request reaches any replica. What it asks about the server must not depend on which, so the replica that answers asks
the others through Ray Serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from rayjobs.cluster.ray_workarounds import broadcast
from rayjobs.serve.adapter_folder import UNLOADED, Change
from rayjobs.serve.api_errors import ApiError
from rayjobs.serve.metrics import merge_texts

if TYPE_CHECKING:
    from rayjobs.serve.metrics import Metrics
    from rayjobs.serve.text_model import TextModel

logger = logging.getLogger(__name__)

CHANGE_S = 20.0
"""Seconds that all replicas have to load or unload an adapter."""
GATHER_S = 3.0
"""Seconds after which metrics and changes are taken from the replicas that have answered. Prometheus waits for 10."""
PAUSE_S = 1.0
"""Seconds between two questions of a replica that has just started."""
ASKING = 4
"""Requests about all replicas that one replica answers at a time. Each holds one of the replica's slots while it waits
for others, which need slots of this replica for the same, so a few of `SPARE_REQUESTS`."""
CHANGEABLE = ("", UNLOADED)
"""Reasons for which an adapter is not served that loading or unloading can change; empty if it is served."""


class Replicas(Protocol):
    """The replicas that serve the same models, the one that answers among them."""

    def joined(self) -> AbstractAsyncContextManager[None]:
        """A block in which this replica serves. It begins with what was loaded and unloaded on the others."""

    async def load(self, name: str) -> str:
        """Serve a run's adapter, also one that was unloaded. Returns why a replica cannot; empty if all can."""

    async def unload(self, name: str) -> bool:
        """Serve an adapter no longer, until it is loaded again. Returns whether any replica served it."""

    async def metrics(self) -> bytes:
        """Everything that the replicas have counted, in Prometheus' text format."""


class OneReplica:
    """A replica alone."""

    def __init__(self, model: TextModel, metrics: Metrics) -> None:
        self.adapters, self._metrics = model.adapters, metrics

    def joined(self) -> AbstractAsyncContextManager[None]:
        """As in `Replicas`."""
        return nullcontext()

    async def load(self, name: str) -> str:
        """As in `Replicas`."""
        why = await self.why_not(name)
        if why not in CHANGEABLE:
            return why
        return await self.change(name, self.adapters.new_change(name, served=True))

    async def unload(self, name: str) -> bool:
        """As in `Replicas`."""
        if await self.why_not(name):
            return False
        await self.change(name, self.adapters.new_change(name, served=False))
        return True

    async def metrics(self) -> bytes:
        """As in `Replicas`."""
        return self._metrics.text()

    async def change(self, name: str, change: Change) -> str:
        """Load or unload an adapter. Returns why it is not served; empty if it is."""
        await asyncio.to_thread(self.adapters.merge, {name: change})
        return await self.why_not(name)

    async def why_not(self, name: str) -> str:
        """Return why an adapter is not served; empty if it is."""
        await asyncio.to_thread(self.adapters.look, at_once=True)
        if self.adapters.get(name):
            return ""
        return self.adapters.why_not(name) or "adapters.folder has no run of this name with an adapter"

    async def changes(self) -> dict[str, Change]:
        """The changes that this replica knows of."""
        return self.adapters.changes


class AllReplicas:
    """The replicas of the deployment of Ray Serve that this process belongs to.

    Each has a method `call_alone(name, *arguments)`, which calls a method of its `OneReplica` and returns the replica's
    id and the result.
    """

    def __init__(self, alone: OneReplica) -> None:
        """alone: this replica."""
        from ray import serve

        context = serve.get_replica_context()
        self._alone, self._id = alone, context.replica_tag
        self._application, self._deployment = context.app_name, context.deployment
        self._handle = serve.get_deployment_handle(self._deployment, self._application)
        self._n_asking = 0

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """As in `Replicas`. The others are asked again until Ray Serve has announced this replica.

        Only then do the others pass changes on to it, or refuse these.
        """
        await self._catch_up()

        async def catch_up_until_announced() -> None:
            announced = False
            while not announced:
                await asyncio.sleep(PAUSE_S)
                announced = await self._catch_up()

        task = asyncio.create_task(catch_up_until_announced())
        try:
            yield
        finally:
            task.cancel()

    async def load(self, name: str) -> str:
        """As in `Replicas`. Raises what `_change` raises."""
        _, whys = await self._change(name, served=True)
        missing = sorted(one for one, why in whys.items() if why)
        if not missing or len(missing) == len(whys):
            return whys[self._id]
        return f"on {len(missing)} of {len(whys)} replicas, {', '.join(missing)}: {whys[missing[0]]}"

    async def unload(self, name: str) -> bool:
        """As in `Replicas`. Raises what `_change` raises."""
        before, _ = await self._change(name, served=False)
        return not all(before.values())

    async def metrics(self) -> bytes:
        """As in `Replicas`, with the label `replica` at each value, of the replicas that answer soon."""
        answers, _ = await self._ask("metrics", timeout_s=GATHER_S)
        return merge_texts(answers)

    async def _catch_up(self) -> bool:
        """Take the changes that the others know of. Returns whether this replica was among those that were asked."""
        results = await self._broadcast("changes", timeout_s=GATHER_S)
        answers, newest = _answers(results), dict[str, Change]()
        for changes in answers.values():
            newest |= {name: max(change, newest.get(name, change)) for name, change in changes.items()}
        await asyncio.to_thread(self._alone.adapters.merge, newest)
        return self._id in answers

    async def _change(self, name: str, *, served: bool) -> tuple[dict[str, str], dict[str, str]]:
        """Load or unload an adapter on all replicas if one serves it or did: others may have yet to notice its file.

        Returns why each replica does not serve it, before and after. Raises what `_tell` raises. Other names are not
        kept, so that requests for what does not exist take no memory.
        """
        before, _ = await self._ask("why_not", name, timeout_s=GATHER_S)
        if not any(why in CHANGEABLE for why in before.values()):
            return before, before
        return before, await self._tell("change", name, self._alone.adapters.new_change(name, served=served))

    async def _tell(self, method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method on every replica, on this one in any case. Returns {id of the replica: result}.

        Raises ApiError with status 503 if a replica does not answer, but for those that have died.
        """
        from ray.exceptions import ActorDiedError

        answers, results = await self._ask(method, *arguments, timeout_s=CHANGE_S)
        silent = [one for one in results if isinstance(one, BaseException) and not isinstance(one, ActorDiedError)]
        if silent or len(results) < await asyncio.to_thread(self._n_running):
            raise ApiError("a replica does not answer: ask again later", status=503, code="replica_silent")
        return answers

    async def _ask(self, method: str, *arguments: Any, timeout_s: float) -> tuple[dict[str, Any], list[Any]]:
        """Call a method on every replica. Returns {id of the replica: result}, this one's in any case, and the results
        of `_broadcast`.

        Raises ApiError with status 429 if that is being done for `ASKING` other requests.
        """
        if self._n_asking >= ASKING:
            raise ApiError("all replicas are being asked: come again later", status=429, code="too_many_requests")
        self._n_asking += 1
        try:
            own = await getattr(self._alone, method)(*arguments)
            results = await self._broadcast(method, *arguments, timeout_s=timeout_s)
        finally:
            self._n_asking -= 1
        return {**_answers(results), self._id: own}, results

    async def _broadcast(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """Call a method on every replica that Ray Serve has announced. Returns (id, result) or an error of each."""
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            return await broadcast(self._handle, "call_alone", method, *arguments, timeout_s=timeout_s)
        except DeploymentUnavailableError:
            return []
        except asyncio.TimeoutError as error:
            return [error]

    def _n_running(self) -> int:
        from ray import serve

        application = serve.status().applications.get(self._application)
        deployment = application and application.deployments.get(self._deployment)
        return deployment.replica_states.get("RUNNING", 0) if deployment else 0


def _answers(results: list[Any]) -> dict[str, Any]:
    """The answers among the results of replicas. Errors are logged, such as those of replicas with older code."""
    for one in results:
        if isinstance(one, BaseException):
            logger.warning("a replica does not answer: %s", str(one).strip().rpartition("\n")[2] or type(one).__name__)
    return dict(one for one in results if not isinstance(one, BaseException))
