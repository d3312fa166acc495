"""The server's application: the OpenAI API as an ASGI application, which needs no Ray.

application = create_app(TextModel(model, name="base"))

GET  /v1/models, /v1/models/NAME     the base and its adapters
POST /v1/completions                 texts that continue prompts
POST /v1/chat/completions            answers to conversations
POST /v1/load_lora_adapter           serve a run's adapter, in vLLM's convention; by name, never by path
POST /v1/unload_lora_adapter         serve it no longer
GET  /health, /metrics               whether it works; what it counted, for Prometheus
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from rayjobs.serve.api_errors import ApiError, JsonResponse
from rayjobs.serve.bodies import AdapterBody, read_body
from rayjobs.serve.chat import ChatCompletions
from rayjobs.serve.completions import Completions
from rayjobs.serve.guard import Guard
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.replicas import OneReplica, Replicas
from rayjobs.serve.text_model import TextModel


def create_app(
    model: TextModel,
    *,
    token_sha256: str | None = None,
    routes: Sequence[BaseRoute] = (),
    metrics: Metrics | None = None,
    replicas: Replicas | None = None,
    started: int | None = None,
) -> ASGIApp:
    """The application that serves a model.

    token_sha256: of the token that requests must send, in hexadecimal; None where only this machine can reach it.
    routes: further routes, which raise ApiError for what they refuse. metrics: what is counted here is counted in; new
    ones if None. replicas: all that serve the same models; this one alone if None. started: time of the server's start,
    in seconds since 1970; now if None.
    """
    metrics = metrics or Metrics()
    _watch(model, metrics)
    replicas = replicas or OneReplica(model, metrics)
    server = _Server(model, replicas, int(time.time()) if started is None else started)
    text_routes = [
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.show_metrics, methods=["GET"]),
        Route("/v1/models", server.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", server.show_model, methods=["GET"]),
        Route("/v1/completions", Completions(model, metrics).answer, methods=["POST"]),
        Route("/v1/chat/completions", ChatCompletions(model, metrics).answer, methods=["POST"]),
        Route("/v1/load_lora_adapter", server.load_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", server.unload_adapter, methods=["POST"]),
    ]
    every = [*text_routes, *routes]
    router = Router(every, redirect_slashes=False, default=_unknown, lifespan=server.lifespan)
    paths = [route.path for route in every if isinstance(route, Route)]
    return Guard(router, limits=model.limits, metrics=metrics, token_sha256=token_sha256, paths=paths)


class _Server:
    """The endpoints beside those of texts."""

    def __init__(self, model: TextModel, replicas: Replicas, started: int) -> None:
        self._model, self._replicas, self._started = model, replicas, started

    @asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Begin with the adapters that the other replicas serve."""
        async with self._replicas.joined():
            yield

    async def health(self, _: Request) -> Response:
        """Status 200 while the engine takes requests, otherwise 503."""
        if not self._model.worker.healthy:
            raise ApiError("the engine has stopped", status=503, code="engine_stopped")
        return JsonResponse({"status": "ok"})

    async def show_metrics(self, _: Request) -> Response:
        """Everything that the replicas have counted."""
        return Response(await self._replicas.metrics(), headers={"content-type": Metrics.content_type})

    async def list_models(self, _: Request) -> Response:
        """The base, and the adapters that are there now."""
        await asyncio.to_thread(self._model.adapters.look)
        adapters = self._model.adapters.adapters
        names = [self._model.name, *sorted(adapters)]
        return JsonResponse({"object": "list", "data": [self._describe(name) for name in names]})

    async def show_model(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["name"]
        await asyncio.to_thread(self._model.find, name)
        return JsonResponse(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        adapter = self._model.adapters.get(name)
        return {
            "id": name,
            "object": "model",
            "created": self._started if adapter is None else adapter.created,
            "owned_by": "rayjobs",
            "root": self._model.name,
            "parent": None if adapter is None else self._model.name,
            "max_model_len": self._model.max_length,
            "reads_images": adapter is not None and adapter.reads_images and self._model.reads_images,
        }

    async def load_adapter(self, request: Request) -> Response:
        """Serve a run's adapter, also one that was unloaded."""
        name = self._name(await read_body(AdapterBody, request))
        if why := await self._replicas.load(name):
            raise ApiError(f"{name!r:.80} cannot be served: {why}", status=404, param="lora_name")
        return PlainTextResponse(f"Success: the adapter {name!a} is served.")

    async def unload_adapter(self, request: Request) -> Response:
        """Serve an adapter no longer, until it is loaded again."""
        name = self._name(await read_body(AdapterBody, request))
        if not await self._replicas.unload(name):
            raise ApiError(f"the adapter {name!r:.80} is not served", status=404, param="lora_name")
        return PlainTextResponse(f"Success: the adapter {name!a} is served no longer.")

    def _name(self, body: AdapterBody) -> str:
        if body.lora_path not in (None, "", body.lora_name):
            raise ApiError(
                "adapters are loaded by the names of runs in adapters.folder, never by paths: leave lora_path out",
                param="lora_path",
            )
        return body.lora_name


def _watch(model: TextModel, metrics: Metrics) -> None:
    engine = model.engine
    metrics.watch("waiting_sequences", "Answers that wait for a slot.", lambda: engine.n_waiting)
    metrics.watch("running_sequences", "Answers that have a slot.", lambda: engine.n_active)
    metrics.watch("slots", "Slots of the engine.", lambda: engine.slots)
    metrics.watch("adapters", "Adapters that are served.", lambda: len(model.adapters.adapters))
    metrics.watch("adapter_cache_bytes", "Memory that adapters take.", lambda: engine.adapters.cached_bytes)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(f"there is nothing at {ascii(scope['path'])[:200]}", status=404, code="unknown_url")
