"""An engine in a thread: answers to many callers, cancelling, closing, failing."""

import threading

import pytest

from adapter.engine.engine import Engine
from adapter.engine.request import Request
from adapter.engine.worker import EngineStoppedError, EngineWorker
from adapter.generate import generate
from adapter.generation_config import GenerationConfig
from tests.adapter.models import GQA, llama
from tests.waiting import wait_until

CONFIG = GenerationConfig(max_new_tokens=7, temperature=0)


@pytest.fixture
def engine() -> Engine:
    return Engine(llama({**GQA, "n_layers": 2}), slots=3)


def test_threads_get_their_own_answers(engine):
    found: dict[int, list[int]] = {}

    def ask(worker: EngineWorker, token: int) -> None:
        request = Request(prompt=[token, 3], config=CONFIG, stop_ids=())
        found[token] = [id for event in worker.stream(request) for id in event.ids]

    with EngineWorker(engine) as worker:
        threads = [threading.Thread(target=ask, args=(worker, token)) for token in range(11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = generate(engine.model, [[token, 3] for token in range(11)], CONFIG, eos_ids=())
    assert found == dict(enumerate(expected))


def test_leaving_a_stream_frees_its_slot(engine):
    endless = GenerationConfig(max_new_tokens=40, temperature=0)
    with EngineWorker(engine) as worker:
        for event in worker.stream(Request(prompt=[1], config=endless, stop_ids=())):
            assert event.ids
            break
        wait_until(lambda: not engine.busy, "the cancelled request leaves")


def test_closing_and_failing_leave_nobody_waiting(engine):
    worker = EngineWorker(engine)
    worker.close()
    with pytest.raises(EngineStoppedError, match="has stopped; start another"):
        worker.submit(Request(prompt=[1], stop_ids=()))

    worker = EngineWorker(engine)
    request = Request(prompt=[1], config=CONFIG, stop_ids=())
    engine.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(worker.stream(request))
    wait_until(lambda: not worker.healthy, "the worker ends")
    with pytest.raises(EngineStoppedError, match="has stopped: ZeroDivisionError"):
        worker.submit(request)
