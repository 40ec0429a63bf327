"""Which positions a layer still changes, and how attention for them alone is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass
class Active:
    """The N active ones of s x b positions, in sequence-major order; the same on every tensor-parallel rank.

    index int64 [N] into [s, b] flattened; mine int64 [n] into this rank's [s_local, b] flattened (under sequence
    parallelism its slice of the sequence, else the same as `index`).

    Keys and values are computed at the positions `own` int64 [K] into [s, b] flattened; `source` int64 [s, b] says
    which of these each position takes. Both None: each its own.
    """

    length: int
    rows: int
    local_length: int
    index: Tensor
    mine: Tensor
    own: Tensor | None
    source: Tensor | None

    @staticmethod
    def of(running: Tensor, rows_of_source: Tensor, ranks: int = 1, rank: int = 0) -> Active:
        """running bool [s, b]; rows_of_source [s, b]: channel SOURCE of the control tensor; `ranks`, `rank`: the
        sequence-parallel group's size (1 without) and place in it."""
        length, rows = running.shape
        index = running.flatten().nonzero().squeeze(1)
        share = length // ranks
        mine = index if ranks == 1 else running[rank * share : (rank + 1) * share].flatten().nonzero().squeeze(1)
        own, source = _sources(rows_of_source.long())
        return Active(length, rows, share, index, mine, own, source)

    def share(self, x: Tensor) -> Tensor:
        """Keys or values at the positions `own` [K, ...] -> of all positions [s, b, ...]."""
        return x.unflatten(0, (self.length, self.rows)) if self.source is None else x[self.source]

    def spread(self, x: Tensor) -> Tensor:
        """This rank's active positions [n, D] at their places, zeros elsewhere: [s_local, b, D]."""
        whole = x.new_zeros(self.local_length * self.rows, x.size(-1)).index_copy(0, self.mine, x)
        return whole.unflatten(0, (self.local_length, self.rows))

    def place(self, x: Tensor) -> Tensor:
        """All active positions [N, D] at their places, zeros elsewhere: [s, b, D]."""
        whole = x.new_zeros(self.length * self.rows, x.size(-1)).index_copy(0, self.index, x)
        return whole.unflatten(0, (self.length, self.rows))

    @cached_property
    def positions(self) -> Tensor:
        """Position in the sequence, int64 [N]."""
        return self.index // self.rows

    @cached_property
    def own_positions(self) -> Tensor:
        """Position in the sequence of each key, int64 [K]."""
        every = torch.arange(self.length * self.rows, device=self.index.device) if self.own is None else self.own
        return every // self.rows

    @cached_property
    def row(self) -> Tensor:
        """Sequence of the batch, int64 [N]."""
        return self.index % self.rows

    @cached_property
    def slot(self) -> Tensor:
        """Rank of a position among the active ones of its own sequence, int64 [N]."""
        # In sequence-major order a running count per sequence is the rank.
        order = torch.argsort(self.row, stable=True)
        counts = torch.bincount(self.row, minlength=self.rows)
        starts = torch.cumsum(counts, 0) - counts
        slot = torch.empty_like(order)
        slot[order] = torch.arange(len(order), device=order.device) - starts.repeat_interleave(counts)
        return slot

    @cached_property
    def longest(self) -> int:
        """Most active positions of any sequence."""
        return int(torch.bincount(self.row, minlength=self.rows).max())

    @cached_property
    def mask(self) -> Tensor:
        """bool [b, 1, longest, s]: the keys that a query at its slot sees; an unused slot sees the first."""
        at = torch.zeros(self.rows, self.longest, dtype=torch.int64, device=self.index.device)
        at[self.row, self.slot] = self.positions
        return (torch.arange(self.length, device=at.device) <= at[..., None]).unsqueeze(1)

    @property
    def worth_packing(self) -> bool:
        """Whether attention of packed queries costs less than the causal half of a full one."""
        return self.longest < self.length / 2


def _sources(rows_of_source: Tensor) -> tuple[Tensor | None, Tensor | None]:
    length, rows = rows_of_source.shape
    here = torch.arange(rows, device=rows_of_source.device)
    own = (rows_of_source == here).flatten().nonzero().squeeze(1)
    if len(own) == length * rows:
        return None, None
    place = torch.zeros(length * rows, dtype=torch.int64, device=own.device)
    place[own] = torch.arange(len(own), device=own.device)
    # Padding takes what comes first: causality hides it from every real position.
    source = torch.where(rows_of_source < 0, here, rows_of_source)
    steps = torch.arange(length, device=own.device).unsqueeze(1)
    return own, place[steps * rows + source]
