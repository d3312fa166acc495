import pytest
import torch
import torch.nn.functional as F

from adapter import loss
from adapter.loss import IGNORE, labelled_cross_entropy
from tests.adapter import reference


def example(dtype=torch.float32):
    """hidden (B, T, C), head (V, C), labels (B, T) of which about a half are ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 29, 13, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(101, 13, generator=generator).to(dtype)
    labels = torch.randint(101, (3, 29), generator=generator)
    labels[torch.rand(3, 29, generator=generator) < 0.5] = IGNORE
    return hidden, weight, labels


def whole(hidden, weight, labels):
    """The same sum from the logits of all positions."""
    logits = F.linear(hidden, weight)[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_equals_the_cross_entropy_of_whole_logits(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk)
    hidden, weight, labels = example()
    ours, theirs = labelled_cross_entropy(hidden, weight, labels), whole(hidden, weight, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (actual,), (expected,) = (torch.autograd.grad(0.37 * value, hidden) for value in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_equals_the_equation():
    hidden, weight, labels = example()
    logits = (hidden @ weight.T).detach()
    expected = sum(reference.cross_entropy(logits[b], labels[b].tolist(), IGNORE) for b in range(3))
    torch.testing.assert_close(labelled_cross_entropy(hidden, weight, labels).item(), expected, rtol=1e-6, atol=0)


def test_a_trainable_head_gets_its_gradient():
    hidden, weight, labels = example()
    weight.requires_grad_()
    ours, theirs = labelled_cross_entropy(hidden, weight, labels), whole(hidden, weight, labels)
    actual, expected = (torch.autograd.grad(value, [hidden, weight]) for value in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainable_head", [False, True])
def test_without_a_label_the_loss_and_its_gradient_are_zero(trainable_head):
    hidden, weight, labels = example()
    weight.requires_grad_(trainable_head)
    labels[:, 1:] = IGNORE  # the first token is predicted by nothing: its label counts for nothing
    value = labelled_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(value, hidden)
    assert value.item() == 0
    assert grad.count_nonzero() == 0


def test_evaluation_needs_no_gradient():
    hidden, weight, labels = example()
    with torch.no_grad():
        value = labelled_cross_entropy(hidden, weight, labels)
    assert not value.requires_grad
    torch.testing.assert_close(value, whole(hidden, weight, labels).detach(), rtol=1e-6, atol=0)


def test_bf16_states_give_a_float32_loss():
    hidden, weight, labels = example(torch.bfloat16)
    ours, theirs = labelled_cross_entropy(hidden, weight, labels), whole(hidden, weight, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (actual,), (expected,) = (torch.autograd.grad(value, hidden) for value in (ours, theirs))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05)


def test_confident_logits_stay_finite():
    hidden, weight, labels = example()
    ours = labelled_cross_entropy(1e4 * hidden, weight, labels)
    torch.testing.assert_close(ours, whole(1e4 * hidden, weight, labels), rtol=1e-6, atol=0)
    assert torch.autograd.grad(ours, hidden)[0].isfinite().all()
