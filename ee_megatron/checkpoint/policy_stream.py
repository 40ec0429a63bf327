"""Streams the policy's whole tensors between the ranks that hold their parts and rank 0, a bucket at a time.

Every rank cuts the list of tensors, in name order, into the same buckets of rows. For each bucket a
rank sends rank 0 its part, in one message; no other rank receives anything. Loading goes the other way
without messages: each rank reads what it holds from where the tensors are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ..tensors import Block, Shape, part_of, shape_of, to_host
from .mapping import Piece, Run, runs_of

# Of fp32 numbers, as they travel and as the leader puts them together.
BUCKET_BYTES = 64 << 20
# Buckets after which the ranks meet: one whose tensors come late waits for the leader's disk, not for a collective.
PACE = 64

Bucket = list[tuple[str, int, int]]
"""(name, first row, end) of each block of rows."""


class Holder:
    """A rank's part of a parameter's value or moment, to be streamed. This class: values that are whole on every
    data-parallel rank.

    replicated: data-parallel ranks hold the same.
    """

    replicated = True

    def span(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First and end of the flattened parameter's elements on this rank."""
        return 0, parameter.numel()

    def read(self, parameter: nn.Parameter, begin: int, end: int) -> Tensor:
        """Elements begin .. end - 1 of the flattened parameter, all of them within `span`."""
        return parameter.detach().reshape(-1)[begin:end]

    def write(self, parameter: nn.Parameter, begin: int, values: Tensor) -> None:
        """Set the elements from `begin` on, all of them within `span`."""
        assert parameter.is_contiguous()
        parameter.detach().view(-1)[begin : begin + len(values)].copy_(values)


@dataclass(frozen=True)
class Share:
    """A rank's part of a whole tensor: rows `row` .. row + rows - 1, columns `column` .. column + columns - 1.

    number: of the piece. begin, end: the elements of the flattened parameter that the rank holds. padded: whether rows
    of the parameter behind the share's only pad it. A vector has one column.
    """

    number: int
    row: int
    rows: int
    column: int
    columns: int
    runs: tuple[Run, ...]
    begin: int
    end: int
    padded: bool

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Of the whole tensor's rows first .. last - 1 what the rank holds: (element of the share's part of these
        rows, flattened; element of the parameter; how many) each."""
        top, bottom = max(first - self.row, 0), min(last - self.row, self.rows)
        for row, at, count in self.runs:
            low, high = max(row, top), min(row + count, bottom)
            begin, end = ((at + edge - row) * self.columns for edge in (low, high))
            clipped, until = max(begin, self.begin), min(end, self.end)
            if clipped < until:
                yield (low - top) * self.columns + clipped - begin, clipped, until - clipped


def shares_of(pieces: Sequence[Piece], holder: Holder) -> dict[str, list[Share]]:
    """name -> this rank's shares; several pieces may hold one tensor (`Piece.copy`)."""
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    shares: dict[str, list[Share]] = {}
    for number, piece in enumerate(pieces):
        entry, parameter = piece.entry, piece.parameter
        # ZeRO-3 leaves an empty tensor in the place of a sharded parameter.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        columns = math.prod(shape[1:])
        column = rank * columns if entry.dim == 1 else 0
        begin, end = holder.span(parameter)
        for name, places in zip(entry.names, entry.places(shape[0], ranks), strict=True):
            row = rank * len(places) if entry.dim == 0 else 0
            rows = min(len(places), max(0, entry.vocab - row)) if entry.vocab is not None else len(places)
            runs, padded = runs_of(places[:rows]), rows < len(places)
            share = Share(number, row, rows, column, columns, runs, begin, end, padded)
            shares.setdefault(name, []).append(share)
    return shares


def buckets(table: Mapping[str, Shape], limit: int) -> Iterator[Bucket]:
    """Split the rows of all tensors, in name order, into buckets of at most `limit` bytes in fp32, or of one row."""
    bucket: Bucket = []
    room = limit
    for name in sorted(table):
        rows, width = table[name][0], 4 * math.prod(table[name][1:])
        first = 0
        while first < rows:
            fits = room // width
            if not fits and bucket:
                yield bucket
                bucket, room = [], limit
                continue
            last = min(rows, first + max(1, fits))
            bucket.append((name, first, last))
            first, room = last, room - (last - first) * width
    if bucket:
        yield bucket


