"""Measure a server under load: times to the first token and to the whole answer, tokens per second, errors, memory.

Without --url and --pid of a running one, a server of SmolLM2-135M-Instruct in float32 with 16 adapters (28 layers, 10
prompts each) is started in a process of its own, without Ray. The load comes from this process, over HTTP, as streamed
completions of prompts of 8 to 71 tokens, which ask for a fixed number of new tokens:

    16 adapters            each request names the next one; at each --concurrency
    1 adapter              all requests name the same one; at the largest concurrency
    clients that leave     half of the clients hang up after their first token; the others' figures are shown

    python -m benchmarks.serving_load [--requests 48] [--concurrency 1 4 16] [--tokens 16] [--json]

A request's time begins when it is sent; with a closed loop, as many requests are under way as the concurrency says.
Memory is the resident set of the server after the phase. Before the first phase each adapter is asked once.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.decoding import make_prompts
from rayjobs.reporting.tables import markdown_table

BASE = "SmolLM2-135M-Instruct"
N_ADAPTERS, VOCABULARY, SLOTS = 16, 49_152, 16


@dataclass(frozen=True)
class Answer:
    """The times of one request in seconds, infinite if there was no token, and its tokens."""

    first_s: float
    total_s: float
    tokens: int
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A phase's figures."""

    phase: str
    requests: int
    concurrency: int
    first_p50_s: float
    first_p99_s: float
    total_p50_s: float
    total_p99_s: float
    tokens_per_s: float
    errors: int
    memory_mib: float


def serve(port: int, folder: str) -> None:
    """Serve the base and the adapters of a folder at a port: the process that is measured."""
    import torch
    import uvicorn

    from adapter import AdaptedModel
    from rayjobs.serve.app import create_app
    from rayjobs.serve.kernel_caches import limit_kernel_caches
    from rayjobs.serve.settings import AdaptersConfig, EngineConfig
    from rayjobs.serve.text_model import TextModel
    from tests.real_models import smollm2

    limit_kernel_caches()
    torch.set_num_threads(max(1, psutil.cpu_count(logical=False) or 1))
    model = TextModel(
        AdaptedModel.from_pretrained(smollm2()),
        name=BASE,
        adapters=AdaptersConfig(folder=folder),
        engine=EngineConfig(slots=SLOTS, max_length=256),
    )
    uvicorn.run(create_app(model), host="127.0.0.1", port=port, log_level="warning")


def make_runs(folder: Path) -> None:
    """Leave adapters with random prompts and gates in run folders."""
    import torch

    from adapter import AdaptedModel
    from benchmarks.serving_adapters import CONFIG
    from tests.real_models import smollm2

    model = AdaptedModel.from_pretrained(smollm2())
    for number in range(N_ADAPTERS):
        model.add_adapter(CONFIG, seed=number)
        with torch.no_grad():
            for adaption in model.model.adaptions:
                adaption.gate.normal_(std=0.1)
        model.save_adapter(folder / f"run{number}" / "adapter.safetensors")


