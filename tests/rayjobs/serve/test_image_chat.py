"""Conversations about an image, through a server's settings, against a model that is given the image's features."""

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from rayjobs.config import load
from rayjobs.models.image_conditioning import VisionConfig
from rayjobs.serve.deployment import build_application, load_text_model
from rayjobs.serve.settings import ServedConfig
from tests.adapter.models import randomise
from tests.rayjobs.cafo_dataset import make_encoders

QUESTION = "Write the red house"


def data_url(seed: int) -> tuple[Image.Image, str]:
    """A noisy image, and the URL that holds it."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (37, 41, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "png")
    return image, f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def turns(*urls: str) -> list[dict[str, Any]]:
    """A question about images."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def test_an_adapter_that_reads_images_answers_by_the_image(tiny_base: Path, tmp_path: Path) -> None:
    vision = {"encoder": make_encoders(tmp_path / "encoders")["clip"], "bottleneck": 7}
    conditioning = load(VisionConfig, vision).open()
    alone, blind = AdaptedModel.from_pretrained(tiny_base), AdaptedModel.from_pretrained(tiny_base)
    for name, model, projection in (("sees", alone, conditioning.projection), ("blind", blind, None)):
        model.add_adapter(AdaptionConfig(n_layers=3, prompt_length=5, vision=projection))
        for part in model.model.adapter_modules:
            randomise(part)
        model.save_adapter(tmp_path / "runs" / name / "adapter.safetensors")
    given = {
        "base": {"path": str(tiny_base)},
        "server": {"name": "tiny"},
        "adapters": {"folder": str(tmp_path / "runs")},
        "vision": vision,
        "engine": {"slots": 2, "max_length": 200},
    }
    settings = load(ServedConfig, given)
    model = load_text_model(settings, "cpu")
    application = build_application(settings, model, "cpu")

    async def ask(method: str, path: str, body: Any = None) -> Any:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.request(method, path, json=body)).json()

    def chat(name: str, messages: list[dict[str, Any]]) -> Any:
        body = {"model": name, "messages": messages, "max_tokens": 9, "temperature": 0, "logprobs": True}
        answer = asyncio.run(ask("POST", "/v1/chat/completions", body))
        if "error" in answer:
            return answer["error"]["message"]
        (choice,) = answer["choices"]
        return choice["message"]["content"], choice["logprobs"]["content"][0]["logprob"]

    listed = asyncio.run(ask("GET", "/v1/models"))["data"]
    assert {one["id"]: one["reads_images"] for one in listed} == {"tiny": False, "blind": False, "sees": True}
    encoder = conditioning.encoder
    found = []
    for seed in range(2):
        image, url = data_url(seed)
        pixels = encoder.preprocess(image)[None]
        features = encoder.features(load_encoder(settings), pixels)[0]
        found.append(chat("sees", turns(url)))
        assert found[-1][0] == alone.chat(
            [{"role": "user", "content": QUESTION}], max_new_tokens=9, temperature=0, image=features
        )
    assert len({found[0], found[1], chat("sees", turns())}) == 3
    assert "reads no images" in chat("blind", turns(url))
    assert "one image, got 2" in chat("sees", turns(url, url))
    assert "no URL is fetched" in chat("sees", turns("https://example.org/cat.png"))
    assert "no URL is fetched" in chat("sees", turns("file:///etc/passwd"))
    model.close()


def load_encoder(settings: ServedConfig) -> Any:
    """The encoder of some settings."""
    from rayjobs.models.encoder import load_vision_encoder

    assert settings.vision is not None
    return load_vision_encoder(settings.vision.encoder)
