"""The model card: what the hub's own library reads in it, what its commands do, and what it keeps to itself."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from adapter import AdaptedModel, AdaptionConfig
from rayjobs.config import load, to_dict
from rayjobs.jobs import adapter_generate, adapter_train
from rayjobs.reporting.model_card import CARD_FILE, adapter_card, publishable, run_card, write_card
from rayjobs.storage.files import write_json, write_jsonl
from rayjobs.storage.yaml_file import write_yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "s3cr3t"


def make_run(folder: Path, base: Path, *, base_path: str = "", data: Any = None, state: str = "done") -> Path:
    """The files that a finished run of adapter-train leaves, with an adapter for `base`."""
    torch.manual_seed(0)
    model = AdaptedModel.from_pretrained(base)
    model.add_adapter(AdaptionConfig(n_layers=2, prompt_length=3))
    model.save_adapter(folder / "adapter.safetensors")
    given = {
        "base": {"path": base_path or str(base)},
        "data": {"path": data or [f"s3://key:{SECRET}@bucket/private/chats|1.jsonl", str(folder / "more.jsonl")]},
        "adapter": {"n_layers": 2, "prompt_length": 3},
        "run": {"name": folder.name, "storage": str(folder.parent)},
    }
    write_yaml(folder / "config.yaml", to_dict(load(adapter_train.Config, given)))
    result = {
        "headline": "held-out loss 2.190 → 1.999",
        "adapter": str(folder / "adapter.safetensors"),
        "train_records": 1234,
        "base_val_loss": 2.19,
        "val_loss": 1.999,
    }
    write_json(folder / "result.json", result)
    write_jsonl(folder / "metrics.jsonl", [{"step": 10 * i, "val_loss": 2.19 - i / 100} for i in range(20)])
    write_json(folder / "provenance.json", {"identity": {"data": {"path": [{"records": "a0fb", "format": "alpaca"}]}}})
    write_json(folder / "run.json", {"job": "adapter-train", "state": state, "started": "2026-01-01T00:00:00+00:00"})
    write_json(folder / "hardware.json", {"CPU": "2 × CPU", "GPU": "none"})
    write_json(folder / "versions.json", {"torch": "2.15.0"})
    return folder


def test_the_hub_reads_the_metadata_of_a_base_and_data_that_it_has(tmp_path: Path, tiny_base: Path) -> None:
    data = [f"hf://datasets/org/chats@{COMMIT}/train.jsonl", "hf://datasets/org/chats"]
    folder = make_run(tmp_path / "run", tiny_base, base_path=f"hf://org/tiny@{COMMIT}", data=data)
    card = ModelCard(run_card(folder), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "datasets": ["org/chats"],
        "library_name": "rayjobs",
        "pipeline_tag": "text-generation",
        "tags": ["llama-adapter", "parameter-efficient-fine-tuning"],
    }
    assert "for `org/tiny` at 0123456789ab" in card.text
    assert f'snapshot_download("org/tiny", revision="{COMMIT}")' in card.text
    assert f"base.path=org/tiny@{COMMIT} adapter=adapter.safetensors" in card.text


def test_a_local_base_is_no_metadata(tmp_path: Path, tiny_base: Path) -> None:
    card = ModelCard(run_card(make_run(tmp_path / "run", tiny_base)))
    assert not {"base_model", "datasets", "license"} & set(card.data.to_dict())


def test_the_card_says_what_was_trained_on_what_with_what_result(tmp_path: Path, tiny_base: Path) -> None:
    text = run_card(make_run(tmp_path / "run", tiny_base))
    for line in (
        "| chats\\|1.jsonl | alpaca | a0fb |",
        "| more.jsonl |  |  |",
        "| train records | 1,234 |",
        "| base val loss | 2.19 |",
        "| adapter.prompt_length | 3 |",
        "Result: held-out loss 2.190 → 1.999.",
        "torch 2.15.0.",
        "2 × CPU, 0 s.",
    ):
        assert f"\n{line}\n" in text
    steps = [int(step) for step in re.findall(r"^\| (\d+) \| \d\.\d{4} \|$", text, re.MULTILINE)]
    assert (len(steps), steps[0], steps[-1]) == (10, 0, 190)
    for private in (str(tmp_path), str(tiny_base.parent), SECRET, "bucket", "private"):
        assert private not in text
    assert "None" not in text
    assert not re.search(r"\n{3}", text)


def test_the_commands_of_the_card_run(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", tiny_base)
    text = run_card(folder)
    (python,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (command,) = re.findall(r"```\npython -m rayjobs adapter-generate (.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    (folder / tiny_base.name).symlink_to(tiny_base)
    exec(python, {})
    assert capsys.readouterr().out
    words = re.findall(r'[\w.]+=(?:"[^"]*"|\S+)', command)
    overrides = [word.replace('"', "") for word in words]
    settings = load(adapter_generate.Config, None, overrides)
    assert (settings.base.path, settings.adapter) == (str(folder / tiny_base.name), str(folder / "adapter.safetensors"))
    adapter_generate.check(settings)


def test_a_finished_run_gets_one_card_which_a_person_may_edit(tmp_path: Path, tiny_base: Path) -> None:
    folder = make_run(tmp_path / "run", tiny_base)
    write_card(folder)
    assert (folder / CARD_FILE).read_text(encoding="utf-8") == run_card(folder)
    (folder / CARD_FILE).write_text("mine")
    write_card(folder)
    assert (folder / CARD_FILE).read_text() == "mine"
    (folder / CARD_FILE).unlink()
    (folder / "adapter.safetensors").unlink()
    write_card(folder)
    assert not (folder / CARD_FILE).exists(), "a run that left no adapter has no card"


def test_an_adapter_without_its_run_says_what_the_file_says(tmp_path: Path, tiny_base: Path) -> None:
    path = make_run(tmp_path / "run", tiny_base) / "adapter.safetensors"
    card = ModelCard(adapter_card(path, "mine"))
    assert "3 prompt tokens in each of the top 2 layers" in card.text
    assert card.data.to_dict()["pipeline_tag"] == "text-generation"
    assert not re.search("## (Results|Data|Training|Versions)", card.text)


def test_what_is_published_has_no_folders_and_no_credentials() -> None:
    values = {
        "a": ["/home/me/records.jsonl", "s3://k:p@bucket/x/", f"hf://org/name@{COMMIT}", "words / and more"],
        "b": {"c": 1, "d": None, "e": "https://host/file?token=abc"},
    }
    assert publishable(values) == {
        "a": ["records.jsonl", "x", f"hf://org/name@{COMMIT}", "words / and more"],
        "b": {"c": 1, "d": None, "e": "file?token=***"},
    }
