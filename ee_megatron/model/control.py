"""What the layers must know about each position, beside the hidden states.

A `Control` travels as megatron-core's `context` argument. Each pipeline stage takes it from its own data; it never
crosses a stage boundary. It is made on the host, where exit depths are known before anything runs, so that no layer
asks the device which positions are left.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .packed import Active, PackedSequences, Segment

EXIT_DEPTH, ASKED = 0, 1
# What a gate's loss may consist of.
LIKELIHOOD, TARGET, HAZARD = 0, 1, 2


@dataclass(frozen=True)
class Control:
    """For W slots of packed sequences.

    `channels` fp32 [W, C]:
        channel 0      prescribed exit depth (layers that may change the position; L = no exit, 0 = padding)
        channel 1      1 where gates are asked, else 0 (prompt, padding)
    `gates` fp32 [W, M, terms], what each gate's loss weighs there, by `terms`; None: gates have no loss
        LIKELIHOOD     -log-likelihood of what the gate did or, where there are targets, the cross-entropy to them
        TARGET         its target hazard, -1 for none
        HAZARD         its hazard
    `segments`: the slots that run on to each of `depths`, the exit depths that occur, in rising order.
    `packed`: which slots belong together.
    `ranks`, `rank`: the sequence-parallel group's size (1 without) and this rank's place in it.
    """

    channels: Tensor
    gates: Tensor | None
    depths: tuple[int, ...]
    segments: tuple[Segment, ...]
    packed: PackedSequences
    terms: tuple[int, ...] = ()
    ranks: int = 1
    rank: int = 0
    _active: dict[int, Active] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on_rank(self, ranks: int, rank: int) -> Control:
        """The same for a rank of the sequence-parallel group; what layers share is kept as long as this object is."""
        return replace(self, ranks=ranks, rank=rank)

    def active(self, layer: int) -> Active | None:
        """The slots whose exit depth is at least `layer` (1-based); one object for all layers of a segment, None if
        there are no such slots."""
        at = bisect.bisect_left(self.depths, layer)
        if at == len(self.depths):
            return None
        if at not in self._active:
            self._active[at] = Active(self.segments[at], self.packed, self.ranks, self.rank)
        return self._active[at]


def make_control(
    packed: PackedSequences,
    exit_depths: Tensor,
    asked: Tensor | None = None,
    gates: dict[int, Tensor] | None = None,
) -> Control:
    """From one tensor [W] per channel, and per term of the gates' loss one [W, M], all on the CPU. Left out: no gate is
    asked, none has a loss."""
    nothing = torch.zeros_like(exit_depths)
    control = torch.stack([x.float() for x in (exit_depths, nothing if asked is None else asked)], dim=-1)
    where = torch.zeros_like(exit_depths, dtype=torch.bool) if asked is None else asked.bool()
    depths = sorted(set(exit_depths.tolist()) - {0})
    segments = tuple(Segment.of(exit_depths >= depth, where) for depth in depths)
    weights, terms = (torch.stack(list(gates.values()), dim=-1), tuple(gates)) if gates else (None, ())
    return Control(control, weights, tuple(int(d) for d in depths), segments, packed, terms)
