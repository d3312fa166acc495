"""A served tiny base with three adapters, shared by the tests of the API."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from starlette.types import ASGIApp

from adapter import AdaptedModel
from rayjobs.serve.app import create_app
from rayjobs.serve.settings import AdaptersConfig, EngineConfig, LimitsConfig
from rayjobs.serve.text_model import TextModel
from tests.rayjobs.serve.serving import ADAPTERS, listening, write_adapter


@pytest.fixture(scope="session")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with an adapter each."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(tiny_base, folder, name, seed=seed)
    return folder


@pytest.fixture(scope="session")
def text_model(tiny_base: Path, runs: Path) -> Iterator[TextModel]:
    """The base and its adapters, as they are served."""
    model = TextModel(
        AdaptedModel.from_pretrained(tiny_base),
        name="tiny",
        adapters=AdaptersConfig(folder=str(runs)),
        engine=EngineConfig(slots=5, max_length=200, prefill_tokens=37),
        limits=LimitsConfig(body_bytes=20_000, tokens=120, choices=40),
    )
    yield model
    model.close()


@pytest.fixture(scope="session")
def application(text_model: TextModel) -> ASGIApp:
    """The application of the base and its adapters."""
    return create_app(text_model)


@pytest.fixture(scope="session")
def url(application: ASGIApp) -> Iterator[str]:
    """The address at which the application listens."""
    with listening(application) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the application."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