class MessagePart(NamedTuple):
    """Numbers of a message: for block `block` of the bucket, from element `at` on of what `share` has of it; of the
    parameter those from `element` on."""

    block: int
    share: Share
    at: int
    element: int
    length: int


def message(shares: Mapping[str, list[Share]], bucket: Bucket) -> tuple[list[MessagePart], list[int]]:
    """What a rank sends of a bucket, and how many numbers each part has."""
    parts = [
        MessagePart(block, share, *piece)
        for block, (name, first, last) in enumerate(bucket)
        for share in shares.get(name, ())
        for piece in share.pieces(first, last)
    ]
    return parts, [part.length for part in parts]


class GatherPlan:
    """Which rank sends what: computed once for a layout, by all ranks together.

    `shapes`: every tensor of the policy and its whole shape.
    """

    def __init__(self, pieces: Sequence[Piece], holder: Holder, shapes: Mapping[str, Shape]):
        self.pieces, self.table = pieces, {name: shapes[name] for name in sorted(shapes)}
        self.leads = dist.get_rank() == 0
        self.mine: dict[str, list[Share]] = {}
        if not holder.replicated or parallel_state.get_data_parallel_rank() == 0:
            first = parallel_state.get_tensor_model_parallel_rank() == 0
            for name, shares in shares_of(pieces, holder).items():
                owners = [(share, pieces[share.number]) for share in shares]
                sent = [share for share, piece in owners if not piece.copy and (piece.entry.split or first)]
                if sent:
                    self.mine[name] = sent
        every: list[dict[str, list[Share]] | None] = [None] * dist.get_world_size()
        dist.gather_object(self.mine, every if self.leads else None)
        self.others = {rank: shares for rank, shares in enumerate(every) if rank and shares}
        for name, shape in self.table.items() if self.leads else ():
            shares = [share for rank in (self.mine, *self.others.values()) for share in rank.get(name, ())]
            held = sum(count for share in shares for _, _, count in share.pieces(0, shape[0]))
            assert held == math.prod(shape), f"{name}: ranks hold {held} of {math.prod(shape)} elements"


class TensorStream:
    """Whole tensors of one kind, fp32. All ranks iterate together to the end: rank 0 gets the blocks, in name order;
    the others send and get none. A block owns its numbers.

    `meet`: what ranks wait for the leader with while it takes its time; None: with their collectives' deadline.
    """

    def __init__(self, plan: GatherPlan, holder: Holder, meet: Callable[[], None] | None = None):
        self.table, self._plan, self._holder, self._meet = plan.table, plan, holder, meet

    def __iter__(self) -> Iterator[Block]:
        return self._receive() if self._plan.leads else self._send()

    def _buckets(self) -> Iterator[Bucket]:
        for number, bucket in enumerate(buckets(self.table, BUCKET_BYTES)):
            if number and number % PACE == 0 and self._meet:
                self._meet()
            yield bucket

    @torch.no_grad()
    def _send(self) -> Iterator[Block]:
        for bucket in self._buckets():
            parts, counts = message(self._plan.mine, bucket)
            if parts:
                buffer = torch.empty(sum(counts))
                for numbers, read in zip(buffer.split(counts), to_host(*map(self._read, parts)), strict=True):
                    numbers.copy_(read)
                dist.send(buffer, dst=0)
        yield from ()

    @torch.no_grad()
    def _receive(self) -> Iterator[Block]:
        waiting = None
        for bucket in self._buckets():
            coming = bucket, [self._ask(rank, shares, bucket) for rank, shares in self._plan.others.items()]
            # The next bucket is sent while the consumer works on this one.
            if waiting:
                yield from self._assemble(*waiting)
            waiting = coming
        if waiting:
            yield from self._assemble(*waiting)

    def _ask(
        self, rank: int, shares: Mapping[str, list[Share]], bucket: Bucket
    ) -> tuple[list[MessagePart], Sequence[Tensor], dist.Work | None]:
        parts, counts = message(shares, bucket)
        buffer = torch.empty(sum(counts))
        return parts, buffer.split(counts), dist.irecv(buffer, src=rank) if parts else None

    def _assemble(
        self, bucket: Bucket, messages: list[tuple[list[MessagePart], Sequence[Tensor], dist.Work | None]]
    ) -> Iterator[Block]:
        shapes = [(last - first, *self.table[name][1:]) for name, first, last in bucket]
        whole = torch.empty(sum(math.prod(shape) for shape in shapes)).split([math.prod(shape) for shape in shapes])
        tables = [numbers.view(shape[0], -1) for numbers, shape in zip(whole, shapes, strict=True)]
        mine = message(self._plan.mine, bucket)[0]
        for part, numbers in zip(mine, to_host(*map(self._read, mine)), strict=True):
            _place(tables, bucket, part, numbers)
        for parts, arrived, work in messages:
            if work is not None:
                work.wait()
            for part, numbers in zip(parts, arrived, strict=True):
                _place(tables, bucket, part, numbers)
        # What has arrived is in place: only that is held while the blocks are used.
        messages.clear()
        for (name, first, _), numbers, shape in zip(bucket, whole, shapes, strict=True):
            yield Block(name, self.table[name], first, numbers.view(shape))

    def _read(self, part: MessagePart) -> Tensor:
        parameter = self._plan.pieces[part.share.number].parameter
        return self._holder.read(parameter, part.element, part.element + part.length)


