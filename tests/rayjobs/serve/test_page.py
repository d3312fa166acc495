"""The page in a real browser, on a desk and on a phone, in light and in dark, used by keyboard."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter import AdaptedModel
from rayjobs.models.encoder import VisionEncoderConfig
from rayjobs.serve.app import create_app
from rayjobs.serve.classification import ClassificationWorker
from rayjobs.serve.classifiers import ClassifierFolder
from rayjobs.serve.images import PATH, ImageRoutes
from rayjobs.serve.settings import EngineConfig
from rayjobs.serve.static_page import FILES, page_routes
from rayjobs.serve.text_model import TextModel
from tests.rayjobs.serve.browser import BROWSER, browser_tab
from tests.rayjobs.serve.serving import listening
from tests.rayjobs.serve.test_images import SPECS, encoded, make_cache, picture, save_cache
from tests.waiting import PATIENCE_S

HOSTILE = "<img src=x onerror=document.title='hit'> & <script>document.title='hit'</script>"
GROUNDS = {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}


@pytest.fixture(scope="module")
def app(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of a base and of a classifier whose classes and images are named in an odd way."""
    engine = EngineConfig(slots=2, max_length=512, prepack=False)
    model = TextModel(AdaptedModel.from_pretrained(tiny_base), name="base <b>model</b>", engine=engine)
    folder = tmp_path_factory.mktemp("runs")
    save_cache(make_cache(), folder / "pets with a rather long name that goes on and on and on.safetensors")
    encoders = {name: VisionEncoderConfig(kind="pixels", name=spec.name) for name, spec in SPECS.items()}
    worker = ClassificationWorker(ClassifierFolder(folder, encoders=encoders))
    yield create_app(model, routes=[*page_routes(), *ImageRoutes(worker).routes()])
    worker.close()
    model.close()


def test_the_page_needs_nothing_from_elsewhere(app: Any) -> None:
    async def talk() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [await client.get(path) for path in FILES]

    for answer in asyncio.run(talk()):
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text
        assert "innerHTML" not in answer.text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (1280, "dark"), (390, "dark")])
def test_a_conversation_and_a_classification(app: Any, tmp_path: Path, width: int, scheme: str) -> None:
    image = picture(3, side=64)
    image.save(tmp_path / "picture.png")

    async def use(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            (classifier,) = (await client.get(PATH)).json()["data"]
            body = {"model": classifier["id"], "image": encoded(image), "evidence": 6}
            expected = (await client.post(PATH, json=body)).json()
        async with browser_tab(tmp_path / "profile") as tab:
            await tab.open(url, width, scheme)
            await tab.until("at('model').options.length")
            assert await tab.value("at('model').value") == "base <b>model</b>"
            assert await tab.value("getComputedStyle(document.body).backgroundColor") == GROUNDS[scheme]
            await tab.value("at('tokens').value = 24; at('message').focus()")
            await tab.type(HOSTILE)
            await tab.press("Enter", 13)
            await tab.until("!running && at('chat-status').textContent.includes('first token after')")
            said = "[...document.querySelectorAll('#log .said')].map(one => one.textContent)"
            turns = await tab.value(said)
            assert (len(turns), turns[0]) == (2, HOSTILE)
            assert await tab.value("document.querySelectorAll('#log img, #log script').length") == 0
            assert "tokens/s" in await tab.value("at('chat-status').textContent")
            await tab.screenshot(tmp_path / f"chat-{width}-{scheme}.png")
            assert await fits(tab)

            await tab.value("at('message').focus()")
            await tab.type("again")
            await tab.press("Enter", 13)
            await tab.value("at('new-chat').click()")
            await tab.until("!running")
            assert await tab.value("JSON.stringify(turns) + at('chat-status').textContent") == "[]"

            await tab.value("at('chat-tab').focus()")
            await tab.press("ArrowRight", 39)
            assert await tab.value("document.activeElement.id") == "images-tab"
            assert await tab.value("at('chat').hidden && !at('images').hidden")
            await tab.choose_file("#image-file", tmp_path / "picture.png")
            await tab.until("!at('result').hidden && at('images-status').textContent.includes(' s')")
            cells = "[...document.querySelectorAll('#{} tr')].map(row => row.children[0].textContent)"
            assert await tab.value(cells.format("classes")) == [one["label"] for one in expected["data"]]
            assert await tab.value(cells.format("votes")) == [one["name"] for one in expected["evidence"]["images"]]
            await tab.screenshot(tmp_path / f"images-{width}-{scheme}.png")
            assert await fits(tab)
            assert await tab.value("document.title") == "rayjobs serve"
            assert tab.complaints == []

    with listening(app) as url:
        asyncio.run(use(url))


async def fits(tab: Any) -> bool:
    """Return whether nothing is wider than the window."""
    return await tab.value("document.documentElement.scrollWidth <= innerWidth")
