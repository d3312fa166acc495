import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from adapter.adaption import AdaptionConfig
from adapter.decoder import Decoder, RMSNorm
from adapter.decoder_config import DecoderConfig
from adapter.loss import IGNORE
from adapter.rope import Llama3Scaling, apply_rope, rope_angles
from tests.adapter import reference
from tests.adapter.models import GQA, MHA, llama, peer, peer_name, tokens

SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=64)
"""With 14 or 10 coordinates a head and theta 10,000, some wavelengths lie below, within and above the blend."""

SHAPES = {
    "mha": MHA,
    "gqa": GQA,
    "mqa": {**GQA, "n_kv_heads": 1},
    "theta 100": {**MHA, "rope_theta": 100.0},
    "theta 500,000": {**GQA, "rope_theta": 500_000.0},
    "llama3 rope": {**MHA, "rope_scaling": SCALING},
    "llama3 rope, gqa": {**GQA, "rope_scaling": SCALING, "rope_theta": 500_000.0},
    "tied": {**GQA, "tied_head": True},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@shapes
@torch.no_grad()
def test_logits_equal_transformers(shape):
    model, ids = llama(shape), tokens(3, 43)
    close(model(ids), peer(model)(ids).logits, atol=1e-4)


@shapes
@torch.no_grad()
def test_logits_equal_the_equations(shape):
    model, ids = llama({**shape, "n_layers": 2}), tokens(1, 7)
    expected = reference.decoder(model.state_dict(), model.config, ids[0].tolist())
    close(model(ids)[0].double(), expected, atol=1e-4)


@shapes
@torch.no_grad()
def test_bf16_logits_are_near_transformers(shape):
    model, ids = llama(shape), tokens(2, 31)
    exact = model(ids)
    model.bfloat16()
    ours, theirs = model(ids), peer(model).bfloat16()(ids).logits
    assert ours.dtype == torch.bfloat16
    # Both round after every operation, eight bits each time: ours may not be much further from the truth.
    ours_off, theirs_off = (ours.float() - exact).abs().max(), (theirs.float() - exact).abs().max()
    assert ours_off < 2 * theirs_off
    close(ours.float(), theirs.float(), atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_equation_and_is_taken_in_float32(dtype):
    ours, theirs = RMSNorm(97, eps=1e-5), LlamaRMSNorm(97, eps=1e-5)
    ours.weight.data = torch.randn(97)
    theirs.load_state_dict(ours.state_dict())
    x = 300 * torch.randn(5, 97)
    expected = torch.stack([reference.rms_norm(row.double(), ours.weight.data.double(), 1e-5) for row in x])
    close(ours(x).double(), expected, atol=1e-5)
    # In bfloat16 squares taken in the input's type would be off in the third digit; both must round alike.
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6)


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
def test_rope_rotates_halves_by_the_position(scaling):
    config = DecoderConfig(**{**MHA, "rope_scaling": scaling})
    x, positions = torch.randn(2, 3, 5, 14), torch.tensor([0, 1, 7, 29, 2000])
    cos, sin = rope_angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)
    rotated = apply_rope(x, cos, sin)
    for b, h, t in itertools.product(range(2), range(3), range(5)):
        expected = reference.rope_halves(x[b, h, t].double(), int(positions[t]), config)
        close(rotated[b, h, t].double(), expected, atol=5e-4)


def test_both_rope_conventions_give_the_same_scores():
    """Meta's rotation of adjacent pairs is ours after moving the even coordinates before the odd ones."""
    config, q, k = DecoderConfig(**MHA), torch.randn(14).double(), torch.randn(14).double()
    order = [*range(0, 14, 2), *range(1, 14, 2)]
    adjacent = reference.rope_adjacent(q, 11, config) @ reference.rope_adjacent(k, 5, config)
    halves = reference.rope_halves(q[order], 11, config) @ reference.rope_halves(k[order], 5, config)
    close(halves, adjacent, atol=1e-12)


@pytest.mark.parametrize("shape", [MHA, GQA, {**GQA, "tied_head": True}], ids=["mha", "gqa", "tied"])
def test_a_bare_base_trains_as_transformers_does(shape):
    model, ids = llama(shape), tokens(2, 13)
    theirs = peer(model)
    model(ids, ids).backward()
    logits = theirs(ids).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[peer_name(name)].grad, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_follows_a_token_does_not_reach_it():
    model, ids = llama(GQA), tokens(2, 19)
    other = ids.clone()
    other[:, 11:] = (other[:, 11:] + 1) % 101
    close(model(other)[:, :11], model(ids)[:, :11], atol=0)
    assert not torch.equal(model(other)[:, 11], model(ids)[:, 11])


def test_right_padding_does_not_change_the_loss_or_its_gradient():
    model, ids = llama(GQA, AdaptionConfig(n_layers=3, prompt_length=7)), tokens(2, 23)
    labels = ids.clone()
    labels[:, :5] = IGNORE
    labels[0, 17:] = IGNORE
    plain = model(ids, labels)
    expected = torch.autograd.grad(plain, [p for a in model.adaptions for p in a.parameters()])
    ids[0, 17:] = 0  # as padding would be
    padded = model(F.pad(ids, (0, 18)), F.pad(labels, (0, 18), value=IGNORE))
    actual = torch.autograd.grad(padded, [p for a in model.adaptions for p in a.parameters()])
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_gives_equal_gradients():
    model, ids = llama(GQA, AdaptionConfig(n_layers=3, prompt_length=7)), tokens(2, 23)
    parameters = [p for a in model.adaptions for p in a.parameters()]
    expected = torch.autograd.grad(model(ids, ids), parameters)
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.checkpoint_activations = True
    actual = torch.autograd.grad(model(ids, ids), parameters)
    assert len(calls) == 5 + 3, "three adapted layers run again in the backward pass, the two below them do not"
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_layers_below_the_first_adapted_one_run_without_autograd():
    model = llama(MHA, AdaptionConfig(n_layers=3, prompt_length=7))
    tracked = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: tracked.append(out.requires_grad))
    model(tokens(1, 5))
    assert tracked == [False, False, True, True, True]
    assert torch.is_grad_enabled()


def test_a_tied_head_is_one_parameter_even_after_it_was_replaced():
    model = llama({**MHA, "tied_head": True})
    assert model.output.weight is model.tok_embeddings.weight
    model.tok_embeddings.weight = torch.nn.Parameter(torch.randn(101, 42))
    model.tie()
    assert model.output.weight is model.tok_embeddings.weight
    assert llama(MHA).output.weight is not llama(MHA).tok_embeddings.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 43}, "dim 43 must divide into 3 heads of even width"),
        ({"dim": 45}, "dim 45 must divide into 3 heads of even width"),
        ({"n_kv_heads": 2}, "3 query heads cannot share 2 key/value heads evenly"),
    ],
)
def test_an_impossible_shape_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**MHA, **change})


def test_more_adapted_layers_than_layers_is_an_error():
    with pytest.raises(ValueError, match=r"wants 6 adapted layers, the base has 5: set n_layers to at most 5"):
        Decoder(DecoderConfig(**MHA)).add_adapter(AdaptionConfig(n_layers=6))
