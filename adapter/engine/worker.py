"""An engine that runs in a thread of its own, for programs that answer many clients at once."""

import logging
import queue
import threading
from collections.abc import Iterator

from adapter.engine.engine import Engine
from adapter.engine.request import Event, Handle, OnEvent, Request
from adapter.errors import AdapterError

logger = logging.getLogger(__name__)


class EngineStoppedError(AdapterError):
    """The engine has been closed, or failed: start another."""


class EngineWorker:
    """Runs an engine's steps while there are requests. Its methods may be called from any thread.

    with EngineWorker(engine) as worker:
        for event in worker.stream(request):
            print(event.text, end="")
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: Exception | None = None
        """The error that ended the engine; None while it runs."""
        self._closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "EngineWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def healthy(self) -> bool:
        """The engine takes requests."""
        return not self._closed and self.error is None

    def submit(self, request: Request, on_event: OnEvent | None = None) -> Handle:
        """Queue a request, as `Engine.submit`. on_event is called by the engine's thread and must not block it.

        Raises what `Engine.submit` raises, and EngineStoppedError.
        """
        if not self.healthy:
            raise EngineStoppedError(
                f"the engine has stopped{f': {self.error!r}' if self.error else ''}; start another"
            )
        handle = self.engine.submit(request, on_event)
        self._wake.set()
        if not self.healthy:  # it stopped meanwhile, and may have missed this request
            self.engine.fail_all(EngineStoppedError("the engine has stopped; start another"))
        return handle

    def cancel(self, handle: Handle) -> None:
        """Drop a request at the engine's next step, which frees its slots."""
        handle.cancel()
        self._wake.set()

    def stream(self, request: Request) -> Iterator[Event]:
        """Queue a request and yield its events as they come. Leaving the loop early cancels the request.

        Raises what `submit` raises, at once, and the request's own error where it fails later.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        handle = self.submit(request, events.put)
        return self._events(handle, events)

    def _events(self, handle: Handle, events: "queue.SimpleQueue[Event]") -> Iterator[Event]:
        left = handle.request.n
        try:
            while left:
                event = events.get()
                if event.finish == "error" and handle.error is not None:
                    raise handle.error
                left -= event.finish is not None
                yield event
        finally:
            if left:
                self.cancel(handle)

    def close(self) -> None:
        """Stop the engine after its current step. Requests that have not ended fail with EngineStoppedError."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                if self.engine.busy:
                    self.engine.step()
                else:
                    self._wake.wait()
                    self._wake.clear()
        except Exception as error:  # whatever it is, nobody may wait for an answer that does not come
            logger.exception("the engine failed")
            self.error = error
        self.engine.fail_all(self.error or EngineStoppedError("the engine was closed before the request ended"))
