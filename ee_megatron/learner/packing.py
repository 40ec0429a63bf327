"""How a batch's sequences are dealt out to ranks and micro-batches: packed, balanced, prompts that they share once.

A sequence of n tokens costs its n positions, whatever the others' lengths are. The positions of a prompt that several
sequences of a micro-batch begin with are computed once, with the sum of their gradients.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..config.schema import SEQUENCE_MULTIPLE
from ..model.packed import PackedSequences
from .batch import ReplayBatch

# A prompt's share of a sequence from which on it is worth keeping the sequences that begin with it together.
WORTH_SHARING = 0.03
# Pieces are cut until the fullest micro-batch has no more than this times the mean, at most so many times.
BALANCE, CUTS = 1.02, 32


@dataclass(frozen=True)
class PackedRows:
    """The sequences of one micro-batch: `rows` of the batch, in the order of their prompts, and how many positions each
    has in common with the one before it. `width`: slots, padding included."""

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    width: int = 0

    @property
    def positions(self) -> int:
        """Slots that are in use."""
        return sum(self.lengths) - sum(self.shared)

    def packed(self) -> PackedSequences:
        return PackedSequences.of(self.lengths, self.shared, self.width)

    def places(self, sequence: int) -> Tensor:
        """Where the slots' positions are in [B, S] flattened, int64 [positions]; S = `sequence`."""
        parts = [
            np.arange(row * sequence + common, row * sequence + length)
            for row, length, common in zip(self.rows, self.lengths, self.shared, strict=True)
        ]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


@dataclass(frozen=True)
class PackingStats:
    """positions: those that are computed, over all data ranks, shared prompts counted once; slots: those and the
    padding beside them; micro_batches: per data rank; largest: positions of the fullest."""

    positions: int
    slots: int
    micro_batches: int
    largest: int


NOTHING_PACKED = PackingStats(0, 0, 0, 0)


@dataclass(frozen=True)
class MicroBatchPlan:
    """Every data rank's micro-batches, the same number for each."""

    ranks: tuple[tuple[PackedRows, ...], ...]

    @property
    def stats(self) -> PackingStats:
        every = [rows for part in self.ranks for rows in part]
        positions = [rows.positions for rows in every]
        return PackingStats(sum(positions), sum(rows.width for rows in every), len(self.ranks[0]), max(positions))


