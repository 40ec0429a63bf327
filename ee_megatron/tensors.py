"""Named tensors larger than memory: read in parts, handed on in blocks, hashed as they pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Shape = tuple[int, ...]
# What is read or hashed at once, and how much of a mapped file stays in memory.
BLOCK_BYTES = 64 << 20


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
    """The tensors of one safetensors file. Raises ValueError if it is none."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: Any = None
        self._read = 0
        file = self._file()
        self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def part(self, name: str, *where: slice) -> Tensor:
        found = self._file().get_slice(name)[where or slice(None)].clone()
        # A mapped file counts as memory of the process as far as it was read.
        self._read += found.nbytes
        if self._read > BLOCK_BYTES:
            self._handle, self._read = None, 0
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def _file(self) -> Any:
        if self._handle is None:
            try:
                self._handle = safe_open(self.path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path}: cannot be read ({error}); the file is missing or damaged") from None
        return self._handle


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
