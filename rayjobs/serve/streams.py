"""Server-sent events: answers that are sent while they are made."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapter.engine.request import Handle, Request
from rayjobs.serve.api_errors import as_api_error, dump_json

logger = logging.getLogger(__name__)

Values = Mapping[str, Any]


class EventStream(Response):
    """A response of one event for each JSON value, and of `[DONE]` after the last.

    The first value is waited for before the response begins, so that what fails before it has an HTTP status of its
    own. What fails later is told in an event of the error, which is then the last.
    """

    media_type = "text/event-stream"

    def __init__(self, values: AsyncIterator[Values]) -> None:
        """values: an asynchronous generator, which is closed in any case."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._values = values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, as ASGI has it."""
        values: Any = self._values
        async with aclosing(values):
            first = await anext(values)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_event(send, dump_json(first))
            try:
                async for value in values:
                    await _send_event(send, dump_json(value))
            except Exception as error:
                answer = as_api_error(error)
                if answer.status >= 500:
                    logger.error("an answer failed while it was sent", exc_info=error)
                await _send_event(send, dump_json(answer.body()))
            else:
                await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode("ascii"), "more_body": True})


def usage(requests: Sequence[Request], handles: Sequence[Handle], *, hidden: bool = False) -> dict[str, int]:
    """The tokens of some requests' prompts and answers. hidden: the answers are not shown, and count as none."""
    prompt = sum(len(request.prompt) for request in requests)
    answer = 0 if hidden else sum(len(choice.ids) for handle in handles for choice in handle.choices)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
