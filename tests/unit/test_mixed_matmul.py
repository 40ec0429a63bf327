"""Products of bfloat16 operands keep float32 sums: against float64, values and gradients; float32 is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_megatron.mixed_matmul import linear, product

BF16 = torch.bfloat16
# Half of bfloat16's spacing.
STEP = 2.0**-8
sizes = st.tuples(st.integers(0, 7), st.integers(1, 40), st.integers(1, 20), st.integers(0, 10**6))


def operands(rows: int, columns: int, units: int, seed: int) -> list[torch.Tensor]:
    """x [2, rows, columns], W [units, columns], b [units], and a slope [2, rows, units], float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, rows, columns), (units, columns), (units,), (2, rows, units)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(x, weight, bias, slope, function):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, slope)


@settings(deadline=None)
@given(sizes)
def test_sums_of_rounded_operands_are_exact_to_float32(size):
    x, weight, bias, slope = operands(*size)
    exact = F.linear(x.to(BF16).double(), weight.to(BF16).double(), bias.double())
    value, (dx, dw, db) = gradients(x, weight, bias, slope, lambda *a: linear(*a, BF16))
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-5)
    assert {t.dtype for t in (value, dx, dw, db)} == {torch.float32}


@settings(deadline=None)
@given(sizes)
def test_gradients_of_the_master_are_those_of_float64_up_to_the_operands_rounding(size):
    tensors = operands(*size)
    x, weight, _, slope = tensors
    _, (dx, dw, db) = gradients(*tensors, lambda *a: linear(*a, BF16))
    _, (ex, ew, eb) = gradients(*(t.double() for t in tensors), F.linear)
    # Two factors are rounded, each by at most STEP of itself.
    bound_x = 2.01 * STEP * slope.abs() @ weight.abs() + 1e-6
    bound_w = 2.01 * STEP * torch.einsum("tnu,tni->ui", slope.abs(), x.abs()) + 1e-6
    assert bool(((dx - ex).abs() <= bound_x).all()) and bool(((dw - ew).abs() <= bound_w).all())
    torch.testing.assert_close(db.double(), eb, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(sizes)
def test_float32_is_what_pytorch_computes_to_the_bit(size):
    tensors = operands(*size)
    value, found = gradients(*tensors, lambda *a: linear(*a, torch.float32))
    expected, slopes = gradients(*tensors, F.linear)
    assert torch.equal(value, expected) and all(torch.equal(a, b) for a, b in zip(found, slopes, strict=True))
    x, weight = tensors[0].flatten(0, 1), tensors[1]
    assert torch.equal(product(x, weight.t()), x @ weight.t())


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_what_asks_for_no_gradient_gets_none(trained):
    x, weight, bias, slope = operands(3, 8, 4, 0)
    leaf = (x if trained == "x" else weight).requires_grad_()
    (found,) = torch.autograd.grad(linear(x, weight, bias, BF16), leaf, slope)
    assert found.shape == leaf.shape
