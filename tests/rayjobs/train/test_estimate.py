"""The estimate of a run's cost, against what training a decoder of all layers takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from adapter.methods.base import AdapterMethod
from adapter.methods.full import FullConfig
from adapter.methods.lora import LoraConfig
from adapter.methods.v2 import V2Config
from adapter.records.example import Example
from rayjobs.__main__ import main
from rayjobs.train import estimate as module
from rayjobs.train.estimate import BYTES_PER_TRAINABLE, TrainingPlan, estimate

SHAPE = DecoderConfig(
    dim=48, n_layers=7, n_heads=4, n_kv_heads=2, hidden_dim=112, vocab_size=331, max_seq_len=128, norm_eps=1e-6
)
PLAN = TrainingPlan(
    shape=SHAPE,
    adapter=AdaptionConfig(n_layers=5, prompt_length=3),
    dtype="fp32",
    token_budget=64,
    global_batch=4,
    workers=1,
    zero_stage=0,
    threads=1,
    checkpoint_activations=False,
)
EXAMPLES = [Example(ids=list(range(1, 17)), label_spans=[(8, 16)])]


@pytest.fixture
def cost_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is what a clock would show that counts 3 for each adapted layer, 1 for a frozen one, and 10 besides."""

    def time_probes(plan, probes, tokens, labels, device):
        times = {}
        for name, (model, adapted) in probes.items():
            times[name] = tokens.numel() * (10.0 + 3 * adapted + len(model.layers) - adapted)
            times["forward one" if name == "one" else "forward several"] = tokens.numel() * (5.0 + len(model.layers))
        return times

    monkeypatch.setattr(module, "_time_probes", time_probes)


@pytest.mark.usefixtures("cost_of_layers")
def test_time_is_added_up_over_the_layers_and_tokens() -> None:
    cost = estimate(PLAN, EXAMPLES, "cpu")
    assert cost.step_s == pytest.approx(4 * 15 * (10 + 3 * 5 + 2))
    assert cost.validation_s_per_token == pytest.approx(5 + 7)
    assert estimate(replace(PLAN, workers=2), EXAMPLES, "cpu").step_s == pytest.approx(cost.step_s / 2)


@pytest.mark.usefixtures("cost_of_layers")
@pytest.mark.parametrize(("adapter", "recompute"), [
    (PLAN.adapter, False), (PLAN.adapter, True), (LoraConfig(), False), (V2Config(n_layers=7), True),
    (FullConfig(), False),
], ids=str)  # fmt: skip
def test_activations_are_those_that_all_layers_save(
    adapter: AdapterMethod, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with recomputed layers, and with the width of the probe that a first pass would find too slow."""
    plan = replace(PLAN, adapter=adapter, checkpoint_activations=recompute)
    monkeypatch.setattr(module, "LOGIT_COPIES", 0)
    cost = estimate(plan, EXAMPLES, "cpu")
    model = Decoder(SHAPE)
    model.add_adapter(plan.adapter, torch.Generator().manual_seed(0))
    model.checkpoint_activations = recompute
    tokens = torch.randint(331, (4, 16))
    labels = tokens.clone()
    labels[:, :8] = -100
    saved = module._saved_bytes(model, tokens, labels)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert cost.training_bytes - trainable * BYTES_PER_TRAINABLE == pytest.approx(saved, rel=0.05)
    assert cost.base_bytes == 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dim() > 0)


def test_a_step_is_divided_as_training_divides_it() -> None:
    examples = [Example(ids=[length] * length, label_spans=[(1, length)]) for length in (5, 11, 23, 40)]
    step = module._mean_step(replace(PLAN, workers=2), examples, draws=64)
    assert step.tokens == pytest.approx((4 + 10 + 22 + 39) / 2, rel=0.2)  # the last token of a record is not computed
    assert 1 <= step.rows <= 4
    assert 4 <= step.width <= 39
    assert 0 < step.labelled <= 1


def test_a_prefix_that_records_share_is_computed_once() -> None:
    examples = [Example(ids=[1] * 9 + [number] * 3, label_spans=[(9, 12)]) for number in range(2, 12)]
    step = module._mean_step(replace(PLAN, global_batch=5, token_budget=60), examples, draws=64)
    assert step.rows == 5
    assert 9 + 5 * 2 <= step.tokens < 9 + 5 * 2 + 9  # some records are drawn twice, and then share nothing


def test_times_grow_with_the_base_and_none_is_negative() -> None:
    small, large = (estimate(replace(PLAN, shape=replace(SHAPE, dim=dim)), EXAMPLES, "cpu") for dim in (16, 512))
    assert 0 < small.step_s < large.step_s
    assert small.worker_bytes < large.worker_bytes


def test_a_dry_run_needs_no_weights(
    tiny_base: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    words = [f"base.path={base}", f"data.path={records}", "adapter.n_layers=2", "run.name=r", f"run.storage={tmp_path}"]
    assert main(["adapter-train", *words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "missing: only the shape is known" in out
    assert "memory of a worker" in out
    assert "time of the steps" in out
    assert main(["adapter-train", *words]) == 2
