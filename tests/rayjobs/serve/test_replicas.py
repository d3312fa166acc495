"""Several replicas on Ray Serve answer as one server: before and after one of them is killed, and while they scale."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from adapter import GenerationConfig
from cafo import CaFo
from cafo.cache import save_cache
from rayjobs.config import load
from rayjobs.job_configs.serve import Config
from rayjobs.serve.deployment import serving
from rayjobs.serve.images import PATH
from rayjobs.serve.metrics import Metrics, merge_texts
from rayjobs.serve.router import EvenRouter
from tests.rayjobs.serve.serving import alone, write_adapter
from tests.rayjobs.serve.test_images import SPECS, encoded, make_cache, picture
from tests.waiting import wait_until

URL = "http://127.0.0.1:18474"
MANY = 16
"""Requests after which each of two replicas has been asked; that one of them has not is as likely as 2^-15."""


def test_merged_metrics_keep_each_replicas_values_apart() -> None:
    one, other = Metrics(), Metrics()
    one.requests.labels("/health", "200").inc(3)
    other.requests.labels("/health", "200").inc(5)
    other.first_token_s.observe(0.3)
    merged = samples(merge_texts({"a": one.text(), "b": other.text()}).decode())
    for replica, metrics in (("a", one), ("b", other)):
        expected = {(name, *labels): value for (name, *labels), value in samples(metrics.text().decode()).items()}
        found = {
            (name, *(one for one in labels if one[0] != "replica")): value
            for (name, *labels), value in merged.items()
            if ("replica", replica) in labels
        }
        assert found == expected


def samples(text: str) -> dict[tuple[Any, ...], float]:
    """(name, (label, value), …) → value of each sample of a page of metrics."""
    families = text_string_to_metric_families(text)
    return {(one.name, *sorted(one.labels.items())): one.value for family in families for one in family.samples}


def counted(name: str) -> dict[str, float]:
    """A metric of each replica, summed over its labels."""
    found = Counter[str]()
    for (one, *labels), value in samples(httpx.get(f"{URL}/metrics", timeout=60).text).items():
        if one == name:
            found[dict(labels)["replica"]] += value
    return found


def test_any_two_replicas_may_be_drawn_wherever_they_run() -> None:
    replicas: list[Any] = list("abcde")
    router: Any = object()
    drawn = {frozenset(asyncio.run(EvenRouter.choose_replicas(router, replicas))[0]) for _ in range(500)}
    assert drawn == {frozenset(pair) for pair in combinations(replicas, 2)}
    assert asyncio.run(EvenRouter.choose_replicas(router, replicas[:1])) == [["a"]]


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with an adapter and a classifier."""
    folder = tmp_path_factory.mktemp("shared")
    write_adapter(tiny_base, folder, "plain")
    save_cache(make_cache(), folder / "pets.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(cluster: None, tiny_base: Path, folder: Path) -> Iterator[None]:
    """Two replicas, and a third under load."""
    scale = {
        "min_replicas": 2,
        "max_replicas": 3,
        "target_ongoing_requests": 8,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
        "look_back_period_s": 1,
        "metrics_interval_s": 0.2,
    }
    values = {
        "base": {"path": str(tiny_base)},
        "adapters": {"folder": str(folder)},
        "caches": {"folder": str(folder), "encoders": {n: {"kind": s.kind, "name": s.name} for n, s in SPECS.items()}},
        "engine": {"slots": 4, "max_length": 999},
        "server": {"port": 18474, "name": "tiny"},
        "replicas": {"cpus": 0.1, "autoscaling": scale},
    }
    with serving(load(Config, values), 0.0):
        yield


def ask(model: str) -> httpx.Response:
    """Ask for a greedy completion, over a connection of its own."""
    body = {"model": model, "prompt": "the red house", "max_tokens": 7, "temperature": 0}
    return httpx.post(f"{URL}/v1/completions", json=body, timeout=60)


def change(what: str, name: str) -> None:
    """Load or unload an adapter."""
    answer = httpx.post(f"{URL}/v1/{what}_lora_adapter", json={"lora_name": name}, timeout=60)
    assert answer.status_code == 200, answer.text


def statuses(model: str) -> set[int]:
    """The statuses of so many requests that each replica was asked."""
    return {ask(model).status_code for _ in range(MANY)}


@pytest.mark.ray
@pytest.mark.slow
def test_any_replica_answers_for_all(server: None, tiny_base: Path, folder: Path) -> None:
    model = alone(tiny_base, folder, "plain")
    (expected,) = model.generate(["the red house"], GenerationConfig(max_new_tokens=7, temperature=0))
    before = counted("rayjobs_generated_tokens_total")
    assert len(before) == 2
    assert {ask("plain").json()["choices"][0]["text"] for _ in range(MANY)} == {expected}
    assert all(count > 0 for count in counted("rayjobs_generated_tokens_total").values()), "requests spread"
    write_adapter(tiny_base, folder, "sweep/chat")
    change("load", "sweep/chat")
    assert statuses("sweep/chat") == {200}
    assert len({httpx.get(f"{URL}/v1/models").text for _ in range(MANY)}) == 1
    change("unload", "sweep/chat")
    assert statuses("sweep/chat") == {404}
    change("load", "sweep/chat")
    (folder / "sweep/chat/adapter.safetensors").unlink()
    assert statuses("sweep/chat") == {404}


@pytest.mark.ray
@pytest.mark.slow
def test_any_replica_classifies(server: None, folder: Path) -> None:
    (expected,) = CaFo.load(folder / "pets.safetensors", SPECS).predict([picture()], top=3)
    form = {"model": "pets", "image": encoded(picture()), "top": 3}
    answers = [httpx.post(f"{URL}{PATH}", json=form, timeout=60) for _ in range(MANY)]
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    found = {one["label"]: one["probability"] for one in answers[0].json()["data"]}
    assert found == pytest.approx({one.class_name: one.probability for one in expected.top})


@pytest.mark.ray
@pytest.mark.slow
def test_metrics_do_not_wait_for_a_replica_that_hangs(server: None) -> None:
    """A question that reaches the one that hangs has no answer. Ray Serve replaces it where it hangs for long."""

    def answering() -> int:
        try:
            return len(counted("rayjobs_slots"))
        except httpx.TimeoutException:
            return 0

    hanging = replica_process()
    hanging.suspend()
    try:
        wait_until(lambda: answering() == 1 or not hanging.is_running(), "the other's metrics")
    finally:
        with suppress(psutil.NoSuchProcess):
            hanging.resume()
    wait_until(lambda: answering() == 2, "its metrics")


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_replica_is_replaced_by_one_that_knows_what_was_unloaded(
    server: None, tiny_base: Path, folder: Path
) -> None:
    write_adapter(tiny_base, folder, "alpaca")
    change("load", "alpaca")
    change("unload", "alpaca")
    before = set(counted("rayjobs_slots"))
    replica_process().kill()
    answers = Counter(ask("plain").status_code for _ in range(MANY))
    assert answers[200] >= MANY - 1, "the other goes on"
    wait_until(lambda: len(counted("rayjobs_slots").keys() - before) == 1, "another replica", pause_s=0.2)
    assert statuses("alpaca") == {404}
    assert statuses("plain") == {200}


def replica_process() -> psutil.Process:
    """The process of a replica of this test's cluster, whose processes are all below this one."""
    children = psutil.Process().children(recursive=True)
    return next(one for one in children if "ServeReplica:rayjobs:replica" in " ".join(one.cmdline()))


@pytest.mark.ray
@pytest.mark.slow
def test_replicas_come_under_load_and_go_after_it(server: None) -> None:
    over = threading.Event()

    def load_it() -> None:
        with openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as client:
            while not over.is_set():
                client.completions.create(model="tiny", prompt="the", max_tokens=400, temperature=0)

    threads = [threading.Thread(target=load_it, daemon=True) for _ in range(24)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(counted("rayjobs_slots")) == 3, "a third replica", pause_s=0.2)
        wait_until(lambda: all(counted("rayjobs_generated_tokens_total").values()), "its answers", pause_s=0.2)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    wait_until(lambda: len(counted("rayjobs_slots")) == 2, "its end", pause_s=0.2)
    assert statuses("tiny") == {200}
