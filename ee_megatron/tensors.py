"""Named tensors larger than memory: read in parts, handed on in blocks, hashed as they pass."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]
# What is read or hashed at once.
BLOCK_BYTES = 64 << 20
# Of numbers in safetensors files.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Block:
    """Rows `first` .. first + len(data) - 1 of tensor `name`, whose whole shape is `shape`, on the CPU."""

    name: str
    shape: Shape
    first: int
    data: Tensor


class Stream(Protocol):
    """Tensors that come in blocks, in name order; `table` has all their shapes."""

    @property
    def table(self) -> Mapping[str, Shape]: ...

    def __iter__(self) -> Iterator[Block]: ...


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read when asked for and not kept."""

    def shape(self, name: str) -> Shape:
        """A tensor's shape, without reading it."""
        raise NotImplementedError

    def part(self, name: str, *where: slice) -> Tensor:
        """A part of a tensor, a range per dimension; without ranges all of it."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.part(name)


class FileTensors(LazyTensors):
    """The tensors of one safetensors file. Raises ValueError if it is none, or not whole.

    It is read, not mapped: pages of a mapped file count as memory of the process, and one that is larger than the
    machine's memory can't be mapped as safetensors maps it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                size = path.stat().st_size
                if length > size:
                    raise ValueError(f"{size} bytes, its header alone should have {length}")
                table = json.loads(file.read(length))
            table.pop("__metadata__", None)
            self._entries = {name: (DTYPES[line["dtype"]], tuple(line["shape"])) for name, line in table.items()}
            self._begin = {name: 8 + length + line["data_offsets"][0] for name, line in table.items()}
            end = 8 + length + max((line["data_offsets"][1] for line in table.values()), default=0)
            if end != size:
                raise ValueError(f"{size} bytes, its header promises {end}")
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"{path}: cannot be read ({error}); the file is missing or damaged") from None

    def part(self, name: str, *where: slice) -> Tensor:
        dtype, shape = self._entries[name]
        ranges = [part.indices(size)[:2] for part, size in zip(where, shape, strict=False)]
        ranges += [(0, size) for size in shape[len(ranges) :]]
        found = torch.empty([end - begin for begin, end in ranges], dtype=dtype)
        if not found.numel():
            return found
        data = found.view(-1).view(torch.uint8).numpy().data
        # Runs of numbers that lie together: all that is asked for, or a part of each row.
        whole = all(taken == (0, size) for taken, size in zip(ranges[1:], shape[1:], strict=True))
        assert whole or len(shape) == 2
        width = dtype.itemsize * math.prod(shape[1:])
        run = len(data) if whole else found.size(1) * dtype.itemsize
        offset = self._begin[name] + (ranges[0][0] * width if shape else 0)
        if not whole:
            offset += ranges[1][0] * dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            for at in range(0, len(data), run):
                self._read(file, offset, data[at : at + run])
                offset += width
        return found

    def _read(self, file: io.FileIO, offset: int, data: memoryview) -> None:
        while data:
            count = os.preadv(file.fileno(), [data], offset)
            if not count:
                raise ValueError(f"{self.path}: ends at byte {offset}; the file was cut while it was read")
            data, offset = data[count:], offset + count

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> Shape:
        return self._entries[name][1]


class LayeredTensors(LazyTensors):
    """Some tensors, and for the names that they lack those of another mapping."""

    def __init__(self, over: Mapping[str, Tensor], under: Mapping[str, Tensor]):
        self._over, self._under = over, under

    def _at(self, name: str) -> Mapping[str, Tensor]:
        return self._over if name in self._over else self._under

    def part(self, name: str, *where: slice) -> Tensor:
        return part_of(self._at(name), name, *where)

    def __contains__(self, name: object) -> bool:
        return name in self._over or name in self._under

    def __iter__(self) -> Iterator[str]:
        yield from self._over
        yield from (name for name in self._under if name not in self._over)

    def __len__(self) -> int:
        return len(self._over.keys() | self._under.keys())

    def shape(self, name: str) -> Shape:
        return shape_of(self._at(name), name)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> Shape:
    """A tensor's shape; it is not read for that."""
    return tensors.shape(name) if isinstance(tensors, LazyTensors) else tuple(tensors[name].shape)


