"""Attention of packed sequences against PyTorch's own, sequence by sequence, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ee_megatron.model import attention
from ee_megatron.model.attention import Spans, attend_packed, flexible

HEADS, GROUPS, DIM = 6, 2, 8


def make(lengths: list[int], share: float, seed: int) -> tuple[Spans, list[Tensor]]:
    """Some positions of each sequence ask: spans; queries, keys, values and the gradient of what comes out."""
    generator = np.random.default_rng(seed)
    asking = [np.flatnonzero(generator.random(n) < share) for n in lengths]
    positions = np.concatenate(asking)
    bounds = np.cumsum([0, *map(len, asking)])
    spans = Spans(bounds, np.cumsum([0, *lengths]), positions, torch.from_numpy(positions))
    torch.manual_seed(seed)
    shapes = (len(positions), HEADS, DIM), (sum(lengths), GROUPS, DIM), (sum(lengths), GROUPS, DIM)
    return spans, [*(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes), torch.randn(shapes[0])]


def expected(spans: Spans, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every query by itself."""
    found = []
    for row in range(len(spans.query_bounds) - 1):
        for at in range(spans.query_bounds[row], spans.query_bounds[row + 1]):
            first = spans.key_bounds[row]
            seen = slice(first, first + spans.host_positions[at] + 1)
            k, v = (x[seen].repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1) for x in (key, value))
            found.append(F.scaled_dot_product_attention(query[at].unsqueeze(1), k, v).squeeze(1))
    return torch.stack(found) if found else query + 0 * (key.sum() + value.sum())


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=4), st.sampled_from([0.1, 0.6, 1.0]), st.integers(0, 99),
    st.sampled_from([1, 7, 32]), st.sampled_from([0, 20, 64]),
)  # fmt: skip
def test_blocks_and_rows_attend_as_single_queries_do(lengths, share, seed, block, short) -> None:
    """Long sequences by blocks of their queries, short ones together as rows, and both side by side."""
    spans, (query, key, value, slope) = make(lengths, share, seed)
    right = expected(spans, query, key, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", block)
        patch.setattr(attention, "SHORT", short)
        # What float32 would hide: the products themselves, in float64.
        patch.setattr(Tensor, "float", lambda x: x)
        out = attend_packed(query, key, value, spans, flex=False)
        found = torch.autograd.grad(out, (query, key, value), slope.double())
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad(right, (query, key, value), slope.double()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its unfused form, of which PyTorch refuses the backward pass on a CPU although there is one."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    spans, (query, key, value, slope) = make([5, 1, 70, 33], 0.5, 0)
    narrow = [x.detach().float().requires_grad_() for x in (query, key, value)]
    outs = [flexible(*narrow, spans, flex.flex_attention), attend_packed(*narrow, spans, flex=False)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    one, other = (torch.autograd.grad(out, narrow, slope) for out in outs)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_attended_in_float32() -> None:
    spans, (query, key, value, _) = make([40, 30], 0.7, 1)
    narrow = [x.detach().bfloat16() for x in (query, key, value)]
    out = attend_packed(*narrow, spans, flex=False)
    wide = attend_packed(*(x.float() for x in narrow), spans, flex=False)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.bfloat16())
