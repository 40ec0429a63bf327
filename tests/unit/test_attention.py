"""Attention of packed sequences against PyTorch's own, sequence by sequence, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from ee_megatron.model import attention
from ee_megatron.model.attention import Spans, attend_packed, flexible
from ee_megatron.model.packed import Active, PackedSequences, Segment
from tests.covering import EXTENDED

HEADS, GROUPS, DIM = 6, 2, 8


@dataclass
class Case:
    """Sequences of which each begins with `shared` positions of the one before it; of their own some ask."""

    lengths: list[int]
    shared: list[int]
    share: float
    seed: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        packed = PackedSequences.of(self.lengths, self.shared)
        self.first = packed.bounds.tolist()
        self.asking = torch.rand(packed.length, generator=generator) < self.share
        self.spans: Spans = Active(Segment.of(self.asking, self.asking), packed).spans
        shapes = (int(self.asking.sum()), HEADS, DIM), (packed.length, GROUPS, DIM), (packed.length, GROUPS, DIM)
        drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (*shapes, shapes[0])]
        self.inputs, self.slope = [x.requires_grad_() for x in drawn[:3]], drawn[3]

    def slot(self, row: int, position: int) -> int:
        """Where a sequence has its position: with itself, or with the one that it has it from."""
        while position < self.shared[row]:
            row -= 1
        return self.first[row] + position - self.shared[row]

    def expected(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Every query by itself."""
        found = []
        for row, length in enumerate(self.lengths):
            for position in range(self.shared[row], length):
                if self.asking[self.slot(row, position)]:
                    seen = [self.slot(row, earlier) for earlier in range(position + 1)]
                    k, v = (x[seen].repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1) for x in (key, value))
                    found.append(F.scaled_dot_product_attention(query[len(found)].unsqueeze(1), k, v).squeeze(1))
        return torch.stack(found) if found else query + 0 * (key.sum() + value.sum())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    shared = [0] + [draw(st.integers(0, min(pair)) | st.just(0)) for pair in pairwise(lengths)]
    return Case(lengths, shared, draw(st.sampled_from([0.1, 0.6, 1.0])), draw(st.integers(0, 99)))


@settings(deadline=None)
@given(cases(), st.sampled_from([1, 7, 32]), st.sampled_from([0, 20, 64]))
def test_blocks_and_rows_attend_as_single_queries_do(case, block, short) -> None:
    """Long sequences by blocks of their queries, short ones together as rows, and both side by side; with beginnings
    in common."""
    right = case.expected(*case.inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERIES", block)
        patch.setattr(attention, "SHORT", short)
        # What float32 would hide: the products themselves, in float64.
        patch.setattr(Tensor, "float", lambda x: x)
        out = attend_packed(*case.inputs, case.spans, flex=False)
        found = torch.autograd.grad(out, case.inputs, case.slope)
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, torch.autograd.grad(right, case.inputs, case.slope), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


@pytest.fixture
def flexes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlexAttention compiled as on a GPU, but for the kernels: its graphs run uncompiled. PyTorch refuses the backward
    pass on a CPU although there is one."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    attention.compiled.cache_clear()
    yield
    torch._dynamo.reset()
    attention.compiled.cache_clear()


def test_flex_attention_is_asked_for_the_same(flexes: None) -> None:
    case = Case([5, 5, 70, 33, 60], [0, 5, 2, 20, 30], 0.5, 0)
    narrow, slope = [x.detach().float().requires_grad_() for x in case.inputs], case.slope.float()
    outs = [attend_packed(*narrow, case.spans, flex=on) for on in (True, False)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-6)
    one, other = (torch.autograd.grad(out, narrow, slope) for out in outs)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_attention_is_refused_where_it_would_run_uncompiled(flexes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kind of inputs than the limit allows; torch.compile switched off. Others' limits stay as they are."""
    case, before = Case([70, 60], [0, 20], 0.5, 0), torch._dynamo.config.recompile_limit
    wide = [x.detach().float() for x in case.inputs]
    # One for the mask, one for attention itself.
    monkeypatch.setattr(attention, "VARIANTS", 2)
    attend_packed(*wide, case.spans, flex=True)
    with pytest.raises(RuntimeError, match="EE_MEGATRON_FLEX"):
        attend_packed(*(x.bfloat16() for x in wide), case.spans, flex=True)
    attend_packed(*wide, case.spans, flex=True)
    assert torch._dynamo.config.recompile_limit == before > 1
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="TORCHDYNAMO_DISABLE"):
        attend_packed(*wide, case.spans, flex=True)


@EXTENDED
def test_the_fused_kernel_computes_the_same_on_masks_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values by the kernel that inductor writes for a CPU, gradients unfused: a CPU has no fused backward pass."""
    case = Case([900, 700, 800, 150, 400], [0, 200, 180, 0, 100], 0.7, 0)
    narrow, slope = [x.detach().float().requires_grad_() for x in case.inputs], case.slope.float()
    blocks = case.spans.block_mask.kv_indices.shape
    assert blocks[-2] >= 12 and blocks[-1] >= 18
    right = attend_packed(*narrow, case.spans, flex=False)
    fused = flexible(
        *(x.detach() for x in narrow), case.spans, torch.compile(flex.flex_attention, dynamic=False, fullgraph=True)
    )
    torch.testing.assert_close(fused, right, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    with pytest.warns(UserWarning, match="without torch.compile"):
        unfused = flexible(*narrow, case.spans, flex.flex_attention)
    for mine, theirs in zip(*(torch.autograd.grad(x, narrow, slope) for x in (unfused, right)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_attended_in_float32() -> None:
    case = Case([40, 30], [0, 0], 0.7, 1)
    narrow = [x.detach().bfloat16() for x in case.inputs]
    out = attend_packed(*narrow, case.spans, flex=False)
    wide = attend_packed(*(x.float() for x in narrow), case.spans, flex=False)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.bfloat16())