async def ask(
    client: httpx.AsyncClient, model: str, prompt: list[int], tokens: int, *, leaves: bool, url: str = ""
) -> Answer:
    """Send one request and read its stream; a client that leaves hangs up after the first token.

    url: of the server, where the client has none.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began, first, counted = time.perf_counter(), float("inf"), 0
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                return Answer(
                    first, time.perf_counter() - began, 0, f"{answer.status_code} {await answer.aread()!r:.200}"
                )
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return Answer(first, time.perf_counter() - began, counted, str(event["error"]))
                first = min(first, time.perf_counter() - began)
                if leaves:
                    return Answer(first, time.perf_counter() - began, 1)
                if event.get("usage"):
                    counted = event["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        return Answer(first, time.perf_counter() - began, counted, repr(error))
    return Answer(first, time.perf_counter() - began, counted, "" if counted else "no token")


async def phase(
    client: httpx.AsyncClient,
    name: str,
    models: Sequence[str],
    given: argparse.Namespace,
    at_once: int,
    leaving: int = 0,
) -> Row:
    """Keep `at_once` requests under way until all are answered; every `leaving`-th client leaves, none if 0."""
    prompts, queue = make_prompts(16, VOCABULARY), iter(range(given.requests))
    staying: list[Answer] = []

    async def one_client() -> None:
        for number in queue:
            leaves = bool(leaving) and number % leaving == 0
            model, prompt = models[number % len(models)], prompts[number % len(prompts)]
            answer = await ask(client, model, prompt, given.tokens, leaves=leaves)
            if not leaves:
                staying.append(answer)

    began = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(at_once)))
    seconds = time.perf_counter() - began
    for error in {answer.error for answer in staying if answer.error}:
        print(f"{name}: {error}", flush=True)
    good = [answer for answer in staying if not answer.error]
    firsts, totals = [answer.first_s for answer in good], [answer.total_s for answer in good]
    row = Row(
        phase=name,
        requests=len(staying),
        concurrency=at_once,
        first_p50_s=percentile(firsts, 50),
        first_p99_s=percentile(firsts, 99),
        total_p50_s=percentile(totals, 50),
        total_p99_s=percentile(totals, 99),
        tokens_per_s=sum(answer.tokens for answer in good) / seconds,
        errors=len(staying) - len(good),
        memory_mib=psutil.Process(given.pid).memory_info().rss / 2**20 if given.pid else float("nan"),
    )
    print(row, flush=True)
    return row


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that this percentage of the values do not exceed; NaN of none."""
    return float(np.percentile(values, percent, method="inverted_cdf")) if values else float("nan")


async def load(url: str, given: argparse.Namespace) -> list[Row]:
    """Run all phases against a server."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        models = [one["id"] for one in (await client.get("/v1/models")).json()["data"]]
        adapters = models[1:] or models
        for model in adapters:  # reads each adapter
            await ask(client, model, [1, 2, 3], 2, leaves=False)
        name, most = f"{len(adapters)} adapters", max(given.concurrency)
        rows = [await phase(client, name, adapters, given, at_once) for at_once in given.concurrency]
        rows.append(await phase(client, "1 adapter", adapters[:1], given, most))
        rows.append(await phase(client, "clients that leave", adapters, given, most, leaving=2))
        rows.append(await phase(client, f"{name}, again", adapters, given, most))
        await wait_until_free(client)
    return rows


async def wait_until_free(client: httpx.AsyncClient) -> None:
    """Wait until no answer has a slot, as after clients that left; print what the server counts."""
    for _ in range(600):
        text = (await client.get("/metrics")).text
        counted = [line for line in text.splitlines() if line.startswith(("rayjobs_running", "rayjobs_waiting"))]
        if all(float(line.split()[-1]) == 0 for line in counted):
            print(f"at the end: {', '.join(counted)}", flush=True)
            return
        await asyncio.sleep(0.1)
    raise SystemExit(f"slots are still taken a minute after the last request: {counted}")


def wait_for_server(url: str, process: Any) -> None:
    """Wait until the server answers, or end with it."""
    while True:
        if not process.is_alive():
            raise SystemExit("the server ended")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def measure(given: argparse.Namespace) -> list[Row]:
    """Load the server of --url, or one that is started for it."""
    if given.url:
        return asyncio.run(load(given.url, given))
    with tempfile.TemporaryDirectory() as folder:
        make_runs(Path(folder))
        port = free_port()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, folder), daemon=True)
        process.start()
        try:
            given.pid = process.pid
            wait_for_server(f"http://127.0.0.1:{port}", process)
            return asyncio.run(load(f"http://127.0.0.1:{port}", given))
        finally:
            process.terminate()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=48, help="requests of a phase (default: 48)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="(default: 1 4 16)")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of a request (default: 16)")
    parser.add_argument("--url", help="of a running server, whose first model is the base")
    parser.add_argument("--pid", type=int, help="process of that server, whose memory is read")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    rows = measure(given)
    head = ["", "requests", "at once", "first token p50, p99 (s)", "answer p50, p99 (s)", "tokens/s", "errors", "MiB"]
    cells = [
        [
            row.phase,
            str(row.requests),
            str(row.concurrency),
            f"{row.first_p50_s:.2f}, {row.first_p99_s:.2f}",
            f"{row.total_p50_s:.2f}, {row.total_p99_s:.2f}",
            f"{row.tokens_per_s:.1f}",
            str(row.errors),
            f"{row.memory_mib:.0f}",
        ]
        for row in rows
    ]
    print(markdown_table(head, cells))
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
