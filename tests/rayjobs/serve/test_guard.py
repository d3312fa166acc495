"""Limits, token, origins, and clients that leave or hang: the application as an ASGI server calls it."""

import asyncio
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp

from adapter.engine.request import Handle, QueueFullError, Request
from adapter.engine.sequence import Sequence
from rayjobs.serve.app import create_app
from rayjobs.serve.guard import Guard
from rayjobs.serve.logprobs import TokenTexts
from rayjobs.serve.metrics import Metrics
from rayjobs.serve.settings import LimitsConfig
from rayjobs.serve.text_model import TextModel
from tests.rayjobs.serve.serving import ADAPTERS
from tests.waiting import wait_until

LOCAL = "http://127.0.0.1:8000"
LONG: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 120, "temperature": 0}
SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "headers": [(b"host", b"localhost")],
    "query_string": b"",
    "asgi": {"version": "3.0"},
}


def ask(application: Any, method: str, path: str, host: str = LOCAL, **settings: Any) -> httpx.Response:
    """Send one request to an application."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url=host) as client:
            return await client.request(method, path, **settings)

    return asyncio.run(send())


def call(
    application: ASGIApp, body: list[dict[str, Any]], act: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Call an application with a POST of LONG; return what it sends.

    body: messages that it receives; nothing more comes until the client leaves. act: takes what is sent, and says
    whether the client leaves then.
    """
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if act(message):
                left.set()

        await application(SCOPE.copy(), receive, send)

    asyncio.run(run())
    return sent


def whole(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The message of a whole body."""
    return [{"type": "http.request", "body": json.dumps(values).encode(), "more_body": False}]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that the engine has chosen."""
    tokens, add = list[int](), Sequence.add

    def count(sequence: Sequence, token: int, logprob: Any) -> None:
        tokens.append(token)
        add(sequence, token, logprob)

    monkeypatch.setattr(Sequence, "add", count)
    return tokens


def test_a_client_that_leaves_frees_its_slots(application: ASGIApp, text_model: TextModel, chosen: list[int]) -> None:
    asked = {**LONG, "stream": True, "n": 40}
    sent = call(application, whole(asked), lambda message: b"text" in message.get("body", b""))
    assert sent[0]["status"] == 200
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)
    wait_until(lambda: not text_model.engine.busy, "the slots are free")
    assert len(chosen) < 40 * LONG["max_tokens"]


def test_a_client_that_leaves_before_the_answer_is_whole_frees_its_slots(
    application: ASGIApp, text_model: TextModel, chosen: list[int]
) -> None:
    async def leave() -> None:
        left, sent = asyncio.Event(), list[Any]()

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop(0)
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        body = whole({**LONG, "n": 40})
        answering = asyncio.create_task(application(SCOPE.copy(), receive, send))
        while not chosen:
            await asyncio.sleep(0.001)
        left.set()
        await answering
        assert not sent

    asyncio.run(leave())
    wait_until(lambda: not text_model.engine.busy, "the slots are free")
    assert len(chosen) < 40 * LONG["max_tokens"]


def test_a_body_that_does_not_come_or_is_too_large_is_given_up() -> None:
    reached: list[Any] = []

    async def inner(*arguments: Any) -> None:
        reached.append(arguments)

    application = Guard(inner, limits=LimitsConfig(body_bytes=10, body_timeout_s=0.01), metrics=Metrics())
    part = {"type": "http.request", "body": b"12345", "more_body": True}
    assert call(application, [part], lambda _: False)[0]["status"] == 408
    assert call(application, [part, part, part], lambda _: False)[0]["status"] == 413
    assert call(application, [part, {"type": "http.disconnect"}], lambda _: False) == []
    length = {"content-length": "11", "host": "localhost"}
    assert ask(application, "POST", "/v1/completions", headers=length, content=b"").status_code == 413
    assert not reached


