"""How a pass's sequences lie in strips: as many micro-batches on every data rank, all of one width.

A model of what the learner's packing comes to, for plans: sequences of the mean length, groups that stay together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import SEQUENCE_MULTIPLE, RunConfig
from .workload import Workload

SPARE = 1.03
"""Positions of all strips over the positions in them, where many sequences share a strip."""


@dataclass(frozen=True)
class Packing:
    """A pass over `sequences`. load: of one, with what it shares with others of its strip; micro_batches: of every data
    rank; width: positions of a strip."""

    load: Workload
    sequences: float
    data: int
    micro_batches: int
    width: int

    @property
    def each(self) -> float:
        """Sequences of a strip that holds any, on average."""
        return max(1.0, self.sequences / (self.data * self.micro_batches))

    @property
    def filled(self) -> float:
        """Positions of such a strip that are computed."""
        return self.each * self.load.positions

    @property
    def positions(self) -> float:
        """Positions of all strips that are computed."""
        return self.sequences * self.load.positions

    @property
    def padding(self) -> float:
        """Share of the strips' positions that hold nothing."""
        return 1 - self.positions / (self.data * self.micro_batches * self.width)


def pack_pass(cfg: RunConfig, load: Workload, sequences: float, group: int = 1) -> Packing:
    """As cfg.parallel packs `sequences`, of which `group` neighbours have one prompt: into the fewest strips that keep
    within the budget, or one per sequence where none holds two."""
    parallel = cfg.parallel
    budget, data = parallel.tokens_per_micro_batch, parallel.data
    multiple = parallel.pipeline if parallel.virtual > 1 else 1
    most = round_up(math.ceil(sequences / data), multiple)
    count = multiple
    while True:
        # In more strips fewer sequences of a group are together, and its prompt is held more often.
        shared = load.in_groups(min(float(group), max(1.0, sequences / (data * count))))
        needed = round_up(math.ceil(sequences * shared.positions / (data * budget)), multiple)
        if min(needed, most) <= count:
            break
        count = min(needed, most)
    even = sequences * shared.positions / (data * count) * SPARE
    width = round_up(math.ceil(max(even, load.prompt + load.answer - 1)), SEQUENCE_MULTIPLE)
    return Packing(shared, sequences, data, count, width)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below the value."""
    return -(-value // multiple) * multiple
