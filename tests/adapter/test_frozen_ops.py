"""Operations with a gradient in closed form: the values of the plain ones to the bit, and autograd's gradient."""

import pytest
import torch
import torch.nn.functional as F

from adapter.attention import attend
from adapter.frozen_ops import frozen_rms_norm, gated_silu
from adapter.rope import apply_rope


def plain_norm(x, weight):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def plain_rope(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def compare(ours, plain, trained, fixed=()):
    copies = [[x.clone().requires_grad_() for x in trained] for _ in range(2)]
    actual, expected = (run(*copy, *fixed) for run, copy in zip((ours, plain), copies, strict=True))
    assert torch.equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(ours(*trained, *fixed), expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    grads = [torch.autograd.grad(y, copy, upstream) for y, copy in zip((actual, expected), copies, strict=True)]
    rtol, atol = (1e-5, 1e-6) if expected.dtype == torch.float32 else (2e-2, 1e-2)
    torch.testing.assert_close(*grads, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_the_plain_operations(dtype):
    torch.manual_seed(0)
    x, y, weight = torch.randn(13, 37).to(dtype), torch.randn(13, 37).to(dtype), torch.randn(37).to(dtype)
    compare(gated_silu, lambda gate, up: F.silu(gate) * up, [x, y])
    compare(lambda x, w: frozen_rms_norm(x, w, 1e-5), plain_norm, [x], [weight])
    angles = torch.randn(7, 1, 6).repeat(1, 1, 2)
    compare(apply_rope, plain_rope, [torch.randn(7, 5, 12).to(dtype)], [angles.cos().to(dtype), angles.sin().to(dtype)])


def test_the_gradient_of_16_bit_attention_on_a_cpu_is_computed_in_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 11, 8).bfloat16().requires_grad_() for heads in (4, 2, 2))
    y = attend(q, k, v, causal=True)
    exact = attend(q.double(), k.double(), v.double(), causal=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2**-9)
    grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out in (y, exact)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-2)
