"""A folder of adapters for the tiny base, and an application that listens at a real address."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from adapter import AdaptedModel
from adapter.adaption import AdaptionConfig
from adapter.methods.lora import LoraConfig
from adapter.templates import PLAIN, ChatTemplate
from tests.adapter.models import randomise
from tests.waiting import wait_until

CHAT = ChatTemplate(
    source="{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ADAPTERS: dict[str, Any] = {
    "alpaca": (AdaptionConfig(n_layers=2, prompt_length=3), None),
    "plain": (AdaptionConfig(n_layers=3, prompt_length=5), PLAIN),
    "sweep/chat": (LoraConfig(rank=2), CHAT),
}
"""Name of the run → its method, and the template of its training."""


def write_adapter(base: Path, folder: Path, name: str, *, seed: int = 0, fingerprint: str | None = None) -> Path:
    """Leave an adapter with random values in the folder of a run. fingerprint: of its base; the base's own if None."""
    model = AdaptedModel.from_pretrained(base)
    model.fingerprint = fingerprint or model.fingerprint
    config, model.template = ADAPTERS[name]
    model.add_adapter(config, seed=seed)
    for part in model.model.adapter_modules:
        randomise(part, seed + 1)
    path = folder / name / "adapter.safetensors"
    model.save_adapter(path)
    return path


def alone(base: Path, folder: Path, name: str | None) -> AdaptedModel:
    """The base with one adapter, which answers one request at a time."""
    model = AdaptedModel.from_pretrained(base)
    if name is not None:
        model.load_adapter(folder / name / "adapter.safetensors")
    return model


@contextmanager
def listening(application: Any) -> Iterator[str]:
    """Let an application listen at a port of this machine; yield its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application, log_config=None, ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the server listens")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def to_float64(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of logits, by the plain formula."""
    return logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
