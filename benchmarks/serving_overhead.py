"""Measure what a server adds to a token: the same streamed answers from the engine alone, over HTTP, and by Ray Serve.

SmolLM2-135M-Instruct in float32, one request at a time, greedy, on one thread. These take turns:

    the engine alone     its worker's events, in the process of the server below
    over HTTP            the application in a process without Ray, streamed to this one
    --url                a server that runs already, such as `rayjobs serve` with the same base

    python -m benchmarks.serving_overhead [--requests 4] [--rounds 3] [--tokens 16] [--url URL --pids PID ...]

Times are milliseconds for each token after the first, medians over requests and rounds. Processor times are those of
the server's processes, --pids of one that runs, for each token with the prompts included: on a machine that others use
too, they say more.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from typing import Any

import httpx
import psutil

from benchmarks.decoding import make_prompts
from benchmarks.serving_load import BASE, VOCABULARY, ask, free_port, wait_for_server
from rayjobs.reporting.tables import markdown_table


def serve(port: int) -> None:
    """Serve the base at a port, and at /engine the times of its engine's own events."""
    import torch
    import uvicorn
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from adapter import AdaptedModel
    from adapter.engine.request import Request
    from adapter.generation_config import GenerationConfig
    from rayjobs.serve.app import create_app
    from rayjobs.serve.kernel_caches import limit_kernel_caches
    from rayjobs.serve.settings import EngineConfig
    from rayjobs.serve.text_model import TextModel
    from tests.real_models import smollm2

    limit_kernel_caches()
    torch.set_num_threads(1)
    model = TextModel(AdaptedModel.from_pretrained(smollm2()), name=BASE, engine=EngineConfig(slots=16, max_length=256))

    def stream(prompt: list[int], tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=tokens, temperature=0)
        times = [time.perf_counter() for _ in model.worker.stream(Request(prompt=prompt, config=config))]
        return (times[-1] - times[0]) / (tokens - 1)

    async def engine(request: HttpRequest) -> JSONResponse:
        body = await request.json()
        return JSONResponse(await asyncio.to_thread(stream, body["prompt"], body["tokens"]))

    application = create_app(model, routes=[Route("/engine", engine, methods=["POST"])])
    uvicorn.run(application, host="127.0.0.1", port=port, log_level="warning")


def processor_seconds(pids: Sequence[int]) -> float:
    """Processor seconds that some processes have taken."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(one.user + one.system for one in times)


async def measure(given: argparse.Namespace, ways: dict[str, tuple[str, list[int]]]) -> dict[str, tuple[float, float]]:
    """Return milliseconds per token, and of processors, of each way: (its server's URL, the server's processes)."""
    prompts = make_prompts(16, VOCABULARY)
    waits: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    async with httpx.AsyncClient(timeout=600) as client:

        async def one(name: str, url: str, model: str, prompt: list[int]) -> float:
            if name == "the engine alone":
                body = {"prompt": prompt, "tokens": given.tokens}
                return float((await client.post(f"{url}/engine", json=body)).json())
            answer = await ask(client, model, prompt, given.tokens, leaves=False, url=url)
            if answer.error or answer.tokens != given.tokens:
                raise SystemExit(f"{name}: {answer}")
            return (answer.total_s - answer.first_s) / (given.tokens - 1)

        for number in range(given.rounds + 1):  # the first warms up
            for name, (url, pids) in ways.items():
                model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
                before = processor_seconds(pids)
                found = [await one(name, url, model, prompts[i % 16]) for i in range(given.requests)]
                if number:
                    waits[name] += found
                    spent[name].append((processor_seconds(pids) - before) / given.requests / given.tokens)
            print(f"round {number} of {given.rounds}", flush=True)
    return {name: (1000 * statistics.median(waits[name]), 1000 * statistics.median(spent[name])) for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4, help="requests of a round (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of a request (default: 16)")
    parser.add_argument("--url", help="of a running server, whose first model is the base")
    parser.add_argument("--pids", type=int, nargs="+", default=[], help="processes of that server")
    given = parser.parse_args()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process: Any = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    process.start()
    try:
        wait_for_server(url, process)
        ways = {"the engine alone": (url, [process.pid]), "over HTTP": (url, [process.pid])}
        if given.url:
            ways[given.url] = (given.url, given.pids)
        found = asyncio.run(measure(given, ways))
    finally:
        process.terminate()
        process.join()
    cells = [[name, f"{wait:.1f}", f"{cpu:.1f}"] for name, (wait, cpu) in found.items()]
    print(markdown_table(["", "ms per token", "processor ms per token"], cells))


if __name__ == "__main__":
    main()
