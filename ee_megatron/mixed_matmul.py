"""Products of bfloat16 matrices with float32 sums: for logits and gates, where bfloat16's steps are too coarse.

A logit of 20 has neighbours .125 away in bfloat16. Learner and decoder both read out and ask gates by what is here, so
that they differ in the order of summation alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import panels

# Bytes of a chunk's fp32 logits, and the fewest positions for an efficient product. On a CPU logits should stay in the
# cache until they are reduced, but a trained head's gradient is read and written for every chunk.
CHUNK_BYTES, CACHED_BYTES, LEAST_CHUNK = 2**27, 2**24, 64


def chunk_positions(rows: int, *, on_cpu: bool, trained: bool) -> int:
    """Positions per chunk of logits, for a rank that holds so many rows of the head."""
    return max(LEAST_CHUNK, (CACHED_BYTES if on_cpu and not trained else CHUNK_BYTES) // (4 * rows))


def products_with(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Function x [n, k] -> x · W^T [n, m] in float32, as of `product`, for many x with one W [m, k] of their dtype. On
    a CPU the values of a bfloat16 W are copied to another layout once, so later changes of W have no effect."""
    if weight.dtype == torch.float32 or weight.device.type != "cpu":
        return lambda x: product(x, weight.t())
    packed = panels(weight, wide=True)
    if packed is not None:
        return packed
    wide = weight.float()
    return lambda x: x.float() @ wide.t()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product a [n, k] · b [k, m], both float32 or both bfloat16 -> float32 [n, m]; products of bfloat16 are
    exact and summed in float32. No gradient."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":
        # PyTorch has no kernel for this on a CPU; float32 holds the same values.
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., in] · W^T + b -> float32 [..., out], with x and W [out, in] rounded to `dtype`; b [out] float32 or None.

    Gradients come in the dtypes of x and W: for a float32 master the float32 sums of what bfloat16 products give.
    """
    if dtype == torch.float32:
        return F.linear(x, weight, bias)
    rows: Tensor = _RoundedLinear.apply(x.reshape(-1, x.size(-1)), weight, dtype)
    out = rows.view(*x.shape[:-1], weight.size(0))
    return out if bias is None else out + bias


class _RoundedLinear(torch.autograd.Function):
    """x [n, in] · W^T [n, out] in float32 with operands rounded to `dtype`, as the slope is in the backward pass. Kept
    are x as rounded and W itself, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        narrow = x.to(dtype)
        ctx.save_for_backward(narrow, weight)
        return product(narrow, weight.to(dtype).t())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        slope = slope.to(x.dtype)
        dx = product(slope, weight.to(x.dtype)) if ctx.needs_input_grad[0] else None
        return dx, product(slope.t(), x) if ctx.needs_input_grad[1] else None, None
