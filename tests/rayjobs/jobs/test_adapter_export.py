"""adapter-export: each format lands in the run folder as its own code reads it, and what cannot be written says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter.adapter_file import AdapterFile, apply_adapter, extract_adapter
from adapter.adapter_formats import read_adapter
from adapter.adaption import AdaptionConfig
from adapter.base.checkpoint import load_decoder, open_checkpoint
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.jobs import adapter_export


def save_adapter(base: Path, path: Path, *, per_head: bool = False) -> AdapterFile:
    """An adapter with open gates on the tiny base; one gate for all heads of a layer, unless `per_head`."""
    model = load_decoder(base)
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=5), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for i, adaption in enumerate(model.adaptions):
            adaption.gate.copy_(torch.full((6,), 0.3 + i) + per_head * torch.arange(6) / 10)
    file = extract_adapter(model, base_fingerprint=open_checkpoint(base).fingerprint())
    file.save(path)
    return file


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    save_adapter(tiny_base, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def words(base: Path, adapter: Path, *more: str) -> list[str]:
    return [f"base.path={base}", f"adapter={adapter}", f"run.storage={adapter.parent / 'runs'}", "run.name=x", *more]


def run(base: Path, adapter: Path, *more: str) -> dict[str, Any]:
    return adapter_export.run(load(adapter_export.Config, None, words(base, adapter, *more)))


@pytest.mark.parametrize(("given", "out"), [
    (["format=v1"], "adapter.pth"),
    (["format=v1", "gate=tanh"], "adapter.pth"),
    (["format=litgpt"], "lit_model.pth.adapter"),
    (["format=peft"], "peft"),
])  # fmt: skip
def test_every_format_is_read_again(given: list[str], out: str, tiny_base: Path, adapter: Path) -> None:
    result = run(tiny_base, adapter, *given)
    folder = adapter.parent / "runs" / "x"
    assert result["out"] == str(folder / out)
    assert (result["layers"], result["prompt_length"], result["first_layer"]) == (2, 5, 1)
    assert {"config.yaml", "run.json", "result.json", "source.json", out} <= {path.name for path in folder.iterdir()}
    models = [load_decoder(tiny_base), load_decoder(tiny_base)]
    apply_adapter(models[0], read_adapter(adapter))
    apply_adapter(models[1], read_adapter(folder / out, gate="tanh" if "gate=tanh" in given else None))
    ids = torch.tensor([[1, 7, 30, 2, 19]])
    torch.testing.assert_close(models[1](ids), models[0](ids), rtol=0, atol=1e-5)


def test_peft_gets_the_bases_name(tiny_base: Path, adapter: Path) -> None:
    run(tiny_base, adapter, "format=peft")
    config = json.loads((adapter.parent / "runs" / "x" / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base)
    assert (config["adapter_layers"], config["adapter_len"]) == (2, 5)


def test_a_run_is_repeated_but_not_mixed(tiny_base: Path, adapter: Path, terminal: Any) -> None:
    run(tiny_base, adapter, "format=v1")
    first = (adapter.parent / "runs" / "x" / "adapter.pth").read_bytes()
    run(tiny_base, adapter, "format=v1")
    assert (adapter.parent / "runs" / "x" / "adapter.pth").read_bytes() == first
    assert main(["adapter-export", *words(tiny_base, adapter, "format=litgpt")]) == 2
    assert "format was v1, now litgpt" in terminal.readouterr().err


def test_dry_run_checks_everything_and_writes_nothing(tiny_base: Path, adapter: Path, terminal: Any) -> None:
    assert main(["adapter-export", *words(tiny_base, adapter, "format=peft"), "--dry-run"]) == 0
    shown = terminal.readouterr()
    assert "5 prompt tokens in each of the top 2 layers" in shown.out + shown.err
    assert not (adapter.parent / "runs").exists()
    save_adapter(tiny_base, adapter, per_head=True)
    assert main(["adapter-export", *words(tiny_base, adapter, "format=peft"), "--dry-run"]) == 2
    assert "PEFT's format has one gate per layer; the heads of layer 1 have different ones" in terminal.readouterr().err


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, adapter: Path, terminal: Any) -> None:
    AdapterFile(**{**vars(read_adapter(adapter)), "base_fingerprint": "f2"}).save(adapter)
    assert main(["adapter-export", *words(tiny_base, adapter, "format=v1")]) == 2
    assert "adapter.safetensors: the adapter was made for another base of the same shape" in terminal.readouterr().err
