import math

import pytest
import torch
from peft import AdaptionPromptConfig, get_peft_model

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder
from adapter.decoder_config import DecoderConfig
from tests.adapter import reference
from tests.adapter.models import GQA, MHA, llama, peer, tokens

shapes = pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])
gates = pytest.mark.parametrize("gate", ["tanh", "identity"])


def adapted(shape, gate="tanh", n_layers=3) -> Decoder:
    """A random base with a fresh adapter."""
    model = llama(shape)
    model.add_adapter(AdaptionConfig(n_layers=n_layers, prompt_length=7, gate=gate), torch.Generator().manual_seed(1))
    return model


@shapes
@gates
def test_a_fresh_adapter_changes_no_bit_and_one_step_does(shape, gate):
    model, ids = llama(shape), tokens(2, 29)
    with torch.no_grad():
        base = model(ids)
    model.add_adapter(AdaptionConfig(n_layers=3, prompt_length=7, gate=gate))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), base, rtol=0, atol=0)
    model(ids, ids).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    with torch.no_grad():
        assert (model(ids) - base).abs().max() > 1e-2


@shapes
@gates
@torch.no_grad()
def test_adapted_logits_equal_the_equations(shape, gate):
    config = AdaptionConfig(n_layers=1, prompt_length=7, gate=gate)
    model, ids = llama({**shape, "n_layers": 2}, config), tokens(1, 5)
    expected = reference.decoder(model.state_dict(), model.config, ids[0].tolist(), config)
    torch.testing.assert_close(model(ids)[0].double(), expected, rtol=0, atol=1e-4)
    plain = reference.decoder(model.state_dict(), model.config, ids[0].tolist())
    assert (expected - plain).abs().max() > 0.1, "the adapter should matter here"


def test_the_two_gates_differ_by_the_tanh():
    squashed = llama(MHA, AdaptionConfig(n_layers=3, prompt_length=7))
    plain = llama(MHA, AdaptionConfig(n_layers=3, prompt_length=7, gate="identity"))
    ids = tokens(2, 11)
    with torch.no_grad():
        assert not torch.allclose(squashed(ids), plain(ids))
        for adaption in plain.adaptions:
            adaption.gate.tanh_()
        torch.testing.assert_close(squashed(ids), plain(ids), rtol=0, atol=1e-6)


@shapes
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks transformers
@torch.no_grad()
def test_the_gated_term_equals_peft(shape):
    model, ids = llama(shape, AdaptionConfig(n_layers=3, prompt_length=7, gate="identity")), tokens(2, 31)
    theirs = get_peft_model(
        peer(model), AdaptionPromptConfig(adapter_layers=3, adapter_len=7, task_type="CAUSAL_LM")
    ).eval()
    wrapped = [m for m in theirs.modules() if hasattr(m, "adaption_prompt")]
    assert len(wrapped) == 3
    for ours, layer in zip(model.adaptions, wrapped, strict=True):
        ours.gate.fill_(ours.gate[0])  # PEFT's layers have one gate for all heads
        layer.adaption_prompt.copy_(ours.prompt[None])
        layer.adaption_gate.copy_(ours.gate[:1])
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_the_first_step_moves_gates_only():
    model, ids = adapted(GQA), tokens(2, 13)
    model(ids, ids).backward()
    for adaption in model.adaptions:
        assert adaption.prompt.grad.count_nonzero() == 0
        assert adaption.gate.grad.count_nonzero() == 6


@shapes
@gates
def test_three_steps_reach_every_prompt_and_gate_and_nothing_else(shape, gate):
    model = adapted(shape, gate)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        ids = tokens(2, 13, seed=step)
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if "adaption" in name:
            assert (parameter != before[name]).all(), name  # every element, so every token and every head
        else:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
            torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)


def test_exactly_these_parameters_are_trainable():
    trainable = {name: tuple(p.shape) for name, p in adapted(GQA).named_parameters() if p.requires_grad}
    assert trainable == {
        "layers.2.attention.adaption.prompt": (7, 60),
        "layers.2.attention.adaption.gate": (6,),
        "layers.3.attention.adaption.prompt": (7, 60),
        "layers.3.attention.adaption.gate": (6,),
        "layers.4.attention.adaption.prompt": (7, 60),
        "layers.4.attention.adaption.gate": (6,),
    }


def test_the_7b_adapter_has_1_229_760_parameters():
    with torch.device("meta"):
        model = Decoder(
            DecoderConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32_000)
        )
        model.add_adapter(AdaptionConfig(n_layers=30, prompt_length=10))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616 + 1_229_760
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_229_760


def test_prompts_are_standard_normal_and_gates_zero():
    model = llama({**MHA, "dim": 606})
    model.add_adapter(AdaptionConfig(n_layers=3, prompt_length=11), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for adaption in model.adaptions:
        assert torch.equal(adaption.prompt, torch.empty(11, 606).normal_(generator=generator))
        assert torch.equal(adaption.gate, torch.zeros(3))
        assert math.isclose(adaption.prompt.std().item(), 1, abs_tol=0.05)


def test_attaching_again_replaces_the_adapter():
    model = adapted(MHA)
    model.add_adapter(AdaptionConfig(n_layers=1, prompt_length=2, gate="identity"))
    assert [name for name, p in model.named_parameters() if "adaption" in name] == [
        "layers.4.attention.adaption.prompt",
        "layers.4.attention.adaption.gate",
    ]
    assert model.first_adapted == 4
    assert [tuple(a.prompt.shape) for a in model.adaptions] == [(2, 42)]


def test_a_float32_adapter_trains_on_a_bf16_base():
    model = adapted(GQA)
    for name, parameter in model.named_parameters():
        if "adaption" not in name:
            parameter.data = parameter.data.bfloat16()
    ids = tokens(2, 13)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(ids, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model(ids).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert all(a.prompt.dtype == a.prompt.grad.dtype == torch.float32 for a in model.adaptions)
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers": 0}, "n_layers >= 1"),
        ({"prompt_length": 0}, "prompt_length >= 1"),
        ({"gate": "sigmoid"}, "gate must be one of .*, got 'sigmoid'"),
    ],
)
def test_an_impossible_adapter_is_an_error(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptionConfig(**settings)
