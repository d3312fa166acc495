"""Requests that no server should answer with anything but a refusal, drawn from a seed, and a talk that sends them.

    python -m tests.rayjobs.serve.malformed --url http://127.0.0.1:8000 [--count 10000] [--seed 0] [--pid PID]

sends them to a running server, with good requests in between, and prints the statuses and the growth of its memory.
"""

import argparse
import asyncio
import json
import random
import string
from collections import Counter
from typing import Any, NamedTuple

import httpx

COMPLETIONS, CHAT, IMAGES = "/v1/completions", "/v1/chat/completions", "/v1/images/classifications"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
POSTS = (COMPLETIONS, CHAT, IMAGES, LOAD, UNLOAD)
SECRET = "the password is swordfish 4711"
"""Part of each good request's prompt, which no refusal may repeat."""

WRONG_TEMPERATURES = ["hot", -1, 2.5, [], {}, True, "NaN"]
WRONG_NUMBERS = ["x", -1, 1.5, [], {}, "2", 2**70]
WRONG: dict[str, list[Any]] = {
    "model": [None, 5, [], {}, "", "none such", "../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000, "\ud800"],
    "temperature": WRONG_TEMPERATURES,
    "top_p": ["x", -0.1, 0, 1.01, [], {}],
    "max_tokens": [*WRONG_NUMBERS, 10**9],
    "n": [*WRONG_NUMBERS, 0, 10**6],
    "seed": ["x", 1.5, [], 2**64],
    "stop": [5, {}, [5], [""], "", ["a"] * 99],
    "stream": ["yes", 2, []],
    "stream_options": ["x", 5, {"include_usage": "x"}],
    "top_k": ["x", -2, 1.5, 2**40],
}
WRONG_OF = {
    COMPLETIONS: {
        **WRONG,
        "prompt": [None, 5, {}, [], [[]], [5, "x"], [-1], [10**9], "word " * 9000, [[1.5]]],
        "logprobs": ["x", -1, 10**6, []],
        "echo": ["x", []],
    },
    CHAT: {
        **WRONG,
        "messages": [
            None, 5, "hi", [], {}, [5], [{}], [{"role": "user"}], [{"role": "god", "content": "x"}],
            [{"role": "user", "content": 5}], [{"role": "assistant", "content": "x"}],
            [{"role": "user", "content": "word " * 9000}], [{"role": "user", "content": [{"type": "film"}]}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}],
        ],
        "logprobs": ["x", 5],
        "top_logprobs": ["x", -1, 10**6],
    },
    IMAGES: {
        "model": WRONG["model"],
        "image": [None, 5, [], "", "*", "AAAA", "file:///etc/passwd", "data:image/png;base64,", "é" * 9],
        "top": [0, -1, 1.5, "x", 10**9],
        "coverage": [0, 1, -1, "x", 7],
        "evidence": [-1, "x", 10**9],
    },
    LOAD: {"lora_name": WRONG["model"], "lora_path": ["/etc/passwd", 5, "../x"]},
    UNLOAD: {"lora_name": WRONG["model"]},
}  # fmt: skip
"""Path → key → values that are wrong whatever the other keys are."""


class Call(NamedTuple):
    """One request."""

    method: str
    path: str
    content: bytes
    headers: dict[str, str]


def good_body(path: str, model: str) -> dict[str, Any]:
    """A request that would be answered; of adapters and images, one that lacks only what it names."""
    if path == COMPLETIONS:
        return {"model": model, "prompt": f"the cat {SECRET}", "max_tokens": 4, "temperature": 0}
    if path == CHAT:
        messages = [{"role": "user", "content": f"the dog {SECRET}"}]
        return {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0}
    return {"model": "none", "image": "AAAA"} if path == IMAGES else {"lora_name": "none"}


def draw(rng: random.Random, model: str) -> Call:
    """Draw a malformed request."""
    kinds = [lacking, cut_short, noise, nested, unknown, odd_form, odd_headers, *[wrong_value] * 4]
    kind = rng.choice(kinds)
    method, path, content, headers = kind(rng, model)
    return Call(method, path, content, {"content-type": "application/json", **headers})


def wrong_value(rng: random.Random, model: str) -> Call:
    path = rng.choice(POSTS)
    key = rng.choice(sorted(WRONG_OF[path]))
    return Call("POST", path, dump({**good_body(path, model), key: rng.choice(WRONG_OF[path][key])}), {})


def lacking(rng: random.Random, model: str) -> Call:
    path = rng.choice(POSTS)
    body = good_body(path, model)
    del body[rng.choice([key for key in body if key in ("model", "prompt", "messages", "image", "lora_name")])]
    return Call("POST", path, dump(body), {})


def cut_short(rng: random.Random, model: str) -> Call:
    path = rng.choice(POSTS)
    content = dump(good_body(path, model))
    return Call("POST", path, content[: rng.randrange(len(content))], {})


