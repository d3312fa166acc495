"""Adapters that are added, replaced, removed, unloaded and loaded while the server runs."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter import AdaptedModel
from rayjobs.serve import adapter_folder
from rayjobs.serve.app import create_app
from rayjobs.serve.settings import AdaptersConfig, EngineConfig
from rayjobs.serve.text_model import TextModel
from tests.rayjobs.serve.serving import alone, write_adapter

TURNS = [{"role": "user", "content": "Write the red house"}]


@pytest.fixture
def served(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Send a request to an application of adapters in `tmp_path / "runs"`: (path, body or None) → (status, JSON)."""
    monkeypatch.setattr(adapter_folder, "LOOK_S", 0)
    runs = tmp_path / "runs"
    write_adapter(tiny_base, runs, "plain")
    model = TextModel(
        AdaptedModel.from_pretrained(tiny_base),
        name="tiny",
        adapters=AdaptersConfig(folder=str(runs)),
        engine=EngineConfig(slots=2, max_length=99),
    )
    application = create_app(model)

    async def send(path: str, body: Any) -> tuple[int, Any]:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await (client.get(path) if body is None else client.post(path, json=body))
            kind = answer.headers["content-type"].partition(";")[0]
            return answer.status_code, answer.json() if kind == "application/json" else answer.text

    yield lambda path, body=None: asyncio.run(send(path, body))
    model.close()


def names(served: Any) -> list[str]:
    return [model["id"] for model in served("/v1/models")[1]["data"]]


def chat(served: Any, model: str) -> Any:
    body = {"model": model, "messages": TURNS, "max_tokens": 9, "temperature": 0}
    status, answer = served("/v1/chat/completions", body)
    return answer["choices"][0]["message"]["content"] if status == 200 else (status, answer["error"]["code"])


def test_what_comes_is_replaced_and_goes_is_noticed(served: Any, tiny_base: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"

    def expected(name: str) -> str:
        return alone(tiny_base, runs, name).chat(TURNS, max_new_tokens=9, temperature=0)

    assert names(served) == ["tiny", "plain"]
    write_adapter(tiny_base, runs, "sweep/chat")
    assert chat(served, "sweep/chat") == expected("sweep/chat")
    before = chat(served, "plain")
    assert before == expected("plain")
    write_adapter(tiny_base, runs, "plain", seed=5)
    assert chat(served, "plain") == expected("plain") != before
    assert names(served) == ["tiny", "plain", "sweep/chat"]
    shutil.rmtree(runs / "sweep")
    assert chat(served, "sweep/chat") == (404, "model_not_found")
    assert names(served) == ["tiny", "plain"]


def test_an_adapter_is_unloaded_and_loaded_by_name_alone(served: Any, tmp_path: Path) -> None:
    assert served("/v1/unload_lora_adapter", {"lora_name": "plain"})[0] == 200
    assert names(served) == ["tiny"]
    assert chat(served, "plain") == (404, "model_not_found")
    for body in (
        {"lora_name": "plain", "lora_path": str(tmp_path / "runs" / "plain")},
        {"lora_name": "../runs/plain"},
        {"lora_name": str(tmp_path / "runs" / "plain")},
    ):
        assert served("/v1/load_lora_adapter", body)[0] in (400, 404)
    assert names(served) == ["tiny"]
    assert served("/v1/load_lora_adapter", {"lora_name": "plain", "lora_path": "plain"})[0] == 200
    assert names(served) == ["tiny", "plain"]
    assert served("/v1/unload_lora_adapter", {"lora_name": "nothing"})[0] == 404


def test_what_was_unloaded_stays_so_when_its_run_comes_again(served: Any, tiny_base: Path, tmp_path: Path) -> None:
    assert served("/v1/unload_lora_adapter", {"lora_name": "plain"})[0] == 200
    shutil.rmtree(tmp_path / "runs" / "plain")
    assert names(served) == ["tiny"]
    write_adapter(tiny_base, tmp_path / "runs", "plain")
    assert names(served) == ["tiny"]
    assert served("/v1/load_lora_adapter", {"lora_name": "plain"})[0] == 200
    assert names(served) == ["tiny", "plain"]


def test_what_does_not_fit_is_left_out_and_says_why(served: Any, tiny_base: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    write_adapter(tiny_base, runs / "others", "plain", fingerprint="0" * 64)
    (runs / "broken").mkdir()
    (runs / "broken" / "adapter.safetensors").write_bytes(b"nothing of the kind")
    (runs / "cache" / "old").mkdir(parents=True)
    shutil.copy(runs / "plain" / "adapter.safetensors", runs / "cache" / "old")
    assert names(served) == ["tiny", "plain"]
    status, answer = served("/v1/models/others/plain")
    assert (status, "another base" in answer["error"]["message"]) == (404, True)
    damaged = runs / "damaged" / "adapter.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes((runs / "plain" / "adapter.safetensors").read_bytes()[:-40])
    assert chat(served, "damaged")[0] in (404, 503)
    assert isinstance(chat(served, "plain"), str), "and the others go on"
