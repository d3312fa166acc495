"""Malformed requests are refused in OpenAI's shape, the server goes on, and nobody sees another's text."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter import AdaptedModel
from rayjobs.serve.app import create_app
from rayjobs.serve.classification import ClassificationWorker
from rayjobs.serve.classifiers import ClassifierFolder
from rayjobs.serve.images import ImageRoutes
from rayjobs.serve.settings import EngineConfig
from rayjobs.serve.static_page import page_routes
from rayjobs.serve.text_model import TextModel
from tests.rayjobs.serve.malformed import send_all


@pytest.fixture(scope="module")
def app(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of a base, without adapters and classifiers."""
    engine = EngineConfig(slots=4, max_length=256, prepack=False)
    model = TextModel(AdaptedModel.from_pretrained(tiny_base), name="base", engine=engine)
    worker = ClassificationWorker(ClassifierFolder(tmp_path_factory.mktemp("runs")))
    yield create_app(model, routes=[*page_routes(), *ImageRoutes(worker).routes()])
    worker.close()
    model.close()


def statuses(app: Any, count: int, seed: int) -> Counter[int]:
    async def talk() -> Counter[int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await send_all(client, "base", count=count, seed=seed)

    return asyncio.run(talk())


def test_hundreds_of_malformed_requests_are_refused(app: Any) -> None:
    found = statuses(app, 300, seed=0)
    assert found.total() == 300
    assert {400, 403, 404, 405} <= set(found)


@pytest.mark.slow
def test_thousands_of_malformed_requests_are_refused(app: Any) -> None:
    assert statuses(app, 1500, seed=1).total() == 1500
