"""Named tensors that may be larger than memory: read in parts, streamed in blocks of rows, hashed while streaming; and
how tensors travel between host and device."""

from __future__ import annotations

import hashlib
import math
import mmap
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .families import ModelDims
from .families.hf_directory import read_header

Shape = tuple[int, ...]
Record = TypeVar("Record")
Entries = Mapping[str, tuple[torch.dtype, Shape]]
# What is read, written or hashed at once, and how much may wait to be hashed.
BLOCK_BYTES = 64 << 20
IN_FLIGHT = 160 << 20
AHEAD = 3
# Of numbers in safetensors files.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Block:
    """A part of a tensor, on the CPU: rows `first` .. first + len(data) - 1 of `name`, whose whole shape is `shape`."""

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
    """Tensors that are read on access, not cached. `entries`: dtype and shape of each, known without reading it."""

    entries: Entries

    def part(self, name: str, *where: slice) -> Tensor:
        """Read a part of a tensor, a range per dimension; without ranges all of it."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.entries:
            raise KeyError(name)
        return self.part(name)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name][0]

    def shape(self, name: str) -> Shape:
        return self.entries[name][1]

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.entries.values())


class ModelSource(LazyTensors):
    """A model to read: its directory, its config.json and dimensions, its tensors by their Hugging Face names.

    tokenizer: the directory with tokenizer and templates. digests: SHA-256 of tensors, as far as they are on record.
    """

    path: Path
    config: dict
    dims: ModelDims
    tokenizer: Path
    digests: Mapping[str, str] = {}

    def tensor(self, name: str) -> Tensor:
        """The whole tensor on the CPU, in the dtype that it is stored in."""
        return self.part(name)

    def fingerprint(self) -> list[list]:
        """Name, size and time of change of the directory's files: resumed work must find the same. JSON-able."""
        return file_stamps(self.path, "*", "weights/*")


