"""Watch whether a server under mixed load grows: its memory, open files and threads.

Clients go on side by side until the time is over; each draws what it does next:

    streams         a streamed completion, read to its end
    waits           a completion or conversation in one piece
    leaves          a stream whose client hangs up after the first event
    leaves early    a request whose client hangs up before there is an answer
    hangs           half of a body, and then nothing; the client hangs up after two seconds
    malformed       a request of tests.rayjobs.serve.malformed, which must be refused

Without --url, a server of a tiny base with random weights and 16 adapters is started in a process of its own, without
Ray. With --url and --pid, the processes of a running one are watched, such as the replicas and the proxy of Ray Serve.

    python -m benchmarks.serving_soak [--minutes 5] [--clients 12] [--url URL --pid PID [PID …]] [--json]

The figures are sums over the processes; each process's growth of memory is told too. The growth per minute is fitted
by least squares to the second half of the samples, since caches fill in the first.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil

from benchmarks.serving_load import free_port, wait_for_server, wait_until_free
from rayjobs.reporting.tables import markdown_table
from tests.rayjobs.serve.malformed import check_refusal, draw, good_body

N_ADAPTERS, SLOTS = 16, 8
KINDS = ("streams", "waits", "leaves", "leaves early", "hangs", "malformed")
WEIGHTS = (6, 6, 4, 3, 1, 8)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Sample:
    """The state of the server's processes at a time."""

    minute: float
    requests: int
    errors: int
    memory_mib: float
    files: int
    threads: int
    disk_kib: float
    """Size of the log files and others that the processes hold open for writing."""
    by_process_mib: dict[int, float]
    """Memory of each process, by its number."""


@dataclass
class Soak:
    """A load that goes on until its time is over."""

    url: str
    models: list[str]
    until: float
    done: Counter[str] = field(default_factory=Counter)
    """Finished requests by kind."""
    failed: Counter[str] = field(default_factory=Counter)
    """Requests that did not get the answer that their kind must get, by what they got."""

    async def client(self, seed: int) -> None:
        """Do one thing after another."""
        rng = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while time.monotonic() < self.until:
                (kind,) = rng.choices(KINDS, WEIGHTS)
                try:
                    await self._act(kind, rng, client)
                except (httpx.HTTPError, OSError, AssertionError) as error:
                    self.failed[f"{kind}: {error!r:.300}"] += 1
                self.done[kind] += 1

    async def _act(self, kind: str, rng: random.Random, client: httpx.AsyncClient) -> None:
        if kind == "hangs":
            await self._hang()
            return
        if kind == "malformed":
            call = draw(rng, self.models[0])
            answer = await client.request(call.method, call.path, content=call.content, headers=call.headers)
            check_refusal(call, answer)
            return
        path = rng.choice((COMPLETIONS, CHAT))
        body = {**good_body(path, rng.choice(self.models)), "max_tokens": rng.randrange(1, 40), "temperature": 1}
        body |= {"n": rng.choice((1, 1, 3)), "seed": rng.randrange(99)}
        if kind == "waits":
            answer = await client.post(path, json=body)
            assert answer.status_code in (200, 429), answer.text[:300]
        elif kind == "leaves early":
            try:
                await client.post(path, json=body, timeout=rng.choice((0.001, 0.01, 0.05)))
            except httpx.TimeoutException:
                return
        else:
            await _stream(client, path, body, leaves=kind == "leaves")

    async def _hang(self) -> None:
        """Send half of a body, wait, and hang up."""
        address = urlsplit(self.url)
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 999\r\n\r\n"
        writer.write(head.encode() + b'{"model": ')
        await writer.drain()
        await asyncio.sleep(2)
        writer.close()


async def _stream(client: httpx.AsyncClient, path: str, body: dict[str, Any], *, leaves: bool) -> None:
    async with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code in (200, 429), (await answer.aread())[:300]
        last = ""
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                last = line
                if leaves:
                    return
        assert answer.status_code == 429 or last == "data: [DONE]", f"the stream ended with {last:.200}"


def sample(processes: list[psutil.Process], soak: Soak, began: float) -> Sample:
    """The state of the processes now."""
    memory = {one.pid: one.memory_info().rss / 2**20 for one in processes}
    held = {one.path for process in processes for one in process.open_files() if getattr(one, "mode", "r") != "r"}
    return Sample(
        minute=(time.monotonic() - began) / 60,
        requests=soak.done.total(),
        errors=soak.failed.total(),
        memory_mib=sum(memory.values()),
        files=sum(process.num_fds() for process in processes),
        threads=sum(process.num_threads() for process in processes),
        disk_kib=sum(Path(path).stat().st_size for path in held if Path(path).is_file()) / 2**10,
        by_process_mib=memory,
    )


