"""A base in 8 or 4 bits through the jobs: what is refused, what is shown, and one run from training to evaluation."""

import logging
import sys
from pathlib import Path

import pytest

from adapter.adapter_formats import read_adapter
from adapter.errors import AdapterError
from rayjobs.config import load
from rayjobs.errors import ConfigError
from rayjobs.inference.adapter_source import AdapterSourceConfig
from rayjobs.jobs import adapter_eval, adapter_train
from tests.rayjobs.jobs.test_adapter_train import settings

pytest.importorskip("bitsandbytes")


def test_what_a_quantized_base_cannot_do_is_refused_before_it_starts(
    tiny_base: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_train.check(settings(tiny_base, records, tmp_path, "r", "base.dtype=nf4", "zero.stage=2"))
    with pytest.raises(ConfigError, match=r"zero\.stage is 3.*base\.dtype is int8.*to at most 2"):
        adapter_train.check(settings(tiny_base, records, tmp_path, "r", "base.dtype=int8", "zero.stage=3"))
    with pytest.raises(ConfigError, match=r"base\.dtype"):
        settings(tiny_base, records, tmp_path, "r", "base.dtype=int4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(AdapterError, match=r"pip install 'rayjobs\[quantization\]'"):
        adapter_train.check(settings(tiny_base, records, tmp_path, "r", "base.dtype=nf4"))


def test_the_plan_shows_what_each_precision_would_take(
    tiny_base: Path, records: Path, tmp_path: Path, terminal: pytest.CaptureFixture[str]
) -> None:
    adapter_train.plan(settings(tiny_base, records, tmp_path, "r", "base.dtype=bf16"))
    shown = " ".join(terminal.readouterr().out.split())
    assert "memory of the base 75.5 kB in fp32, 37.7 kB in bf16" in shown
    assert "kB in int8" in shown
    assert "kB in nf4" in shown


@pytest.mark.ray
@pytest.mark.slow
def test_an_adapter_trained_on_nf4_is_evaluated_on_another_precision(
    cluster: None, tiny_base: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for name in ("once", "again"):
        config = settings(tiny_base, records, tmp_path, name, "base.dtype=nf4", "train.seed=3")
        results.append(adapter_train.run(config))
    first, second = (read_adapter(result["adapter"]) for result in results)
    assert first.prompt.equal(second.prompt), "the same settings train the same adapter"
    assert first.gate.abs().min() > 0
    assert first.base_dtype == "nf4"
    assert results[0]["val_loss"] < results[0]["base_val_loss"]

    losses = {}
    for dtype in ("nf4", "fp32"):
        source = [f"base.path={tiny_base}", f"base.dtype={dtype}", f"adapter={results[0]['adapter']}"]
        source_of_run = [*source, "split=val", f"run.storage={tmp_path}", f"run.name=eval-{dtype}"]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load(AdapterSourceConfig, None, source).open()
        assert ("trained on a base in nf4, run on one in fp32" in caplog.text) == (dtype == "fp32")
        losses[dtype] = adapter_eval.run(load(adapter_eval.Config, None, source_of_run))["loss"]
    assert losses["nf4"] == pytest.approx(results[0]["val_loss"], rel=1e-4)
    assert losses["nf4"] != losses["fp32"]
    assert losses["nf4"] == pytest.approx(losses["fp32"], rel=0.1)
