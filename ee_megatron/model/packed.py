"""Sequences packed one after the other, which of their positions a layer still changes, and what each of them sees.

Slots are numbered 0 to W - 1; a slot holds one position of one sequence, padding comes last. What is counted (how many,
from where to where) is counted on the host, before a layer runs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .attention import Spans

# Cosines and sines [N, 1, d] of rotary angles.
Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PackedSequences:
    """R sequences in W slots, of which the first `length` are in use.

    A sequence may begin with what the one before it begins with: these positions have no slot of their own, and it
    takes their keys and values from where they are.

    bounds int64 [R + 1], host: sequence r has the slots bounds[r] to bounds[r + 1]. key_bounds int64 [R + 1], host: the
    same among all keys that sequences see, K of them; keys int64 [K], host: the slot of each. slots int64 [3, W]: a
    slot's place in its sequence, that sequence, and the last one that sees it; 0 for padding.
    """

    width: int
    length: int
    bounds: np.ndarray
    key_bounds: np.ndarray
    keys: np.ndarray
    host_positions: np.ndarray
    slots: Tensor

    @staticmethod
    def of(lengths: Sequence[int], shared: Sequence[int] = (), width: int = 0) -> PackedSequences:
        """`lengths` of whole sequences; `shared`: how many positions each has in common with the one before it (never
        more than either's length), 0 where left out. `width`: slots, at least as many as are in use."""
        shared = shared or [0] * len(lengths)
        bounds = np.cumsum([0, *(n - common for n, common in zip(lengths, shared, strict=True))])
        length = int(bounds[-1])
        slots = np.zeros((3, max(width, length)), dtype=np.int64)
        paths = [np.empty(0, dtype=np.int64)]
        for row, (n, common) in enumerate(zip(lengths, shared, strict=True)):
            own = np.arange(bounds[row], bounds[row + 1])
            slots[0, own], slots[1, own] = np.arange(common, n), row
            paths.append(np.concatenate([paths[-1][:common], own]))
            slots[2, paths[-1]] = row
        return PackedSequences(
            slots.shape[1], length, bounds, np.cumsum([0, *lengths]), np.concatenate(paths), slots[0],
            torch.from_numpy(slots),
        )  # fmt: skip

    @property
    def positions(self) -> Tensor:
        """Of every slot in its sequence, int64 [W]."""
        return self.slots[0]


@dataclass(frozen=True)
class Segment:
    """The N slots that run between two exits.

    index int64 [N]; gated int64 [n]: those of them at which gates decide. host_index, host_gated: the same, on the
    host.
    """

    host_index: np.ndarray
    host_gated: np.ndarray
    index: Tensor
    gated: Tensor

    @staticmethod
    def of(running: Tensor, gate_mask: Tensor) -> Segment:
        """running, gate_mask bool [W] on the CPU."""
        index, gated_index = (x.nonzero().squeeze(1) for x in (running, running & gate_mask))
        return Segment(index.numpy(), gated_index.numpy(), index, gated_index)


class Active:
    """The slots of a segment, as the layers in it need them; on every tensor-parallel rank the same but for `mine` and
    `local_gated`, which are this rank's part of the slots under sequence parallelism. One object serves all layers of a
    segment, and their recomputation."""

    def __init__(self, segment: Segment, packed: PackedSequences, ranks: int = 1, rank: int = 0):
        self.segment, self.packed = segment, packed
        self.local_width = packed.width // ranks
        # This rank's first slot, and the one behind its last.
        self._first, self._stop = (at * self.local_width for at in (rank, rank + 1))
        self.index = segment.index
        self.mine = self._local(segment.index, segment.host_index)
        self.local_gated = self._local(segment.gated, segment.host_gated)
        # The same places, counted in all slots.
        self.gated = self.local_gated if ranks == 1 else self.local_gated + self._first
        self._turns: tuple[Turn, Turn] | None = None

    def _local(self, index: Tensor, host: np.ndarray) -> Tensor:
        if self.local_width == self.packed.width:
            return index
        return index[slice(*np.searchsorted(host, (self._first, self._stop)))] - self._first

    @property
    def everywhere(self) -> bool:
        """Whether every slot that is in use runs."""
        return len(self.index) == self.packed.length

    def pick(self, x: Tensor) -> Tensor:
        """All slots [W, ...] -> the active ones [N, ...]."""
        return x[: len(self.index)] if self.everywhere else x.index_select(0, self.index)

    def pick_mine(self, x: Tensor) -> Tensor:
        """This rank's slots [w, ...] -> its active ones [n, ...]."""
        return self.pick(x) if self._whole else x.index_select(0, self.mine)

    def put_mine(self, x: Tensor, into: Tensor) -> Tensor:
        """This rank's slots `into` [w, D] with x [n, D] at its active ones."""
        if self._whole and self.everywhere:
            return x if len(x) == len(into) else torch.cat([x, into[len(x) :]])
        return into.index_copy(0, self.mine, x)

    @property
    def _whole(self) -> bool:
        return self.local_width == self.packed.width

    def spread(self, x: Tensor) -> Tensor:
        """This rank's active slots [n, D] at their places, zeros elsewhere: [w, 1, D]."""
        return x.new_zeros(self.local_width, x.size(-1)).index_copy(0, self.mine, x).unsqueeze(1)

    def place(self, x: Tensor) -> Tensor:
        """All active slots [N, D] at their places, zeros elsewhere: [W, 1, D]."""
        return x.new_zeros(self.packed.width, x.size(-1)).index_copy(0, self.index, x).unsqueeze(1)

    @cached_property
    def spans(self) -> Spans:
        """Whose keys each active slot sees, and how many of them."""
        host = self.segment.host_index
        packed = self.packed
        slots = packed.slots[:, : packed.length]
        return Spans(
            np.searchsorted(host, packed.bounds), packed.key_bounds, packed.keys, packed.host_positions[host],
            slots[:2] if self.everywhere else slots[:2].index_select(1, self.index), slots,
        )  # fmt: skip

    def turns(self, angles: Tensor, dtype: torch.dtype) -> tuple[Turn, Turn]:
        """Rotary turns of the keys (all slots in use) and of the queries (the active ones); angles [W, 1, 1, d]."""
        if self._turns is None:
            at = angles.flatten(1).index_select(0, self.packed.positions[: self.packed.length])
            keys = at.cos().to(dtype).unsqueeze(1), at.sin().to(dtype).unsqueeze(1)
            self._turns = keys, (self.pick(keys[0]), self.pick(keys[1]))
        return self._turns


EXIT_DEPTH, ASKED = 0, 1
# What a gate's loss may consist of.
LIKELIHOOD, TARGET, HAZARD = 0, 1, 2


@dataclass(frozen=True)
class Control:
    """What the layers must know about each of W slots, beside the hidden states.

    A `Control` travels as megatron-core's `context` argument. Each pipeline stage takes it from its own data; it never
    crosses a stage boundary. It is made on the host, where exit depths are known before anything runs, so that no layer
    asks the device which positions are left.

    `channels` fp32 [W, C]:
        channel 0      prescribed exit depth (layers that may change the position; L = no exit, 0 = padding)
        channel 1      1 where gates decide, else 0 (prompt, padding)
    `gates` fp32 [W, M, terms], what each gate's loss weighs there, by `terms`; None: gates have no loss
        LIKELIHOOD     -log-likelihood of what the gate did or, where there are targets, the cross-entropy to them
        TARGET         its target hazard, -1 for none
        HAZARD         its hazard
    segments[i]: slots whose exit depth is at least depths[i], the exit depths that occur, in rising order.
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
        """The same for a rank of the sequence-parallel group; layers share data as long as this object exists."""
        return replace(self, ranks=ranks, rank=rank)

    def with_gates(self, gates: dict[int, Tensor] | None) -> Control:
        """The same with a loss of the gates, [W, M] per term."""
        weights, terms = (torch.stack(list(gates.values()), dim=-1), tuple(gates)) if gates else (None, ())
        return replace(self, gates=weights, terms=terms)

    def active(self, layer: int) -> Active | None:
        """The slots whose exit depth is at least `layer` (1-based); one object for all layers of a segment, None if
        there are no such slots."""
        at = bisect.bisect_left(self.depths, layer)
        if at == len(self.depths):
            return None
        if at not in self._active:
            self._active[at] = Active(self.segments[at], self.packed, self.ranks, self.rank)
        return self._active[at]


def make_control(packed: PackedSequences, exit_depths: Tensor, gate_mask: Tensor | None = None) -> Control:
    """From one tensor [W] per channel, on the CPU, without a loss of the gates. `gate_mask` None: no gate decides."""
    where = torch.zeros_like(exit_depths, dtype=torch.bool) if gate_mask is None else gate_mask.bool()
    channels = torch.stack([exit_depths.float(), where.float()], dim=-1)
    depths = sorted(set(exit_depths.tolist()) - {0})
    segments = tuple(Segment.of(exit_depths >= depth, where) for depth in depths)
    return Control(channels, None, tuple(int(d) for d in depths), segments, packed)