def file_stamps(folder: Path, *patterns: str) -> list[list]:
    """[relative path, size, time of change in ns] of every file in `folder` that matches a pattern."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def map_file(path: Path, offset: int, dtype: torch.dtype, shape: Shape, soon: bool = True) -> Tensor:
    """A part of a file as a tensor, mapped copy-on-write: memory fills as it is looked at and is freed with the tensor.

    `soon`: have the system start reading now. Raises ValueError or OSError if the file is too short or missing.
    """
    size = dtype.itemsize * math.prod(shape)
    if not size:
        return torch.empty(shape, dtype=dtype)
    skip = offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        area = mmap.mmap(file.fileno(), skip + size, access=mmap.ACCESS_COPY, offset=offset - skip)
    if soon and hasattr(mmap, "MADV_WILLNEED"):
        area.madvise(mmap.MADV_WILLNEED)
    flat = torch.frombuffer(area, dtype=torch.uint8, offset=skip, count=size)
    return (flat.clone() if offset % dtype.itemsize else flat).view(dtype).view(shape)


class FileTensors(LazyTensors):
    """Tensors of one or several safetensors files: name -> file. Only requested parts are read, whole files are never
    mapped. `dtype`: to convert to; None: as they are stored.

    Raises ValueError or FileNotFoundError for a file that is missing, damaged or of unsupported dtypes."""

    def __init__(self, files: Path | Mapping[str, Path], dtype: torch.dtype | None = None):
        self.path = files if isinstance(files, Path) else None
        paths = {files} if isinstance(files, Path) else set(files.values())
        self._places: dict[str, tuple[Path, int, torch.dtype]] = {}
        entries = {}
        for path in sorted(paths):
            for name, line in read_header(path).items():
                if not isinstance(files, Path) and files.get(name) != path:
                    continue
                if line.dtype not in DTYPES:
                    raise ValueError(f"{path}: {name} is stored as {line.dtype}; supported: {', '.join(DTYPES)}")
                entries[name] = dtype or DTYPES[line.dtype], line.shape
                self._places[name] = path, line.offset, DTYPES[line.dtype]
        self.entries = entries if isinstance(files, Path) else {name: entries[name] for name in files}

    def part(self, name: str, *where: slice) -> Tensor:
        (path, offset, dtype), (wanted, shape) = self._places[name], self.entries[name]
        if not shape or not where:
            return map_file(path, offset, dtype, shape).to(wanted)
        first, end, _ = where[0].indices(shape[0])
        rows = max(0, end - first), *shape[1:]
        offset += first * dtype.itemsize * math.prod(shape[1:])
        # Of a few columns only the pages that they lie in are read.
        return map_file(path, offset, dtype, rows, soon=len(where) == 1)[(slice(None), *where[1:])].to(wanted)


class LayeredTensors(LazyTensors):
    """Some tensors, with those of another mapping for missing names."""

    def __init__(self, over: Mapping[str, Tensor], under: Mapping[str, Tensor]):
        self._over, self._under = over, under
        above = entries_of(over)
        self.entries = {**above, **{name: entry for name, entry in entries_of(under).items() if name not in above}}

    def part(self, name: str, *where: slice) -> Tensor:
        return part_of(self._over if name in self._over else self._under, name, *where)


def entries_of(tensors: Mapping[str, Tensor]) -> Entries:
    """Dtype and shape of each tensor, without reading it."""
    if isinstance(tensors, LazyTensors):
        return tensors.entries
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def shape_of(tensors: Mapping[str, Tensor], name: str) -> Shape:
    """Shape of a tensor, without reading it."""
    return tensors.shape(name) if isinstance(tensors, LazyTensors) else tuple(tensors[name].shape)


def part_of(tensors: Mapping[str, Tensor], name: str, *where: slice) -> Tensor:
    """Read a part of a tensor, a range per dimension."""
    if isinstance(tensors, LazyTensors):
        return tensors.part(name, *where)
    return tensors[name][where] if where else tensors[name]


def row_blocks(tensors: Mapping[str, Tensor], name: str) -> Iterator[Block]:
    """Yield one tensor in blocks of rows of at most BLOCK_BYTES in float32 (or one row); the same for every dtype."""
    shape = shape_of(tensors, name)
    rows = max(1, BLOCK_BYTES // max(1, 4 * math.prod(shape[1:]))) if shape else 1
    if not shape or rows >= shape[0]:
        yield Block(name, shape, 0, tensors[name].detach().cpu())
        return
    for first in range(0, shape[0], rows):
        yield Block(name, shape, first, part_of(tensors, name, slice(first, first + rows)).detach().cpu())


def blocks_of(tensors: Mapping[str, Tensor]) -> Iterator[Block]:
    """Iterate over all tensors, in name order, in `row_blocks`."""
    for name in sorted(tensors):
        yield from row_blocks(tensors, name)


def prefetch(items: Iterable[Any]) -> Iterator[Any]:
    """Iterate AHEAD items ahead of the consumer: of mapped files the system reads that much in advance."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


@dataclass(frozen=True)
class HeldStream:
    """`Stream` of tensors in memory."""

    tensors: Mapping[str, Tensor]

    @property
    def table(self) -> Mapping[str, Shape]:
        return {name: shape_of(self.tensors, name) for name in sorted(self.tensors)}

    def __iter__(self) -> Iterator[Block]:
        return blocks_of(self.tensors)


@dataclass(frozen=True)
class ChangedStream:
    """`Stream` of another stream's blocks with changed numbers."""

    stream: Stream
    change: Callable[[Block], Tensor]

    @property
    def table(self) -> Mapping[str, Shape]:
        return self.stream.table

    def __iter__(self) -> Iterator[Block]:
        for block in self.stream:
            yield replace(block, data=self.change(block))


def drain(stream: Iterable[Block]) -> None:
    """Iterate to the end: a rank's part of a stream whose blocks go to another, or are not used."""
    for _ in stream:
        pass


def collect(blocks: Iterable[Block]) -> dict[str, Tensor]:
    """Whole tensors from their blocks, in memory."""
    tensors: dict[str, Tensor] = {}
    for block in blocks:
        if tuple(block.data.shape) == block.shape:
            tensors[block.name] = block.data
            continue
        if not block.first:
            tensors[block.name] = torch.empty(block.shape, dtype=block.data.dtype)
        tensors[block.name][block.first : block.first + len(block.data)] = block.data
    return tensors


