"""Bodies that hold millions of wrong values are refused at the first one."""

import asyncio
import threading
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from rayjobs.serve import bodies
from rayjobs.serve.api_errors import ApiError
from rayjobs.serve.bodies import LARGE_BODY, ChatBody, CompletionBody, parse_body, read_body
from rayjobs.serve.images import read_request

MANY = 50_000
CHAT = b'{"model": "tiny", "messages": %b}'
COMPLETION = b'{"model": "tiny", "prompt": %b}'
USER = b'[{"role": "user", "content": %b}]'


def many(value: bytes, last: bytes | None = None) -> bytes:
    """A JSON list of many times the same value, and perhaps another one at the end."""
    return b"[" + b",".join([value] * MANY + ([last] if last else [])) + b"]"


@pytest.mark.parametrize(
    ("kind", "body", "key"),
    [
        (CompletionBody, COMPLETION % many(b"-1"), "prompt"),
        (CompletionBody, COMPLETION % many(b"1.5"), "prompt"),
        (CompletionBody, COMPLETION % many(b"{}"), "prompt"),
        (CompletionBody, COMPLETION % many(b"[-1]"), "prompt"),
        (CompletionBody, COMPLETION % (b"[" + many(b"null") + b"]"), "prompt"),
        (CompletionBody, COMPLETION % many(b"[]"), "prompt"),
        (CompletionBody, COMPLETION % many(b'"the"'), "prompt"),
        (CompletionBody, COMPLETION % many(b"7", b'"the"'), "prompt"),
        (CompletionBody, b'{"model": "tiny", "prompt": "the", "stop": %b}' % many(b'""'), "stop"),
        (ChatBody, CHAT % many(b"{}"), "messages"),
        (ChatBody, CHAT % many(b'{"role": "user", "content": "the"}'), "messages"),
        (ChatBody, CHAT % (USER % many(b"{}")), "messages"),
        (ChatBody, CHAT % (USER % many(b'{"type": "text", "text": "the"}')), "messages"),
    ],
)
def test_lists_of_many_wrong_values_give_few_errors(kind: type[BaseModel], body: bytes, key: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_body(kind, body)
    cause = refused.value.__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() <= 8
    assert refused.value.param == key
    assert len(str(refused.value)) < 300


def test_many_unknown_keys_of_a_classification_give_one_error() -> None:
    keys = b",".join(b'"%064d": 1' % number for number in range(MANY // 10))
    with pytest.raises(ApiError, match="is no key of this request") as refused:
        read_request("application/json", b'{"model": "pets", "image": "", %b}' % keys)
    assert refused.value.__cause__ is None
    assert len(str(refused.value)) < 300


def test_lists_of_many_right_values_are_read() -> None:
    ids = parse_body(CompletionBody, COMPLETION % many(b"7")).prompts
    assert ids == [[7] * MANY]
    assert parse_body(CompletionBody, COMPLETION % b'["a", "b"]').prompts == ["a", "b"]
    assert parse_body(CompletionBody, COMPLETION % b"[[1, 2], [3]]").prompts == [[1, 2], [3]]


def test_large_bodies_are_parsed_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []

    def parse(kind: Any, body: bytes) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse_body(kind, body)

    monkeypatch.setattr(bodies, "parse_body", parse)

    async def read(size: int) -> CompletionBody:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": COMPLETION % (b'"' + b"a" * size + b'"')}

        return await read_body(CompletionBody, Request({"type": "http", "headers": []}, receive))

    for size in (9, LARGE_BODY):
        assert asyncio.run(read(size)).prompt == "a" * size
    assert threads == [True, False]