def padded(positions: int) -> int:
    """Slots for so many positions: a tensor-parallel degree divides them."""
    return max(1, -(-positions // SEQUENCE_MULTIPLE)) * SEQUENCE_MULTIPLE


def deal(batch: ReplayBatch, tokens: int, ranks: int, *, one_width: bool = False) -> MicroBatchPlan:
    """Deal the sequences out to `ranks`, in micro-batches of at most `tokens` positions (or one longer sequence).

    Every rank gets the same number of them, as few as will do; some are empty where there are fewer sequences. The same
    batch is always dealt alike. `one_width`: all are as wide as the widest, because pipeline stages exchange hidden
    states of one shape.
    """
    sequences = _Sequences.of(batch)
    most = max(tokens, int(sequences.lengths.max()))
    # What every sequence begins with (few-shot examples) is in each micro-batch, however full.
    room = max(1, most - sequences.base)
    total = sequences.cost(0, len(sequences.order))
    count = max(1, -(-total // (room * ranks)))
    while max(bins := _balanced(sequences, count * ranks, total))[0] > room:
        count += 1
    micro_batches = sorted((sequences.packed(pieces) for _, pieces in bins), key=lambda rows: -rows.positions)
    # There and back, so that no rank has the larger one each time.
    dealt: list[list[PackedRows]] = [[] for _ in range(ranks)]
    for index, rows in enumerate(micro_batches):
        turn, place = divmod(index, ranks)
        widest = micro_batches[0] if one_width else rows
        dealt[ranks - 1 - place if turn % 2 else place].append(replace(rows, width=padded(widest.positions)))
    return MicroBatchPlan(tuple(tuple(part) for part in dealt))


# A piece: sequences first to stop - 1, in the order of their prompts. A micro-batch: its positions, beside those that
# all have in common, and its pieces.
Piece = tuple[int, int]
Bin = tuple[int, list[Piece]]


@dataclass(frozen=True)
class _Sequences:
    """A batch's sequences in the order of their prompts. order int64 [B]: row of the batch; lengths int64 [B];
    common int64 [B]: positions that each could take from the one before it; base: what all have in common."""

    order: np.ndarray
    lengths: np.ndarray
    common: np.ndarray
    base: int

    @staticmethod
    def of(batch: ReplayBatch) -> _Sequences:
        shareable = batch.shareable().tolist()
        prompts = [row[:n] for row, n in zip(batch.tokens.numpy().astype(">u4"), shareable, strict=True)]
        order = sorted(range(batch.rows), key=lambda row: prompts[row].tobytes())
        common = [0]
        for before, row in pairwise(order):
            n = min(shareable[before], shareable[row])
            differ = np.flatnonzero(prompts[before][:n] != prompts[row][:n])
            common.append(int(differ[0]) if len(differ) else n)
        base = min(common[1:], default=0)
        return _Sequences(np.array(order), batch.lengths().numpy()[order], np.array(common), base)

    def cost(self, first: int, stop: int) -> int:
        """Positions of these sequences, beside those that all have in common."""
        return int(self.lengths[first:stop].sum() - self.common[first + 1 : stop].sum()) - self.base

    def pieces(self, most: float) -> list[Piece]:
        """Sequences that had better stay together, unless that costs more than `most`."""
        apart = self.common - self.base <= WORTH_SHARING * self.lengths
        apart[0] = True
        starts = np.flatnonzero(apart).tolist()
        pieces, waiting = list[Piece](), list(zip(starts, [*starts[1:], len(self.order)], strict=True))
        while waiting:
            piece = waiting.pop()
            if piece[1] - piece[0] > 1 and self.cost(*piece) > most:
                waiting += halves(piece)
            else:
                pieces.append(piece)
        return pieces

    def packed(self, pieces: list[Piece]) -> PackedRows:
        held = sorted(index for first, stop in pieces for index in range(first, stop))
        shared = [int(self.common[i + 1 : j + 1].min()) for i, j in pairwise(held)]
        rows, lengths = self.order[held].tolist(), self.lengths[held].tolist()
        return PackedRows(tuple(rows), tuple(lengths), tuple([0, *shared][: len(held)]))


def halves(piece: Piece) -> list[Piece]:
    middle = sum(piece) // 2
    return [(piece[0], middle), (middle, piece[1])]


def _balanced(sequences: _Sequences, count: int, total: int) -> list[Bin]:
    """Each of `count` micro-batches, such that the fullest holds little: what is in it is cut as long as it can be."""
    alone = count >= len(sequences.order)
    pieces = sequences.pieces(0 if alone else total / count)
    best = bins = _multifit(sequences, pieces, count)
    for _ in range(CUTS):
        size, held = max(bins)
        divisible = [piece for piece in held if piece[1] - piece[0] > 1]
        if size <= BALANCE * total / count or not divisible:
            break
        largest = max(divisible, key=lambda piece: sequences.cost(*piece))
        pieces = [piece for piece in pieces if piece != largest] + halves(largest)
        bins = _multifit(sequences, pieces, count)
        best = min(best, bins, key=lambda bins: max(bins)[0])
    return best


def _multifit(sequences: _Sequences, pieces: list[Piece], count: int) -> list[Bin]:
    """The smallest capacity at which best-fit decreasing gets by with `count` micro-batches, by bisection (Coffman,
    Garey and Johnson 1978, "An application of bin-packing to multiprocessor scheduling")."""
    sized = sorted(((sequences.cost(*piece), piece) for piece in pieces), reverse=True)
    low = max(sized[0][0], -(-sum(size for size, _ in sized) // count))
    # Twice the bound is enough (ibid.); the bound itself will often do.
    high, best = 2 * low, _best_fit(sized, low, count)
    if best is not None:
        return best
    best = _best_fit(sized, high, count)
    assert best is not None
    while high - low > max(1, low // 500):
        middle = (low + high) // 2
        bins = _best_fit(sized, middle, count)
        low, high, best = (middle, high, best) if bins is None else (low, middle, bins)
    return best


def _best_fit(sized: list[tuple[int, Piece]], capacity: int, count: int) -> list[Bin] | None:
    """Each piece to where it leaves the least room; None if `count` micro-batches of `capacity` are not enough."""
    room = [(capacity, index) for index in range(count)]
    held: list[list[Piece]] = [[] for _ in range(count)]
    for size, piece in sized:
        at = bisect.bisect_left(room, (size, -1))
        if at == count:
            return None
        left, index = room.pop(at)
        held[index].append(piece)
        bisect.insort(room, (left - size, index))
    return [(capacity - left, held[index]) for left, index in room]
