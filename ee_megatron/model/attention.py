"""Exact causal attention of packed sequences of which some positions ask nothing.

A query sees the keys of its own sequence up to its own position. Nothing is padded, key and value heads that several
query heads share are not repeated, and no mask of all queries by all keys is ever made. A shared beginning
is keys once: gradients of copies would be added in an order that CUDA leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..tensors import to_device

# Queries of a sequence that are multiplied with its keys at a time on a CPU: their scores then stay in its caches
# (32 queries, 3 heads a group, 4,096 keys: 1.5 MiB).
QUERIES = 32
# Sequences of at most so many keys, each a single block, are attended to together on a CPU, those of like length padded
# to the longest: one by one the calls would take longer than the products. Elsewhere each layer would have to send what
# goes where to the device.
SHORT = QUERIES
# Kinds of inputs (gradients, sizes that are equal or 1, dtypes) that attention and its masks are compiled for.
VARIANTS = 64


@dataclass(frozen=True)
class Together:
    """R sequences of like length as rows: `queries` int64 [R * n] and `keys` int64 [R * m], what goes where, padding
    repeats a sequence's first; `seen` bool [R, 1, n, m]; `used` int64: which of the R * n queries are not padding, and
    `places` where their results go."""

    queries: Tensor
    keys: Tensor
    seen: Tensor
    used: Tensor
    places: Tensor


@dataclass(frozen=True)
class LongSequence:
    """`runs`: the slots of a sequence's keys, in order; `blocks`: queries, how many of these keys come before the last
    of them or are its own, how many the first of them sees."""

    runs: list[slice]
    blocks: list[tuple[slice, int, int]]

    def gather(self, x: Tensor) -> Tensor:
        """All slots [.., L, d] -> the sequence's keys [.., n, d]; a view, unless they lie in several runs."""
        parts = [x[..., run, :] for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def scatter_add(self, x: Tensor, into: Tensor) -> None:
        """`gather`'s gradient, which is added to that of all slots."""
        for part, run in zip(x.split([run.stop - run.start for run in self.runs], -2), self.runs, strict=True):
            into[..., run, :] += part


@dataclass(frozen=True)
class Spans:
    """N queries and L slots of keys of R sequences, which see K keys in all; by sequence, in rising positions.

    query_bounds, key_bounds int64 [R + 1], host: whose queries and whose keys; keys int64 [K], host: the slot of each
    key; host_positions int64 [N]: position of a query in its sequence, which is also its place among the sequence's
    keys. On the device: queries int64 [2, N], a query's position and sequence; slots int64 [3, L], a slot's position
    and the first and last sequence that sees it.
    """

    query_bounds: np.ndarray
    key_bounds: np.ndarray
    keys: np.ndarray
    host_positions: np.ndarray
    queries: Tensor
    slots: Tensor

    @property
    def short(self) -> int:
        """Keys of the longest sequence that is attended to together with others."""
        return SHORT if self.queries.device.type == "cpu" else 0

    @cached_property
    def long(self) -> list[LongSequence]:
        """Those that are attended to by blocks of their queries."""
        sequences = []
        for row in np.flatnonzero((np.diff(self.key_bounds) > self.short) & (np.diff(self.query_bounds) > 0)):
            first, stop = self.query_bounds[row : row + 2].tolist()
            slots = self.keys[slice(*self.key_bounds[row : row + 2])]
            ends = [*(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
            runs = [slice(int(slots[at]), int(slots[end - 1]) + 1) for at, end in pairwise([0, *ends])]
            blocks = []
            for at in range(first, stop, QUERIES):
                end = min(stop, at + QUERIES)
                low, high = self.host_positions[[at, end - 1]].tolist()
                blocks.append((slice(at, end), high + 1, low + 1))
            sequences.append(LongSequence(runs, blocks))
        return sequences

    @cached_property
    def together(self) -> list[Together]:
        """The sequences of at most `short` keys, by powers of two of their length."""
        lengths, asking = np.diff(self.key_bounds), np.diff(self.query_bounds)
        short = (lengths <= self.short) & (asking > 0)
        sizes = np.ceil(np.log2(np.maximum(lengths, 1)))
        return [self._rows(np.flatnonzero(short & (sizes == size))) for size in np.unique(sizes[short])]

    def _rows(self, rows: np.ndarray) -> Together:
        asking, lengths = (np.diff(bounds)[rows, None] for bounds in (self.query_bounds, self.key_bounds))
        query, key = np.arange(asking.max()), np.arange(lengths.max())
        queries = self.query_bounds[rows, None] + np.where(query < asking, query, 0)
        keys = self.keys[self.key_bounds[rows, None] + np.where(key < lengths, key, 0)]
        used = (query < asking).ravel().nonzero()[0]
        # A query's place is among its sequence's own keys, so none that is padding comes before it.
        seen = key <= self.host_positions[queries][:, None, :, None]
        flat = queries.ravel()
        parts = [torch.from_numpy(x) for x in (flat, keys.ravel(), seen, used, flat[used])]
        return to_device(Together(*parts), self.queries.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        """For `flex_attention`: which blocks of queries see which blocks of keys."""
        size = self.queries.shape[1], self.slots.shape[1]
        return compiled(create_block_mask)(
            sees(self.queries, self.slots), None, None, *size, device=self.queries.device
        )


def sees(queries: Iterable[Tensor], slots: Iterable[Tensor]) -> Callable[..., Tensor]:
    """Which query sees which key, for `flex_attention`."""
    (at, row), (place, first, last) = queries, slots

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[key] <= row[query]) & (row[query] <= last[key]) & (place[key] <= at[query])

    return seen


def attend_packed(query: Tensor, key: Tensor, value: Tensor, spans: Spans, flex: bool) -> Tensor:
    """query [N, h, d], key and value [L, g, d] with h a multiple of g -> [N, h, d], in the query's dtype.

    `flex`: by PyTorch's FlexAttention, compiled, which needs CUDA; else block by block in float32, whose products are
    several times as fast as those of bfloat16 on a CPU.
    """
    if flex:
        return flexible(query, key, value, spans, compiled(flex_attention))
    wide = query.float(), key.float(), value.float()
    if not spans.together:
        return _BlockAttention.apply(*wide, spans).to(query.dtype)
    out = _BlockAttention.apply(*wide, spans) if spans.long else torch.zeros_like(wide[0])
    for rows in spans.together:
        out = out.index_copy(0, rows.places, _rows_attend(*wide, rows))
    return out.to(query.dtype)


def _rows_attend(query: Tensor, key: Tensor, value: Tensor, rows: Together) -> Tensor:
    """The results of the queries that `rows` has, [len(rows.places), h, d]."""
    q, k, v = (
        x.index_select(0, index).unflatten(0, (len(rows.seen), -1)).transpose(1, 2)
        for x, index in ((query, rows.queries), (key, rows.keys), (value, rows.keys))
    )
    # The fused kernel's exponentials are less exact than gradients are held to.
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(q, k, v, rows.seen, enable_gqa=query.size(1) != key.size(1))
    return out.transpose(1, 2).flatten(0, 1).index_select(0, rows.used)


def flexible(query: Tensor, key: Tensor, value: Tensor, spans: Spans, attend: Callable[..., Any]) -> Tensor:
    """`attend_packed` by `attend`, which is `flex_attention`, compiled or not."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = attend(q, k, v, block_mask=spans.block_mask, enable_gqa=query.size(1) != key.size(1))
    return out.squeeze(0).transpose(0, 1)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled, for inputs of any sizes.

    Raises RuntimeError where PyTorch would only warn and run it uncompiled, with scores of all queries by all keys.
    """
    remedy = "EE_MEGATRON_FLEX=0 attends without FlexAttention, several times as slowly"

    def only_compiled(*args: Any, **options: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            raise RuntimeError(
                f"torch.compile is off and {function.__name__} needs it: unset TORCHDYNAMO_DISABLE; {remedy}"
            )
        return function(*args, **options)

    run = torch.compile(only_compiled, dynamic=True, fullgraph=True)

    # The limit is one of PyTorch's whole process: as it was for everybody else's functions.
    @torch._dynamo.config.patch(recompile_limit=VARIANTS)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return run(*args, **options)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                f"{function.__name__} was compiled for {VARIANTS} kinds of inputs and met another; {remedy}"
            ) from error

    return call


class _BlockAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v by blocks of queries; scores are made again in the backward pass from what their
    softmax was divided by (Dao 2023, "FlashAttention-2", arXiv 2307.08691, without blocks of keys)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        q, both = _grouped(query, key).mul_(query.size(-1) ** -0.5), _heads_first(key, value)
        # Zero where no block has a query; where each is in one, nothing needs a beginning.
        make = q.new_zeros if spans.together else q.new_empty
        out, normaliser = make(q.shape), make(q.size(0), q.size(1), 1)
        for sequence in spans.long:
            k, v = sequence.gather(both)
            for rows, keys, scores in _scores(q, k, query.size(1) // key.size(1), sequence, spans):
                top = scores.amax(-1, keepdim=True)
                scores.sub_(top).exp_()
                total = scores.sum(-1, keepdim=True)
                out[:, rows] = torch.bmm(scores, v[:, keys]).div_(total)
                normaliser[:, rows] = total.log_().add_(top)
        ctx.spans = spans
        ctx.save_for_backward(query, key, value, out, normaliser)
        return _ungrouped(out, query)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normaliser = ctx.saved_tensors
        scale = query.size(-1) ** -0.5
        q, both = _grouped(query, key).mul_(scale), _heads_first(key, value)
        d_out = _grouped(gradient, key)
        shift = (d_out * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(q) if ctx.spans.together else torch.empty_like(q)
        d_both = torch.zeros_like(both)
        for sequence in ctx.spans.long:
            k, v = sequence.gather(both)
            own = d_both[..., sequence.runs[0], :] if len(sequence.runs) == 1 else both.new_zeros(2, *k.shape)
            d_k, d_v = own
            for rows, keys, scores in _scores(q, k, query.size(1) // key.size(1), sequence, ctx.spans):
                weights = scores.sub_(normaliser[:, rows]).exp_()
                d_v[:, keys].baddbmm_(weights.transpose(1, 2), d_out[:, rows])
                slope = torch.bmm(d_out[:, rows], v[:, keys].transpose(1, 2))
                slope.sub_(shift[:, rows]).mul_(weights)
                torch.bmm(slope, k[:, keys], out=d_q[:, rows])
                d_k[:, keys].baddbmm_(slope.transpose(1, 2), q[:, rows])
            if len(sequence.runs) > 1:
                sequence.scatter_add(own, d_both)
        d_key, d_value = d_both.transpose(1, 2)
        return _ungrouped(d_q, query).mul_(scale), d_key, d_value, None


def _heads_first(key: Tensor, value: Tensor) -> Tensor:
    """[L, g, d] each -> [2, g, L, d]."""
    return torch.stack([key.transpose(0, 1), value.transpose(0, 1)])


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """[N, h, d] -> a copy [g, N * (h / g), d]: side by side the heads that share a head of `key` [K, g, d]."""
    grouped = x.unflatten(1, (key.size(1), x.size(1) // key.size(1))).transpose(0, 1)
    return grouped.clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _ungrouped(x: Tensor, query: Tensor) -> Tensor:
    """The inverse of `_grouped`."""
    return x.unflatten(1, (query.size(0), query.size(1) // x.size(0))).transpose(0, 1).reshape(query.shape)


def _scores(
    q: Tensor, k: Tensor, heads: int, sequence: LongSequence, spans: Spans
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Per block: its rows of `q`, its keys, and the scores [g, rows, keys], -inf where a query doesn't see a key;
    `heads` share a key's."""
    for queries, stop, common in sequence.blocks:
        rows, keys = slice(queries.start * heads, queries.stop * heads), slice(0, stop)
        scores = torch.bmm(q[:, rows], k[:, keys].transpose(1, 2))
        later = torch.arange(common, stop, device=q.device)
        hidden = later > spans.queries[0, queries].unsqueeze(1)
        scores.unflatten(1, (-1, heads))[..., common:].masked_fill_(hidden.unsqueeze(1), -math.inf)
        yield rows, keys, scores
