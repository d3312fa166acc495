"""Forms with images: what a request may hold is parsed, beside the event loop, and nothing else."""

import threading
from typing import Any

import pytest

from rayjobs.serve import images
from rayjobs.serve.api_errors import ApiError
from rayjobs.serve.images import PATH
from tests.rayjobs.serve.test_images import ask


def form_part(name: str, content: bytes, more: bytes = b"") -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n%b\r\n' % (name.encode(), more)
    return head + content + b"\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        b"".join(form_part(str(number), b"") for number in range(20_000)),
        b"--b\r\n" * 20_000,
        b"--b--\r\n".join([form_part("model", b"x" * 5000), b""]),
        form_part("model", b"pets", b"x: y\r\n" * 20_000),
        b"".join(form_part("model", b"", b"Content-Type: multipart/mixed; boundary=b\r\n") for _ in range(5000)),
    ],
    ids=["parts", "boundaries", "text", "headers", "forms in forms"],
)
def test_of_a_form_no_more_is_parsed_than_a_request_may_hold(parts: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = images.message_from_bytes
    monkeypatch.setattr(images, "message_from_bytes", lambda head: parsed.append(head) or parse(head))
    with pytest.raises(ApiError):
        images.read_request("multipart/form-data; boundary=b", parts + b"--b--")
    assert len(parsed) <= 8
    assert sum(map(len, parsed)) < 50_000


def test_a_form_within_a_form_is_bytes() -> None:
    inner = form_part("image", b"y") + b"--c--"
    body = form_part("model", b"pets") + form_part("image", inner.replace(b"--b", b"--c"))
    _, image = images.read_request("multipart/form-data; boundary=b", body + b"--b--")
    assert image == inner.replace(b"--b", b"--c")


def test_requests_are_read_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    read = images.read_request

    def note(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr(images, "read_request", note)
    worker: Any = None
    ask(worker, lambda client: client.post(PATH, content=b"{}"))
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