class Hasher:
    """Computes SHA-256 digests in a background thread, so that blocks are hashed while others are read and written.

    At most `limit` bytes (or one block) wait. A context manager: digests end with it.
    """

    def __init__(self, limit: int = IN_FLIGHT) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, "digest")
        self._waiting: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, work: Callable[..., None], data: Tensor, *more: Any) -> Future[None]:
        """Call `work(data, *more)` later; waits while more than the limit would wait."""
        while self._waiting and sum(size for _, size in self._waiting) + data.nbytes > self._limit:
            self._waiting.popleft()[0].result()
        future = self._pool.submit(work, data, *more)
        self._waiting.append((future, data.nbytes))
        return future


class Digest:
    """Computes the SHA-256 of tensors that come in blocks. A block must not change before `hexdigest`."""

    def __init__(self, hasher: Hasher):
        self._hasher, self._sha = hasher, hashlib.sha256()
        self._last: Future[None] | None = None

    def update(self, data: Tensor, header: str = "") -> None:
        """Add `header` and the bytes of a CPU tensor in row-major order."""
        self._last = self._hasher.submit(self._add, data, header)

    def add_block(self, block: Block) -> None:
        """Add the next block of a stream, as `digest` does: name, shape and dtype come before a tensor's bytes."""
        self.update(block.data, _header(block))

    def passing(self, stream: Iterable[Block]) -> Iterator[Block]:
        """Wrap a stream: hash it while it is consumed."""
        for block in stream:
            self.add_block(block)
            yield block

    def hexdigest(self) -> str:
        """Wait for the blocks so far and return the digest."""
        if self._last is not None:
            self._last.result()
        return self._sha.hexdigest()

    def _add(self, data: Tensor, header: str) -> None:
        self._sha.update(header.encode())
        self._sha.update(tensor_bytes(data))


def _header(block: Block) -> str:
    return "" if block.first else f"{block.name} {block.shape} {block.data.dtype}\n"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes in name order: two sides have the same weights iff digests agree."""
    sha = hashlib.sha256()
    blocks = blocks_of(tensors)
    for block in prefetch(blocks) if isinstance(tensors, LazyTensors) else blocks:
        sha.update(_header(block).encode())
        sha.update(tensor_bytes(block.data))
    return sha.hexdigest()


def to_device(record: Record, device: torch.device) -> Record:
    """The record with every tensor of the CPU in it on `device`: tensors, dataclasses, tuples and lists of them.

    One transfer per dtype, from pinned memory, which does not make the host wait. On the CPU the record itself.
    """
    if device.type == "cpu":
        return record
    groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)

    def group(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            groups[tensor.dtype].append(tensor.detach())
        return tensor

    _mapped(record, group)
    moved: dict[torch.dtype, Iterator[Tensor]] = {}
    for dtype, tensors in groups.items():
        sizes = [tensor.numel() for tensor in tensors]
        flat = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type != "meta")
        torch.cat([tensor.flatten() for tensor in tensors], out=flat)
        parts = flat.to(device, non_blocking=True).split(sizes)
        moved[dtype] = iter([part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])
    return _mapped(record, lambda tensor: next(moved[tensor.dtype]) if tensor.device.type == "cpu" else tensor)


def _mapped(record: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(record, Tensor):
        return change(record)
    if is_dataclass(record) and not isinstance(record, type):
        named = {field.name: _mapped(getattr(record, field.name), change) for field in fields(record) if field.init}
        return replace(record, **named)
    return type(record)([_mapped(part, change) for part in record]) if isinstance(record, tuple | list) else record


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU, in pinned memory; the host waits once for all. Those of the CPU themselves."""
    found = [
        x if x.device.type == "cpu"
        else torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x.detach(), non_blocking=True)
        for x in tensors
    ]  # fmt: skip
    for device in {x.device for x in tensors if x.device.type != "cpu"}:
        torch.get_device_module(device).current_stream(device).synchronize()
    return found