def test_more_requests_than_the_limit_are_told_to_come_again() -> None:
    async def run() -> list[int]:
        hold, application = asyncio.Event(), Guard(inner, limits=LimitsConfig(requests=2), metrics=Metrics())
        inner.hold = hold  # type: ignore[attr-defined]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url=LOCAL) as client:
            held = [asyncio.create_task(client.post("/v1/completions", content=b"")) for _ in range(2)]
            while application._ongoing < 2:
                await asyncio.sleep(0)
            refused = await client.post("/v1/completions", content=b"")
            assert refused.headers["retry-after"] == "1"
            assert (await client.get("/health")).status_code == 200
            hold.set()
            answered = [(await one).status_code for one in held]
            return [refused.status_code, *answered, (await client.post("/v1/completions", content=b"")).status_code]

    async def inner(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["method"] == "POST":
            await inner.hold.wait()  # type: ignore[attr-defined]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    assert asyncio.run(run()) == [429, 200, 200, 200]


def test_answers_that_cannot_wait_are_told_to_come_again(
    application: ASGIApp, text_model: TextModel, monkeypatch: pytest.MonkeyPatch, chosen: list[int]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(text_model.engine, "max_waiting", 3)
        refused = ask(application, "POST", "/v1/completions", json={**LONG, "n": 4})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    submit = text_model.worker.submit

    def submit_first(request: Request, on_event: Any) -> Handle:
        if request.repeat:
            raise QueueFullError("full")
        return submit(request, on_event)

    monkeypatch.setattr(text_model.worker, "submit", submit_first)
    refused = ask(application, "POST", "/v1/completions", json={**LONG, "prompt": ["the", "the"], "n": 20})
    assert refused.status_code == 429
    wait_until(lambda: not text_model.engine.busy, "the first prompt's answers leave too")
    assert len(chosen) < 20 * LONG["max_tokens"]


def test_the_token_is_asked_for(text_model: TextModel) -> None:
    application = create_app(text_model, token_sha256=hashlib.sha256(b"secret").hexdigest())
    remote = "http://example.org"
    assert ask(application, "GET", "/health", remote).status_code == 200
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            refused = ask(application, "GET", path, remote, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert ask(application, "GET", "/v1/models", remote, headers={"authorization": "Bearer secret"}).status_code == 200


def test_other_sites_and_other_hosts_are_refused_without_a_token(application: ASGIApp) -> None:
    assert ask(application, "GET", "/v1/models", "http://example.org").status_code == 403
    for host in ("[", "]", "[::1", "[x]", "127.0.0.1]", ""):
        refused = ask(application, "GET", "/v1/models", headers={"host": host})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "unknown_host"), host
    for origin in ("http://example.org", "null", "http://127.0.0.1:9000"):
        assert ask(application, "POST", "/v1/completions", headers={"origin": origin}).status_code == 403
    assert ask(application, "GET", "/v1/models", headers={"origin": LOCAL}).status_code == 200
    assert ask(application, "GET", "/v1/models", "http://[::1]:8000").status_code == 200


def test_what_is_no_route_or_no_json_is_refused_in_openais_shape(application: ASGIApp) -> None:
    for method, path, status in (("GET", "/v1/../etc/passwd", 404), ("GET", "/v1/completions", 405)):
        refused = ask(application, method, path)
        assert (refused.status_code, set(refused.json()["error"])) == (status, {"message", "type", "param", "code"})
    for content in (b"", b"{", b"[]", b'{"model": "\\ud800"}', b"[" * 9999, b'{"model": 1e999}', b"\xff\xfe"):
        refused = ask(application, "POST", "/v1/chat/completions", content=content)
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_made_beside_the_event_loop(
    application: ASGIApp, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    threads, text = set[bool](), TokenTexts.text

    def note(texts: TokenTexts, token: int) -> str:
        threads.add(threading.current_thread() is threading.main_thread())
        return text(texts, token)

    monkeypatch.setattr(TokenTexts, "text", note)
    asked = {**LONG, "max_tokens": 3, "stream": stream}
    chat = {**asked, "messages": [{"role": "user", "content": "the cat"}], "logprobs": True, "top_logprobs": 2}
    del chat["prompt"]
    assert ask(application, "POST", "/v1/chat/completions", json=chat).status_code == 200
    completion = {**asked, "logprobs": 2, "echo": True}
    assert ask(application, "POST", "/v1/completions", json=completion).status_code == 200
    assert threads == {False}


def test_metrics_count_what_was_answered(text_model: TextModel) -> None:
    application = create_app(text_model)
    ask(application, "POST", "/v1/completions", json={**LONG, "max_tokens": 7, "n": 2})
    ask(application, "POST", "/v1/completions", json={})
    page = ask(application, "GET", "/metrics")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    assert samples["rayjobs_requests_total", "/v1/completions", "200"] == 1
    assert samples["rayjobs_requests_total", "/v1/completions", "400"] == 1
    assert samples["rayjobs_generated_tokens_total",] == 14
    assert samples["rayjobs_adapters",] == len(ADAPTERS)
    assert samples["rayjobs_ongoing_requests",] == 0
