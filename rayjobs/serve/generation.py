"""Requests in the engine, whose events a coroutine awaits."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from types import TracebackType

from adapter.engine.request import Event, Handle, Request
from adapter.engine.worker import EngineWorker
from rayjobs.serve.metrics import Metrics

Numbered = tuple[int, Event]
"""The number of the request among those of the generation, and an event of it."""


class Generation:
    """Requests that are answered together. Leaving its `async with` cancels what has not ended, which frees its slots.

    async with Generation(worker, metrics, requests) as generation:
        async for number, event in generation:
            ...
        generation.handles
    """

    def __init__(self, worker: EngineWorker, metrics: Metrics, requests: Sequence[Request]) -> None:
        self._worker, self._metrics, self._requests = worker, metrics, requests
        self.handles: list[Handle] = []
        self._events: asyncio.Queue[Numbered] = asyncio.Queue()
        self._began = time.monotonic()

    async def __aenter__(self) -> "Generation":
        """Queue the requests. Raises what `EngineWorker.submit` raises; then none of them stays in the engine."""
        loop = asyncio.get_running_loop()

        def hand_over(number: int, event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        try:
            for number, request in enumerate(self._requests):
                self.handles.append(
                    self._worker.submit(request, lambda event, number=number: hand_over(number, event))  # type: ignore[misc]
                )
        except Exception:
            self._cancel()
            raise
        self._metrics.prompt_tokens.inc(sum(len(request.prompt) for request in self._requests))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel()

    async def __aiter__(self) -> AsyncIterator[Numbered]:
        """Yield the events as they come. Raises the error of a request that fails."""
        left, first = sum(request.n for request in self._requests), True
        while left:
            number, event = await self._events.get()
            if event.finish == "error":
                raise self.handles[number].error or RuntimeError("the engine gave up a request")
            if first:
                self._metrics.first_token_s.observe(time.monotonic() - self._began)
                first = False
            self._metrics.generated_tokens.inc(len(event.ids))
            left -= event.finish is not None
            yield number, event

    async def finish(self) -> list[Handle]:
        """Wait for the whole answers. Raises the error of a request that fails."""
        async for _ in self:
            pass
        return self.handles

    def _cancel(self) -> None:
        for handle in self.handles:
            if not handle.done:
                self._worker.cancel(handle)