def noise(rng: random.Random, model: str) -> Call:
    content = rng.randbytes(rng.randrange(300))
    return Call("POST", rng.choice(POSTS), b"\xff" + content, {})


def nested(rng: random.Random, model: str) -> Call:
    depth = rng.choice([10, 1000, 50_000])
    opened, closed = rng.choice([(b"[", b"]"), (b'{"model":', b"}"), (b'{"messages":[', b"]}")])
    return Call("POST", rng.choice(POSTS), opened * depth + b"1" + closed * rng.choice([0, depth]), {})


def unknown(rng: random.Random, model: str) -> Call:
    name = "".join(rng.choices(string.ascii_letters + "%./~-", k=rng.randrange(1, 30)))
    path = rng.choice([f"/v1/{name}", f"/{name}x", "/v1/../../etc/passwd", "/page.js/", "/v1/models/none"])
    method = rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    if rng.random() < 0.3:
        method, path = rng.choice(["PUT", "DELETE", "PATCH"]), rng.choice([*POSTS, "/", "/health"])
    return Call(method, path, rng.randbytes(9), {})


def odd_form(rng: random.Random, model: str) -> Call:
    part = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nnone\r\n'
    content = rng.choice([b"", b"--b--", part, part * 3, part[:40], rng.randbytes(99), b"--b\r\n" * 2000])
    boundary = rng.choice(["; boundary=b", "", "; boundary=", "; boundary*=x''b", f"; boundary={'b' * 3000}"])
    return Call("POST", IMAGES, content, {"content-type": f"multipart/form-data{boundary}"})


def odd_headers(rng: random.Random, model: str) -> Call:
    path = rng.choice(POSTS)
    origins = [{"origin": origin} for origin in ("https://elsewhere.example", "null", "http://[")]
    headers = rng.choice([*origins, *({"host": host} for host in ("elsewhere.example", "[", "127.0.0.1]"))])
    return Call("POST", path, dump(good_body(path, model)), headers)


def dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


async def send_all(
    client: httpx.AsyncClient, model: str, *, count: int, seed: int, at_once: int = 16, every: int = 25
) -> Counter[int]:
    """Send `count` malformed requests, and after each `every` of them good ones, whose answers must stay the same.

    Returns how often each status came. Raises AssertionError for an answer that is no refusal in OpenAI's shape, or
    that repeats another request.
    """
    rng, statuses = random.Random(seed), Counter[int]()
    good = [(path, good_body(path, model)) for path in (COMPLETIONS, CHAT)]

    async def answers() -> list[str]:
        got = [await client.post(path, json=body) for path, body in good]
        assert [one.status_code for one in got] == [200, 200], got[0].text
        return [json.dumps(one.json()["choices"]) for one in got]

    first = await answers()
    free = asyncio.Semaphore(at_once)

    async def send(call: Call) -> None:
        async with free:
            answer = await client.request(call.method, call.path, content=call.content, headers=call.headers)
        check_refusal(call, answer)
        statuses[answer.status_code] += 1

    for start in range(0, count, every):
        calls = [draw(rng, model) for _ in range(min(every, count - start))]
        again, *_ = await asyncio.gather(answers(), *map(send, calls))
        assert again == first, "a good request's answer depends on no other request"
    return statuses


def check_refusal(call: Call, answer: httpx.Response) -> None:
    """Assert that an answer is a refusal in OpenAI's shape, and repeats no other request."""
    shown = f"{call.method} {call.path} {call.content[:200]!r} {call.headers}: {answer.status_code} {answer.text[:300]}"
    assert 400 <= answer.status_code < 500, shown
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, shown
    assert isinstance(error["message"], str), shown
    assert error["message"], shown
    assert isinstance(error["type"], str), shown
    assert SECRET not in answer.text, shown
    assert "Traceback" not in answer.text, shown


def main() -> None:
    import psutil

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="of a running server")
    parser.add_argument("--count", type=int, default=10_000, help="malformed requests (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="process of the server, whose memory is printed")
    given = parser.parse_args()

    def memory() -> float:
        return psutil.Process(given.pid).memory_info().rss / 2**20 if given.pid else 0.0

    async def talk() -> Counter[int]:
        async with httpx.AsyncClient(base_url=given.url, timeout=120) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            await send_all(client, model, count=min(200, given.count), seed=given.seed + 1)  # warms up
            print(f"memory before: {memory():.0f} MiB", flush=True)
            return await send_all(client, model, count=given.count, seed=given.seed)

    statuses = asyncio.run(talk())
    print(f"memory after: {memory():.0f} MiB")
    print(", ".join(f"{status}: {number}" for status, number in sorted(statuses.items())))


if __name__ == "__main__":
    main()
