import pytest
import torch
import torch.nn.functional as F

from adapter import loss
from adapter.loss import IGNORE, summed_cross_entropy
from tests.adapter import reference


def example(dtype=torch.float32):
    """Hidden states (n, C), head (V, C) and targets (n,)."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(43, 13, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(101, 13, generator=generator).to(dtype)
    return rows, weight, torch.randint(101, (43,), generator=generator)


def whole(rows, weight, targets):
    """The same sum by PyTorch."""
    return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_equals_the_cross_entropy_of_whole_logits(monkeypatch, chunk):
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk)
    rows, weight, targets = example()
    ours, theirs = summed_cross_entropy(rows, weight, targets), whole(rows, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (actual,), (expected,) = (torch.autograd.grad(0.37 * value, rows) for value in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_equals_the_equation():
    rows, weight, targets = example()
    logits = torch.cat([(rows @ weight.T).detach(), torch.zeros(1, 101)])  # each predicts the token after it
    expected = reference.cross_entropy(logits, [IGNORE, *targets.tolist()], IGNORE)
    torch.testing.assert_close(summed_cross_entropy(rows, weight, targets).item(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("trainable_head", [False, True])
def test_a_soft_cap_is_in_the_loss_and_in_its_gradient(trainable_head):
    rows, weight, targets = example()
    logits = 2.5 * torch.tanh(F.linear(rows, weight) / 2.5)
    theirs = F.cross_entropy(logits, targets, reduction="sum")
    ours = summed_cross_entropy(rows, weight.clone().requires_grad_(trainable_head), targets, cap=2.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (actual,), (expected,) = (torch.autograd.grad(value, rows) for value in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_trainable_head_gets_its_gradient():
    rows, weight, targets = example()
    weight.requires_grad_()
    ours, theirs = summed_cross_entropy(rows, weight, targets), whole(rows, weight, targets)
    actual, expected = (torch.autograd.grad(value, [rows, weight]) for value in (ours, theirs))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainable_head", [False, True])
def test_without_a_label_the_loss_and_its_gradient_are_zero(trainable_head):
    rows, weight, targets = example()
    weight.requires_grad_(trainable_head)
    value = summed_cross_entropy(rows[:0], weight, targets[:0])
    (grad,) = torch.autograd.grad(value, rows)
    assert value.item() == 0
    assert grad.count_nonzero() == 0


def test_evaluation_needs_no_gradient():
    rows, weight, targets = example()
    with torch.no_grad():
        value = summed_cross_entropy(rows, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, whole(rows, weight, targets).detach(), rtol=1e-6, atol=0)


def test_bf16_states_give_a_float32_loss():
    rows, weight, targets = example(torch.bfloat16)
    ours, theirs = summed_cross_entropy(rows, weight, targets), whole(rows, weight, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (actual,), (expected,) = (torch.autograd.grad(value, rows) for value in (ours, theirs))
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.05)


def test_confident_logits_stay_finite():
    rows, weight, targets = example()
    ours = summed_cross_entropy(1e4 * rows, weight, targets)
    torch.testing.assert_close(ours, whole(1e4 * rows, weight, targets), rtol=1e-6, atol=0)
    assert torch.autograd.grad(ours, rows)[0].isfinite().all()
