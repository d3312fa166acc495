"""Adapter methods through the jobs: what is refused, what is planned, and runs from training to export."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapter import AdaptedModel
from adapter.adapter_formats import read_adapter
from adapter.base.binding import meta_decoder
from adapter.errors import AdapterError
from adapter.methods.registry import METHODS
from rayjobs.__main__ import main
from rayjobs.config import load
from rayjobs.jobs import adapter_eval, adapter_train
from rayjobs.reporting.model_card import CARD_FILE
from rayjobs.storage.files import read_json
from tests.rayjobs.jobs.test_adapter_train import settings

WORDS = {
    "lora": ["adapter.method=lora", "adapter.rank=3", "adapter.targets=[wq,wv,w2]"],
    "v2": ["adapter.method=v2"],
    "full": ["adapter.method=full"],
}


@pytest.mark.parametrize(("words", "message"), [
    (["adapter.method=full", "base.dtype=bf16"], "full fine-tuning needs a base in fp32, this one is held in bf16"),
    (["adapter.method=full", "base.dtype=int8"], "full fine-tuning needs a base in fp32"),
    (["adapter.method=v2", "adapter.n_layers=4"], r"adapter\.n_layers is 4, but .* has 3 layers"),
])  # fmt: skip
def test_what_a_method_cannot_do_is_refused_before_it_starts(
    words: list[str], message: str, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    given = settings(tiny_base, records, tmp_path, "r", *words)
    with pytest.raises(ValueError, match=message):
        adapter_train.check(given)


def test_the_prompts_learning_rate_is_doubted_for_other_methods(
    tiny_base: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for words, told in (
        (
            ["adapter.method=full", "optimizer.base_lr=9e-3"],
            "the default, which is for prompts; published .* about 4e-05",
        ),
        (["adapter.method=full", "optimizer.base_lr=1e-3"], None),
        (["optimizer.base_lr=9e-3"], None),
    ):
        caplog.clear()
        adapter_train.check(settings(tiny_base, records, tmp_path, "r", *words))
        assert bool(re.search(told or "base_lr", caplog.text)) == (told is not None)


def test_a_method_without_prompts_reads_no_images(
    tiny_base: Path, pictured: Path, tmp_path: Path, vision: list[str]
) -> None:
    given = settings(tiny_base, pictured, tmp_path, "r", "adapter.method=lora", *vision)
    with pytest.raises(AdapterError, match="the method lora reads no images: leave out vision"):
        adapter_train.check(given)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "v2", "full"])
def test_the_plan_tells_the_adapter_and_its_cost(
    method: str, tiny_base: Path, records: Path, tmp_path: Path, terminal: pytest.CaptureFixture[str]
) -> None:
    given = settings(tiny_base, records, tmp_path, "r", *WORDS[method])
    adapter_train.plan(given)
    shown = " ".join(terminal.readouterr().out.split())
    described = {
        "lora": "rank 3 on wq, wv, w2: lora in",
        "v2": "scales, biases and norms in all",
        "full": "all weights",
    }
    assert described[method] in shown
    model = AdaptedModel.from_pretrained(tiny_base)
    model.add_adapter(adapter_train.build_adapter(given, adapter_train.open_inputs(given)))
    count = sum(one.numel() for one in model.model.parameters() if one.requires_grad)
    assert f"trainable parameters {count:,}" in shown
    assert "memory of a worker about" in shown


@pytest.mark.parametrize("method", METHODS)
def test_the_file_holds_what_was_trained_and_no_moments(
    method: str, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    given = settings(tiny_base, records, tmp_path, "r", f"adapter.method={method}")
    inputs = adapter_train.open_inputs(given)
    model = meta_decoder(inputs.checkpoint.config, adapter_train.build_adapter(given, inputs))
    trained = {name: torch.randn(one.shape) for name, one in model.adapter_parameters() if one.requires_grad}
    state = {f"{name}{end}": one + len(end) for name, one in trained.items() for end in ("", ".exp_avg", ".exp_avg_sq")}
    job: Any = SimpleNamespace(adapter=model.adapter, dtype="fp32")
    file = adapter_train.adapter_file(given, job, {**state, "optimizer.step": torch.zeros(())}, inputs)
    saved = file.config.unpack(file.tensors, inputs.checkpoint.config)
    fixed = {name for name in saved if name.endswith(".gate") and method in ("rand_init", "prefix")}
    assert trained.keys() == saved.keys() - fixed
    assert all(torch.equal(saved[name], one) for name, one in trained.items())
    assert all((saved[name] == 1).all() for name in fixed)


@pytest.mark.ray
@pytest.mark.parametrize("method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v2", "full"))])
def test_a_run_is_evaluated_told_and_exported(
    cluster: None, method: str, tiny_base: Path, records: Path, tmp_path: Path
) -> None:
    rates = ["optimizer.base_lr=0.1"]
    config = settings(tiny_base, records, tmp_path, "one", *WORDS[method], *rates)
    result = adapter_train.run(config)
    assert result["val_loss"] < result["base_val_loss"]
    file = read_adapter(result["adapter"])
    assert (file.config.method, file.trainable) == (method, result["trainable_parameters"])
    card = (config.run.folder / CARD_FILE).read_text()
    assert ("fully fine-tuned" if method == "full" else file.config.describe()) in card
    source = [f"base.path={tiny_base}", f"adapter={result['adapter']}", "split=val"]
    told = adapter_eval.run(load(adapter_eval.Config, None, [*source, f"run.storage={tmp_path}", "run.name=eval"]))
    assert told["loss"] == pytest.approx(result["val_loss"], rel=1e-4)
    words = [f"base.path={tiny_base}", f"adapter={result['adapter']}", "format=peft", f"run.storage={tmp_path}"]
    assert main(["adapter-export", *words, "run.name=as_peft"]) == (0 if method == "lora" else 2)
    if method == "lora":
        exported = read_adapter(read_json(tmp_path / "as_peft" / "result.json")["out"])
        assert all(torch.equal(exported.tensors[name], file.tensors[name]) for name in file.tensors)
        return
    again = settings(tiny_base, records, tmp_path, "two", *WORDS[method], *rates, "zero.stage=3", "scale.workers=1")
    assert adapter_train.run(again)["val_loss"] == pytest.approx(result["val_loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.ray
def test_v2_trains_on_records_of_both_kinds_in_one_run(
    cluster: None, tiny_base: Path, pictured: Path, vision: list[str], tmp_path: Path
) -> None:
    """Two workers, of which each has micro-batches of both kinds; evaluation reads the images as training did."""
    words = ["adapter.method=v2", "optimizer.base_lr=0.3", "zero.stage=3", *vision]
    result = adapter_train.run(settings(tiny_base, pictured, tmp_path, "two", *words))
    assert result["val_loss"] < result["base_val_loss"]
    tensors = read_adapter(result["adapter"]).tensors
    gates = [f"layers.{i}.attention.adaption.gate" for i in range(3)]
    assert all(tensors[name].all() for name in [*gates, "vision.down.bias", "layers.0.attention.wq.delta.d"])
    source = [f"base.path={tiny_base}", f"adapter={result['adapter']}", "split=val", *vision]
    told = adapter_eval.run(load(adapter_eval.Config, None, [*source, f"run.storage={tmp_path}", "run.name=eval"]))
    assert told["loss"] == pytest.approx(result["val_loss"], rel=1e-4)
