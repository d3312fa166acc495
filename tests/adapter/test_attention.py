"""Attention against a loop over heads, tokens and keys in float64: fused, capped, and in 16 bits on a CPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from adapter.attention import attend, soft_cap, visible

B, H, G, T, D = 2, 6, 3, 11, 5


def example(dtype=torch.float32, keys=T):
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, H, T, D), (B, G, keys, D), (B, G, keys, D))
    return tuple(2 * torch.randn(size, generator=generator).to(dtype) for size in sizes)


def loop(q, k, v, sees, scale=None, cap=None):
    """The equation. sees: whether token t of row b may attend to key s."""
    y = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        group = h // (H // G)
        weights = {}
        for s in range(k.shape[2]):
            if sees(b, t, s):
                score = float(q[b, h, t].double() @ k[b, group, s].double()) * (D**-0.5 if scale is None else scale)
                weights[s] = math.exp(score if cap is None else cap * math.tanh(score / cap))
        for s, weight in weights.items():
            y[b, h, t] += weight / sum(weights.values()) * v[b, group, s].double()
    return y


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_equation(dtype, scale, cap):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-5}
    q, k, v = example(dtype, keys=13)
    mask = torch.rand(B, 1, T, 13, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    expected = loop(q, k, v, lambda b, t, s: bool(mask[b, 0, t, s]), scale, cap)
    y = attend(q, k, v, mask, scale=scale, cap=cap)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, **tolerance)
    everything = loop(q, k, v, lambda b, t, s: True, scale, cap)
    torch.testing.assert_close(attend(q, k, v, scale=scale, cap=cap).double(), everything, **tolerance)
    q, k, v = example(dtype)
    causal = loop(q, k, v, lambda b, t, s: s <= t, scale, cap)
    torch.testing.assert_close(attend(q, k, v, causal=True, scale=scale, cap=cap).double(), causal, **tolerance)


@pytest.mark.parametrize("sizes", [(3, 6, 3, 3, 6), (6, 6, 3, 5, 7), (2, 6, 6, 5, 7)])
def test_heads_are_grouped_whatever_other_sizes_equal_their_number(sizes):
    rows, heads, groups, length, keys = sizes
    q, k, v = torch.randn(rows, heads, length, D), *torch.randn(2, rows, groups, keys, D)
    whole = [x.repeat_interleave(heads // groups, dim=1) for x in (k, v)]
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, *whole))


def test_an_added_mask_is_added_to_the_scores():
    q, k, v = example()
    sees = torch.ones(T, T, dtype=torch.bool).tril()
    added = torch.zeros(T, T).masked_fill(~sees, -torch.inf)
    torch.testing.assert_close(attend(q, k, v, added), attend(q, k, v, sees))


@pytest.mark.parametrize("settings", [{"causal": True}, {"causal": True, "scale": 0.3, "cap": 1.5}, {"mask": True}])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_in_16_bits_on_a_cpu_the_gradient_is_that_of_float32_rounded_once(settings, trained):
    settings = dict(settings)
    if settings.pop("mask", False):
        settings["mask"] = torch.ones(T, T, dtype=torch.bool).tril(1)
    inputs = [x.requires_grad_(i in trained) for i, x in enumerate(example(torch.bfloat16))]
    exact = [x.detach().float().requires_grad_(i in trained) for i, x in enumerate(inputs)]
    upstream = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = attend(*inputs, **settings)
    with torch.no_grad():
        assert torch.equal(y, attend(*inputs, **settings))
    actual = torch.autograd.grad(y, [inputs[i] for i in trained], upstream)
    expected = torch.autograd.grad(attend(*exact, **settings), [exact[i] for i in trained], upstream.float())
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other.bfloat16())


def test_a_token_sees_itself_and_those_before_it_in_its_window():
    positions = torch.tensor([[3, 0], [5, 1]])
    for window, sees in ((None, lambda p, s: s <= p), (2, lambda p, s: p - 2 < s <= p), (1, lambda p, s: s == p)):
        expected = [[[[sees(p, s) for s in range(6)] for p in row]] for row in positions.tolist()]
        assert visible(positions, 6, window).tolist() == expected


def test_a_soft_cap_bounds_smoothly():
    x = torch.linspace(-30, 30, 13, dtype=torch.float64)
    expected = [3 * math.tanh(value / 3) for value in x.tolist()]
    assert soft_cap(x, 3).tolist() == pytest.approx(expected, rel=1e-12)
