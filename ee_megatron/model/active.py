"""Which positions a layer still changes, and how attention for them alone is laid out.

Positions are numbered in sequence-major order, [S, B] flattened. What is counted (how many, which is the longest) is
counted on the host, before a layer runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The N positions of S x B that run between two exits.

    index int64 [N]; slot int64 [N]: the rank of a position among those of its own sequence; asked int64 [n]: those of
    them at which gates are asked. host_index, host_asked: the same, on the host. longest: most of any sequence.
    """

    length: int
    rows: int
    longest: int
    host_index: np.ndarray
    host_asked: np.ndarray
    index: Tensor
    slot: Tensor
    asked: Tensor

    @staticmethod
    def of(running: Tensor, asked: Tensor) -> Segment:
        """running, asked bool [S, B] on the CPU."""
        length, rows = running.shape
        slots = running.cumsum(0)
        index, asked_index = (x.flatten().nonzero().squeeze(1) for x in (running, running & asked))
        return Segment(
            length, rows, int(slots[-1].max()), index.numpy(), asked_index.numpy(), index, slots[running] - 1,
            asked_index,
        )  # fmt: skip


@dataclass(frozen=True)
class Keys:
    """Keys and values are computed at the positions `own` int64 [K]; `source` int64 [S * B] says which of these each
    position takes, None: each its own."""

    length: int
    rows: int
    own: Tensor
    source: Tensor | None

    @staticmethod
    def of(rows_of_source: Tensor) -> Keys:
        """rows_of_source int64 [S, B] on the CPU: the sequence that each position takes them from; -1 for padding."""
        length, rows = rows_of_source.shape
        own = (rows_of_source == torch.arange(rows)).flatten().nonzero().squeeze(1)
        if len(own) == length * rows:
            return Keys(length, rows, own, None)
        place = torch.zeros(length * rows, dtype=torch.int64)
        place[own] = torch.arange(len(own))
        source = place[(torch.arange(length).unsqueeze(1) * rows + rows_of_source).clamp(min=0)].flatten()
        # What padding takes is seen by no real position, for causality hides it. It takes all keys in turn: gradients
        # of one key from everywhere would be added one after the other.
        padding = (rows_of_source < 0).flatten()
        source[padding] = torch.arange(int(padding.sum())) % max(1, len(own))
        return Keys(length, rows, own, source)

    @cached_property
    def positions(self) -> Tensor:
        """Position in the sequence of each key, int64 [K]."""
        return self.own // self.rows

    def enter(self, x: Tensor) -> Tensor:
        """All positions [S * B, D] -> those with keys of their own [K, D]."""
        return x if self.source is None else x.index_select(0, self.own)

    def share(self, x: Tensor) -> Tensor:
        """Keys or values [K, ...] -> of all positions [S, B, ...]."""
        every = x if self.source is None else x.index_select(0, self.source)
        return every.unflatten(0, (self.length, self.rows))


class Active:
    """The positions of a segment, as the layers in it need them; on every tensor-parallel rank the same but for `mine`
    and `asked_mine`, which are this rank's slice of the sequence under sequence parallelism. One object serves all
    layers of a segment, and their recomputation."""

    def __init__(self, segment: Segment, keys: Keys, ranks: int = 1, rank: int = 0):
        self.segment, self.keys = segment, keys
        self.length, self.rows, self.longest = segment.length, segment.rows, segment.longest
        self.local_length = self.length // ranks
        # This rank's first position, and the one behind its last.
        self._first, self._stop = (at * self.local_length * self.rows for at in (rank, rank + 1))
        self.index, self.slot = segment.index, segment.slot
        self.mine = self._local(segment.index, segment.host_index)
        self.asked_mine = self._local(segment.asked, segment.host_asked)
        # The same places, counted in the whole sequence.
        self.asked = self.asked_mine if ranks == 1 else self.asked_mine + self._first

    def _local(self, index: Tensor, host: np.ndarray) -> Tensor:
        if self.local_length == self.length:
            return index
        return index[slice(*np.searchsorted(host, (self._first, self._stop)))] - self._first

    @property
    def everywhere(self) -> bool:
        """Whether no position is left out."""
        return len(self.index) == self.length * self.rows

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
    def row(self) -> Tensor:
        """Sequence of the batch, int64 [N]."""
        return self.index % self.rows

    @property
    def worth_packing(self) -> bool:
        """Whether attention of packed queries costs less than the causal half of a full one."""
        return self.longest < self.length / 2

    @cached_property
    def at(self) -> Tensor:
        """Where a query lies among [b, width] of the attention, flattened, int64 [N]."""
        return self.row * self.width + (self.slot if self.worth_packing else self.positions)

    @property
    def width(self) -> int:
        """Queries per sequence, those that are left out included."""
        return self.longest if self.worth_packing else self.length

    @cached_property
    def mask(self) -> Tensor | None:
        """bool [b, 1, longest, s]: the keys that a query at its slot sees; an unused slot sees the first. None where
        queries keep their places, and causality is all."""
        if not self.worth_packing:
            return None
        at = torch.zeros(self.rows * self.longest, dtype=torch.int64, device=self.index.device)
        at = at.index_copy(0, self.at, self.positions).view(self.rows, self.longest, 1)
        return (torch.arange(self.length, device=at.device) <= at).unsqueeze(1)