def _place(tables: list[Tensor], bucket: Bucket, part: MessagePart, numbers: Tensor) -> None:
    """Put a part's numbers into its block: the rest of a row, whole rows, the beginning of one."""
    share, (_, first, _) = part.share, bucket[part.block]
    area = tables[part.block][:, share.column : share.column + share.columns]
    row, column = divmod(part.at, share.columns)
    row += max(share.row - first, 0)
    if column:
        begun = min(share.columns - column, len(numbers))
        area[row, column : column + begun].copy_(numbers[:begun])
        numbers, row = numbers[begun:], row + 1
    rows = len(numbers) // share.columns
    if rows:
        area[row : row + rows].copy_(numbers[: rows * share.columns].view(rows, -1))
    if rest := len(numbers) - rows * share.columns:
        area[row + rows, :rest].copy_(numbers[-rest:])


@torch.no_grad()
def load_tensors(
    pieces: Sequence[Piece], holder: Holder, shapes: Mapping[str, Shape], tensors: Mapping[str, Tensor], what: str
) -> None:
    """Fill this rank's parts, reading no more than these of the whole tensors. Padding rows become zeros.

    Raises ValueError for a missing or misshapen one; `what` says what they are.
    """
    for name, shares in shares_of(pieces, holder).items():
        if name not in tensors:
            raise ValueError(f"{what}: {name} is missing; the checkpoint was made with other adapters or exits")
        stored = shape_of(tensors, name)
        if stored != shapes[name]:
            raise ValueError(f"{what}: {name} has shape {stored} in the checkpoint, {shapes[name]} in the run")
        for share in shares:
            _fill(pieces[share.number].parameter, holder, tensors, name, share)


def _fill(parameter: nn.Parameter, holder: Holder, tensors: Mapping[str, Tensor], name: str, share: Share) -> None:
    step = max(1, BUCKET_BYTES // (4 * share.columns))
    columns = slice(share.column, share.column + share.columns)
    end = share.row + share.rows
    for first in range(share.row, end, step):
        pieces = list(share.pieces(first, min(first + step, end)))
        if pieces:
            top = min(at for at, _, _ in pieces) // share.columns
            bottom = max(-(-(at + count) // share.columns) for at, _, count in pieces)
            rows = slice(first + top, first + bottom)
            wanted = (rows, columns) if len(shape_of(tensors, name)) > 1 else (rows,)
            values = part_of(tensors, name, *wanted).reshape(-1)
            for at, element, count in pieces:
                begin = at - top * share.columns
                holder.write(parameter, element, values[begin : begin + count])
    padding = max(share.begin, share.rows * share.columns)
    if share.padded and padding < share.end:
        holder.write(parameter, padding, torch.zeros(share.end - padding))
