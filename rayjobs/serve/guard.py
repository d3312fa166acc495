"""Checks that every request must pass before a route sees it, and a count of every answer: an ASGI middleware.

A body is read whole, up to its limit and within its time, before the route runs. While the route runs, the guard
watches the connection: when the client leaves, the route is cancelled, which frees what it holds.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayjobs.serve.api_errors import ApiError, as_api_error, error_response
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.settings import LimitsConfig, is_loopback

logger = logging.getLogger(__name__)

API, METRICS = "/v1/", "/metrics"
"""Paths that need the token, where there is one."""


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: LimitsConfig,
        metrics: Metrics,
        token_sha256: str | None = None,
        paths: Collection[str] = (),
    ) -> None:
        """token_sha256: of the token that requests must send, in hexadecimal; None for a loopback address. paths: those
        that are counted under their own name."""
        self._app, self._limits, self._metrics, self._token_sha256 = app, limits, metrics, token_sha256
        self._paths = frozenset(paths)
        self._ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003, "reason": "there are no websockets here"})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request: whatever happens, with a status, and with an error's body in OpenAI's shape."""
        began, status = time.monotonic(), 0

        async def send_and_see(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._admit(scope, receive, send_and_see)
        except asyncio.CancelledError:
            self._metrics.cancelled.inc()
            raise
        except Exception as error:
            answer = as_api_error(_from_starlette(error))
            if answer.status >= 500:
                logger.error("%s %s failed", scope["method"], ascii(scope["path"]), exc_info=error)
            if status == 0:
                await error_response(answer)(scope, receive, send_and_see)
        finally:
            route = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(route, str(status or "left")).inc()
            if scope["method"] == "POST":
                self._metrics.request_s.observe(time.monotonic() - began)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_token(scope["path"], headers)
        _check_origin(headers, only_loopback=self._token_sha256 is None)
        scope["app"] = self  # Starlette then raises its errors, and writes no answers of its own
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._ongoing >= self._limits.requests:
            raise ApiError(
                f"{self._ongoing} requests are being answered, as many as may be: come again later",
                status=429,
                code="too_many_requests",
            )
        self._ongoing += 1
        self._metrics.ongoing.inc()
        try:
            body = await self._read_body(headers, receive)
            if body is not None:
                await self._run(scope, body, receive, send)
        finally:
            self._ongoing -= 1
            self._metrics.ongoing.dec()

    def _check_token(self, path: str, headers: dict[str, str]) -> None:
        if self._token_sha256 is None or not (path.startswith(API) or path == METRICS):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._token_sha256):
            raise ApiError(
                "this server needs its token: send the header Authorization: Bearer TOKEN",
                status=401,
                code="invalid_api_key",
            )

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The whole body; None if the client left. Raises ApiError for one that is too large or comes too slowly."""
        limit = self._limits.body_bytes
        too_large = ApiError(
            f"the body is larger than {limit:,} bytes: send less in one request", status=413, code="body_too_large"
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        parts, size, more = [], 0, True

        async def read() -> bool:
            nonlocal size, more
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > limit:
                    raise too_large
            return True

        try:
            whole = await asyncio.wait_for(read(), self._limits.body_timeout_s)
        except asyncio.TimeoutError as error:
            raise ApiError("the body did not come in time", status=408, code="body_timeout") from error
        return b"".join(parts) if whole else None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Run the route on a body that was read; cancel it when the client leaves."""
        given, left = False, asyncio.Event()

        async def give_body() -> Message:
            nonlocal given
            if given:
                await left.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        async def answer() -> None:
            await self._app(scope, give_body, send)

        answering, watching = asyncio.create_task(answer()), asyncio.create_task(watch())
        try:
            await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            else:
                self._metrics.cancelled.inc()
        finally:
            for task in (answering, watching):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


def _check_origin(headers: dict[str, str], *, only_loopback: bool) -> None:
    """Refuse what a browser sends on behalf of another site, and, without a token, what names another host."""
    host = headers.get("host", "")
    origin = headers.get("origin")
    if origin is not None and _host(origin) != host.lower():
        raise ApiError(f"pages of {origin!r:.80} may not use this server", status=403, code="cross_origin")
    if only_loopback and not is_loopback(_name(host)):
        raise ApiError(
            f"the host {host!r:.80} is not this machine's own address: use http://127.0.0.1",
            status=403,
            code="unknown_host",
        )


def _name(host: str) -> str:
    """The name or address in a Host header; nothing of one that is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _host(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _from_starlette(error: Exception) -> Exception:
    """Starlette's error of a status, such as 404 for a path that is no route, as ours."""
    if isinstance(error, HTTPException):
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        return ApiError(error.detail, status=error.status_code, code=codes.get(error.status_code))
    return error