def part_of(tensors: Mapping[str, Tensor], name: str, *where: slice) -> Tensor:
    """A part of a tensor, a range per dimension; no more than that is read."""
    if isinstance(tensors, LazyTensors):
        return tensors.part(name, *where)
    return tensors[name][where] if where else tensors[name]


def blocks_of(tensors: Mapping[str, Tensor]) -> Iterator[Block]:
    """All of them, in name order, in blocks of about BLOCK_BYTES."""
    for name in sorted(tensors):
        shape = shape_of(tensors, name)
        rows = max(1, BLOCK_BYTES // max(1, 4 * math.prod(shape[1:]))) if shape else 1
        if not shape or rows >= shape[0]:
            yield Block(name, shape, 0, tensors[name].detach().cpu())
            continue
        for first in range(0, shape[0], rows):
            yield Block(name, shape, first, part_of(tensors, name, slice(first, first + rows)).detach().cpu())


@dataclass(frozen=True)
class HeldStream:
    """`Stream` of tensors that are there."""

    tensors: Mapping[str, Tensor]

    @property
    def table(self) -> Mapping[str, Shape]:
        return {name: shape_of(self.tensors, name) for name in sorted(self.tensors)}

    def __iter__(self) -> Iterator[Block]:
        return blocks_of(self.tensors)


@dataclass(frozen=True)
class ChangedStream:
    """Another stream, each block with other numbers."""

    stream: Stream
    change: Callable[[Block], Tensor]

    @property
    def table(self) -> Mapping[str, Shape]:
        return self.stream.table

    def __iter__(self) -> Iterator[Block]:
        for block in self.stream:
            yield replace(block, data=self.change(block))


def drain(stream: Iterable[Block]) -> None:
    """Do a rank's part of a stream whose blocks go to another, or are not wanted."""
    for _ in stream:
        pass


def collect(blocks: Iterable[Block]) -> dict[str, Tensor]:
    """Whole tensors from their blocks, in memory."""
    found: dict[str, Tensor] = {}
    for block in blocks:
        if tuple(block.data.shape) == block.shape:
            found[block.name] = block.data
            continue
        if not block.first:
            found[block.name] = torch.empty(block.shape, dtype=block.data.dtype)
        found[block.name][block.first : block.first + len(block.data)] = block.data
    return found


class Digest:
    """sha256 over names, shapes, dtypes and bytes of tensors that come in name order, in blocks. A thread hashes one
    block while the caller works on the next; it must not change a block that it handed over."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "digest")
        self._last: Future[None] | None = None

    def update(self, block: Block) -> None:
        """Take the next block; waits for the one before it."""
        self._settle()
        self._last = self._thread.submit(hash_block, self._sha, block)

    def passing(self, stream: Iterable[Block]) -> Iterator[Block]:
        """The stream, hashed as it passes."""
        for block in stream:
            self.update(block)
            yield block

    def hexdigest(self) -> str:
        self._settle()
        return self._sha.hexdigest()

    def _settle(self) -> None:
        if self._last is not None:
            self._last.result()
        self._last = None

    def __enter__(self) -> Digest:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


def hash_block(sha: Any, block: Block) -> None:
    """Add the next block to a hash."""
    if not block.first:
        sha.update(f"{block.name} {block.shape} {block.data.dtype}\n".encode())
    sha.update(block.data.contiguous().flatten().view(torch.uint8).numpy().data)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes in name order: two sides hold the same weights iff digests agree."""
    if isinstance(tensors, LazyTensors):
        # What is read is hashed while the next is being read.
        with Digest() as found:
            drain(found.passing(blocks_of(tensors)))
            return found.hexdigest()
    sha = hashlib.sha256()
    for block in blocks_of(tensors):
        hash_block(sha, block)
    return sha.hexdigest()
