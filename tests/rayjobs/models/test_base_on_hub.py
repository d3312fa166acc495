"""A base on the Hugging Face hub, through the commands, against a server that speaks its API over a socket."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from adapter.adapter_formats import read_adapter
from adapter.base.checkpoint import open_checkpoint
from rayjobs.__main__ import main
from rayjobs.config import config, load
from rayjobs.errors import ConfigError
from rayjobs.lifecycle import job
from rayjobs.models.base_model import BaseModelConfig
from rayjobs.runs.run_dir import RunConfig
from rayjobs.storage.yaml_file import read_yaml
from tests.conftest import ROOT
from tests.hub_server import Hub, serve_hub, use_hub


@pytest.fixture
def hub(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_hub() as hub:
        use_hub(hub.url, str(tmp_path / "home"), monkeypatch)
        monkeypatch.chdir(tmp_path)
        hub.add("org/tiny", {file.name: file.read_bytes() for file in tiny_base.iterdir()})
        yield hub


def given(records: Path, tmp_path: Path, *more: str) -> list[str]:
    settings = ["base.path=org/tiny", f"data.path={records}", "adapter.n_layers=2", "run.name=run", "scale.workers=2"]
    return [*settings, f"run.storage={tmp_path}/runs", "train.epochs=2", "train.warmup_epochs=1", *more]


def test_a_base_on_the_hub_is_the_local_one(hub: Hub, tiny_base: Path) -> None:
    checkpoint, tokenizer = load(BaseModelConfig, {"path": "org/tiny"}).open()
    local = open_checkpoint(tiny_base)
    assert (checkpoint.config, checkpoint.fingerprint()) == (local.config, local.fingerprint())
    assert str(tokenizer) == "hf://org/tiny"


def test_a_dry_run_fetches_no_weights(
    hub: Hub, records: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter-train", *given(records, tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    size = (tiny_base / "model.safetensors").stat().st_size
    assert f"to fetch from the hub   {size / 1000:.1f} kB" in shown
    assert "3 layers of width 24" in shown
    assert main(["adapter-generate", "base.path=org/tiny", "instruction=the cat", "--dry-run"]) == 0
    evaluation = ["adapter-eval", "base.path=org/tiny", f"data.path={records}", "run.name=eval", "--dry-run"]
    assert main(evaluation) == 0
    prompt = ["cafo-prompt", "source=llama", "llama.base.path=org/tiny", "class_names=[cat, dog]", "run.name=prompt"]
    assert main([*prompt, "--dry-run"]) == 0
    assert sorted(hub.fetched()) == ["config.json", "tokenizer.model"]
    load(BaseModelConfig, {"path": "org/tiny"}).open()
    assert main(["adapter-train", *given(records, tmp_path), "--dry-run"]) == 0
    assert "to fetch" not in capsys.readouterr().out.partition("memory of the base")[0].rpartition("plan")[2]


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_fetched(
    hub: Hub, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = json.dumps({"model_type": "mixtral", "num_local_experts": 8}).encode()
    hub.add("org/experts", {"config.json": experts, "model.safetensors": bytes(5000)})
    assert main(["adapter-train", *given(records, tmp_path, "base.path=org/experts")]) == 2
    assert "a mixture of experts" in capsys.readouterr().err
    assert hub.fetched() == ["config.json"]


def test_a_dry_run_does_not_fetch_a_file_that_has_all_in_it(hub: Hub) -> None:
    hub.add("org/quantized", {"a.gguf": bytes(5000)})
    base = load(BaseModelConfig, {"path": "hf://org/quantized/a.gguf"})
    with pytest.raises(ConfigError, match=r"a dry run fetches no weights; this file, 5.0 kB, has the settings in it"):
        base.open(weights=False)
    assert not hub.fetched()


def test_no_such_base_ends_the_command_in_one_line(
    hub: Hub, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, reason in (("org/typo", "has no such model, or it is private"), ("./org/tiny", "nor a folder")):
        for more in ([], ["--dry-run"]):
            assert main(["adapter-train", *given(records, tmp_path, f"base.path={name}"), *more]) == 2
            shown = capsys.readouterr().err
            assert shown.count("\n") == 1
            assert reason in shown


@config
class Settings:
    """A config of a job with a base."""

    JOB: ClassVar = "some-job"
    base: BaseModelConfig
    run: RunConfig


def test_a_run_keeps_the_commit_that_it_began_with(hub: Hub, tiny_base: Path) -> None:
    @job
    def run(settings: Settings) -> dict[str, str]:
        hub.repos["model", "org/tiny"].commit({"config.json": b"damaged"})
        return {"path": settings.base.path, "base": settings.base.open()[0].fingerprint()}

    first = hub.repos["model", "org/tiny"].commits[0].sha
    result = run(load(Settings, {"base": {"path": "org/tiny"}, "run": {"name": "run"}}))
    assert result == {"path": f"hf://org/tiny@{first}", "base": open_checkpoint(tiny_base).fingerprint()}


@pytest.mark.ray
@pytest.mark.slow
def test_workers_train_on_the_commit_of_the_driver(hub: Hub, records: Path, tiny_base: Path, tmp_path: Path) -> None:
    sha = hub.repos["model", "org/tiny"].commits[0].sha
    command = [sys.executable, "-m", "rayjobs", "adapter-train", *given(records, tmp_path)]
    trained = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "run"
    assert read_yaml(folder / "config.yaml")["base"]["path"] == f"hf://org/tiny@{sha}"
    assert "base_model: org/tiny\n" in (folder / "README.md").read_text(encoding="utf-8")
    assert hub.fetched().count("model.safetensors") == 1, "workers of one machine share the hub's cache"
    local = [*command, f"base.path={tiny_base}", "run.name=local"]
    assert subprocess.run(local, cwd=ROOT, env=dict(os.environ), capture_output=True).returncode == 0
    one, other = (read_adapter(tmp_path / "runs" / name / "adapter.safetensors") for name in ("run", "local"))
    assert torch.equal(one.prompt, other.prompt)
    assert one.base_fingerprint == other.base_fingerprint