async def watch(given: argparse.Namespace) -> list[Sample]:
    """Put the server under load, and look at its processes again and again, and once everybody has left."""
    processes = [psutil.Process(pid) for pid in given.pid]
    async with httpx.AsyncClient(base_url=given.url, timeout=120) as client:
        models = [one["id"] for one in (await client.get("/v1/models")).json()["data"]]
        began = time.monotonic()
        soak = Soak(given.url, models, began + 60 * given.minutes)
        clients = asyncio.gather(*(soak.client(given.seed * 1000 + number) for number in range(given.clients)))
        samples = [sample(processes, soak, began)]
        while not clients.done():
            await asyncio.wait({clients}, timeout=given.every)
            if not clients.done():
                samples.append(sample(processes, soak, began))
                print(samples[-1], flush=True)
        await clients
        await wait_until_free(client)
        await asyncio.sleep(3)
        samples.append(sample(processes, soak, began))
    print("; ".join(f"{kind}: {count}" for kind, count in soak.done.items()))
    for what, count in soak.failed.most_common(20):
        print(f"{count} x {what}")
    return samples


def serve(port: int, folder: str) -> None:
    """Serve a tiny base and adapters at a port: the process that is watched."""
    import torch
    import uvicorn

    from adapter import AdaptedModel
    from rayjobs.serve.app import create_app
    from rayjobs.serve.kernel_caches import limit_kernel_caches
    from rayjobs.serve.settings import AdaptersConfig, EngineConfig, LimitsConfig
    from rayjobs.serve.static_page import page_routes
    from rayjobs.serve.text_model import TextModel

    limit_kernel_caches()
    torch.set_num_threads(1)
    model = TextModel(
        AdaptedModel.from_pretrained(Path(folder) / "base"),
        name="base",
        adapters=AdaptersConfig(folder=str(Path(folder) / "runs"), cache_bytes=2**15),  # so that adapters come and go
        engine=EngineConfig(slots=SLOTS, max_length=256),
        limits=LimitsConfig(body_timeout_s=1.0),
    )
    uvicorn.run(create_app(model, routes=page_routes()), host="127.0.0.1", port=port, log_level="warning")


def make_folder(folder: Path) -> None:
    """Leave a base with random weights, and adapters of three methods in run folders."""
    from tests.conftest import WORDS, make_base
    from tests.rayjobs.serve.serving import ADAPTERS, write_adapter

    (folder / "base").mkdir()
    sentences = [" ".join(random.Random(number).choices(WORDS, k=12)) for number in range(200)]
    base = make_base(folder / "base", sentences)
    for number in range(N_ADAPTERS):
        write_adapter(base, folder / "runs" / str(number), list(ADAPTERS)[number % len(ADAPTERS)], seed=number)


def per_minute(samples: list[Sample], figure: Callable[[Sample], float]) -> float:
    """The growth of a figure per minute in the second half of the load, by least squares."""
    under_load = samples[1:-1]
    late = under_load[len(under_load) // 2 :]
    if len(late) < 2:
        return float("nan")
    return float(np.polyfit([one.minute for one in late], [figure(one) for one in late], 1)[0])


def measure(given: argparse.Namespace) -> list[Sample]:
    """Watch the server of --url, or one that is started for it."""
    if given.url:
        return asyncio.run(watch(given))
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder))
        port = free_port()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, folder), daemon=True)
        process.start()
        try:
            given.url, given.pid = f"http://127.0.0.1:{port}", [process.pid]
            wait_for_server(given.url, process)
            return asyncio.run(watch(given))
        finally:
            process.terminate()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="length of the load (default: 5)")
    parser.add_argument("--clients", type=int, default=12, help="clients side by side (default: 12)")
    parser.add_argument("--every", type=float, default=60, help="seconds between two looks (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a running server, whose first model is the base")
    parser.add_argument("--pid", type=int, nargs="+", default=[], help="processes of that server")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    given = parser.parse_args()
    samples = measure(given)
    names = ("memory_mib", "files", "threads", "disk_kib")
    rows = [
        [f"{one.minute:.1f}", str(one.requests), str(one.errors), *(f"{getattr(one, name):.1f}" for name in names)]
        for one in samples
    ]
    growth = [per_minute(samples, attrgetter(name)) for name in names]
    rows.append(["per minute, late", "", "", *(f"{one:+.2f}" for one in growth)])
    print(markdown_table(["minute", "requests", "errors", "MiB", "open files", "threads", "log KiB"], rows))
    for pid, memory in samples[0].by_process_mib.items():
        late = per_minute(samples, lambda one, pid=pid: one.by_process_mib[pid])
        print(f"process {pid}: {memory:.1f} to {samples[-1].by_process_mib[pid]:.1f} MiB, {late:+.2f} per minute, late")
    if given.json:
        print(json.dumps([asdict(one) for one in samples]))


if __name__ == "__main__":
    main()
