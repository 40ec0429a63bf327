"""Megatron-core's torch_dist format, read and written in one process, chunk by chunk, without process groups.

    metadata.json    which format this is
    common.pt        what is not a tensor: common_state.py
    .metadata        per parameter: global shape, dtype, its chunks; per chunk: file, offset, length
    *.distcp         chunks, each as `torch.save` writes a tensor, one after another, each at a multiple of ALIGNMENT

The layout is that of torch.distributed.checkpoint, so its readers and megatron-core's load what is written here.
"""

from __future__ import annotations

import io
import itertools
import json
import mmap
import pickle
import struct
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .workspace import OutputFile

FORMAT = "metadata.json"
EMPTY_OBJECT = "objects.distcp"
# What torch.save gives the numbers within a chunk; with the chunk at a multiple of it, they are aligned in the file.
ALIGNMENT = 8
# The classes that a .metadata file consists of. It is a pickle: anything else in it is refused, not executed.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}


@dataclass(frozen=True)
class StoredChunk:
    """Where one box of a parameter is: its offsets and sizes in the whole, its file, offset and length there."""

    parameter: str
    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int

    @staticmethod
    def from_json(data: dict[str, Any]) -> StoredChunk:
        """From its fields, tuples being lists."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return StoredChunk(**fields)


class ChunkFile:
    """One *.distcp file that is being written; `chunks` is what it holds."""

    def __init__(self, folder: Path, name: str):
        self.name, self.chunks = name, list[StoredChunk]()
        self._file = OutputFile(folder / name)

    def add(self, parameter: str, shape: Sequence[int], offsets: Sequence[int], tensor: Tensor) -> None:
        """Append the box of `parameter` (whole shape `shape`) that begins at `offsets`. Raises OSError: disk full."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        begin = self._file.tell()
        # torch.save writes the storage that a tensor looks at; this gives it one that ends where the tensor does.
        flat = torch.from_numpy(tensor.contiguous().flatten().view(torch.uint8).numpy())
        checksums = torch.serialization.get_crc32_options()
        try:
            # No reader of the format looks at them, and they take as long as the sha256 that the manifest has.
            torch.serialization.set_crc32_options(False)
            torch.save(flat.view(tensor.dtype).view(tensor.shape), cast(IO[bytes], self._file))
        except RuntimeError:
            # torch.save hides what the file said under a complaint of its own about positions.
            raise OSError(f"{self._file.name}: cannot be written; is the disk full?") from None
        finally:
            torch.serialization.set_crc32_options(checksums)
        dtype = str(tensor.dtype).removeprefix("torch.")
        length = self._file.tell() - begin
        sizes = tuple(tensor.shape)
        self.chunks.append(StoredChunk(parameter, tuple(shape), dtype, tuple(offsets), sizes, self.name, begin, length))

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.__exit__(kind, *rest)


def write_metadata(folder: Path, chunks: Sequence[StoredChunk], empty: Iterable[str] = ()) -> None:
    """Finish a checkpoint whose chunks and common.pt are written. Raises ValueError unless they tile every parameter.

    empty: names of objects that readers ask for and that hold nothing: all are one `[None]` in a file of its own.
    """
    by_name: dict[str, list[StoredChunk]] = defaultdict(list)
    for chunk in chunks:
        by_name[chunk.parameter].append(chunk)
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name, own in by_name.items():
        check_tiling(name, own)
        boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in own]
        properties = TensorProperties(dtype=getattr(torch, own[0].dtype))
        tensors[name] = TensorStorageMetadata(properties, torch.Size(own[0].shape), boxes)
        for number, c in enumerate(own):
            storage[MetadataIndex(name, c.offsets, number)] = _StorageInfo(c.file, c.offset, c.length)
    for name in empty:
        if not (folder / EMPTY_OBJECT).exists():
            # megatron-core stores a list: one object for every rank-local copy of the name.
            torch.save([None], folder / EMPTY_OBJECT)
        tensors[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(EMPTY_OBJECT, 0, (folder / EMPTY_OBJECT).stat().st_size)
    metadata = Metadata(tensors, {}, storage, StorageMeta(), CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    facts = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    facts |= {"common_backend": "torch", "common_backend_version": 1}
    # Last: what has no metadata.json is no checkpoint.
    (folder / FORMAT).write_text(json.dumps(facts))


def check_tiling(name: str, chunks: Sequence[StoredChunk]) -> None:
    """Raises ValueError unless the boxes lie inside the parameter, do not overlap and leave nothing out."""
    shape, dtype = chunks[0].shape, chunks[0].dtype
    inside = all(
        len(c.sizes) == len(c.offsets) == len(shape)
        and c.shape == shape
        and c.dtype == dtype
        and all(o >= 0 and o + s <= n for o, s, n in zip(c.offsets, c.sizes, shape, strict=True))
        for c in chunks
    )
    covered = sum(torch.Size(c.sizes).numel() for c in chunks)
    if not inside or _any_overlap(chunks) or covered != torch.Size(shape).numel():
        raise ValueError(
            f"{name}: its chunks do not make up a tensor of shape {list(shape)}; the checkpoint is damaged"
        )


def _any_overlap(chunks: Sequence[StoredChunk]) -> bool:
    """Only boxes that begin before the one in hand ends are compared with it: stacked layers are thousands of boxes."""
    in_order = sorted(chunks, key=lambda c: c.offsets)
    for number, chunk in enumerate(in_order):
        for other in in_order[number + 1 :]:
            if chunk.offsets and other.offsets[0] >= chunk.offsets[0] + chunk.sizes[0]:
                break
            if _overlap(chunk, other):
                return True
    return False


def _overlap(a: StoredChunk, b: StoredChunk) -> bool:
    boxes = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(ao < bo + bs and bo < ao + as_ for ao, as_, bo, bs in boxes)


class TorchDistReader:
    """A torch_dist directory. Opening it reads the metadata only; tensors are read one chunk at a time.

    A tensor that is one chunk is the file itself, mapped copy-on-write: no memory is filled before it is looked at, and
    letting go of the tensor gives it back.

    named: by which name a chunk is known, and as part of which shape (None: not at all); remedy: what to do about a
    damaged checkpoint.

    Raises FileNotFoundError or ValueError, one line: no checkpoint, another format, metadata that cannot be read or
    does not fit its files.
    """

    def __init__(
        self,
        folder: Path,
        named: Callable[[StoredChunk], StoredChunk | None] = lambda chunk: chunk,
        remedy: str = "convert it again",
    ):
        self.folder, self._remedy = folder, remedy
        if not (folder / FORMAT).is_file():
            raise FileNotFoundError(f"{folder}: no {FORMAT} there; the checkpoint is incomplete, {remedy}")
        try:
            backend = json.loads((folder / FORMAT).read_text()).get("sharded_backend")
        except json.JSONDecodeError:
            backend = "unreadable"
        if backend != "torch_dist":
            raise ValueError(f"{folder / FORMAT}: format {backend!r}, expected 'torch_dist'; {remedy}")
        self.chunks: dict[str, list[StoredChunk]] = defaultdict(list)
        for chunk in filter(None, map(named, self._read_metadata())):
            self.chunks[chunk.parameter].append(chunk)
        for name, chunks in self.chunks.items():
            check_tiling(name, chunks)
            # In the order of rows, then columns: what `blocks` relies on.
            chunks.sort(key=lambda c: c.offsets)
        self._check_files()

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The whole parameter's shape. Raises KeyError for an unknown one."""
        return self.chunks[parameter][0].shape

    def dtype(self, parameter: str) -> torch.dtype:
        return getattr(torch, self.chunks[parameter][0].dtype)

    def read(self, parameter: str, part: int = 0, parts: int = 1) -> Tensor:
        """The whole parameter, or one of its `parts` equal shares of rows, on the CPU."""
        rows, *rest = self.shape(parameter)
        begin, end = part * rows // parts, (part + 1) * rows // parts
        chunks = [c for c in self.chunks[parameter] if c.offsets[0] < end and begin < c.offsets[0] + c.sizes[0]]
        if len(chunks) == 1 and chunks[0].sizes == (end - begin, *rest):
            return self._load(chunks[0])
        whole = torch.empty((end - begin, *rest), dtype=self.dtype(parameter))
        for chunk in chunks:
            first, last = max(begin, chunk.offsets[0]), min(end, chunk.offsets[0] + chunk.sizes[0])
            columns = [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            inside = slice(first - chunk.offsets[0], last - chunk.offsets[0])
            whole[(slice(first - begin, last - begin), *columns)] = self._load(chunk)[inside]
        return whole

    def blocks(self, parameter: str) -> Iterator[Tensor]:
        """The parameter as consecutive blocks of rows: chunk by chunk where chunks are whole rows, else in one."""
        chunks = self.chunks[parameter]
        if all(chunk.sizes[1:] == chunk.shape[1:] for chunk in chunks):
            yield from (self._load(chunk) for chunk in chunks)
        else:
            yield self.read(parameter)

    def _load(self, chunk: StoredChunk) -> Tensor:
        path = self.folder / chunk.file
        try:
            with path.open("rb", buffering=0) as file:
                part: Any = _Part(file, chunk.offset, chunk.length)
                tensor = torch.load(part, map_location="meta", weights_only=True)
                if isinstance(tensor, Tensor):
                    place = _numbers(_Part(file, chunk.offset, chunk.length), tensor)
                    if place is None:
                        part.seek(0)
                        tensor = torch.load(part, map_location="cpu", weights_only=True)
                    else:
                        tensor = _mapped(file, chunk.offset + place, tensor)
        # The unpickler of damaged bytes raises whatever its operations raise.
        except Exception as error:
            raise ValueError(self._damaged(path.name, error)) from None
        if (
            not isinstance(tensor, Tensor)
            or tuple(tensor.shape) not in (chunk.sizes, (1, *chunk.sizes))
            or tensor.dtype != self.dtype(chunk.parameter)
        ):
            raise ValueError(self._damaged(path.name, f"{chunk.parameter} is not what .metadata says"))
        # A layer of a stack of layers is known by its own shape.
        return tensor.view(chunk.sizes)

    def _read_metadata(self) -> Iterator[StoredChunk]:
        try:
            metadata = _Metadata((self.folder / ".metadata").open("rb")).load()
            tensors = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
            for name, tensor in tensors.items():
                dtype = str(tensor.properties.dtype).removeprefix("torch.")
                for box in tensor.chunks:
                    info = metadata.storage_data[MetadataIndex(name, box.offsets)]
                    place = info.relative_path, info.offset, info.length
                    yield StoredChunk(name, tuple(tensor.size), dtype, tuple(box.offsets), tuple(box.sizes), *place)
        except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, IndexError, OSError) as error:
            raise ValueError(self._damaged(".metadata", error)) from None

    def _check_files(self) -> None:
        need: dict[str, int] = defaultdict(int)
        for chunk in itertools.chain.from_iterable(self.chunks.values()):
            need[chunk.file] = max(need[chunk.file], chunk.offset + chunk.length)
        for file, size in need.items():
            path = self.folder / file
            found = path.stat().st_size if path.is_file() and path.parent == self.folder else -1
            if found < size:
                state = f"{found} bytes, {size} expected" if found >= 0 else "missing"
                raise ValueError(self._damaged(file, state))

    def _damaged(self, file: str, reason: object) -> str:
        text = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        return f"{self.folder / file}: cannot be read ({text}); the checkpoint is damaged, {self._remedy}"


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _numbers(part: _Part, tensor: Tensor) -> int | None:
    """Where in a chunk the numbers of its (contiguous) tensor begin, or None: they are not there as they are needed.

    A chunk is a zip archive: <prefix>/data.pkl, <prefix>/byteorder, and <prefix>/data/<key> for every storage.
    """
    with zipfile.ZipFile(cast(IO[bytes], part)) as archive:
        records = archive.infolist()
    storages = [info for info in records if "/data/" in info.filename]
    if len(storages) != 1 or not tensor.is_contiguous() or any(info.compress_type for info in records):
        return None
    for info in records:
        if info.filename.endswith("/byteorder"):
            # Not by the archive's own means, which insist on the checksums that are left out.
            part.seek(_content(part, info))
            if part.read(info.file_size) != sys.byteorder.encode():
                return None
    first = int(tensor.storage_offset()) * tensor.itemsize
    if first + tensor.nbytes > storages[0].file_size:
        raise ValueError(f"{storages[0].file_size} bytes for a tensor of {tensor.nbytes}")
    return _content(part, storages[0]) + first


def _content(part: _Part, info: zipfile.ZipInfo) -> int:
    """Where the content of a record begins: behind 30 bytes that end in the lengths of its name and of padding."""
    part.seek(info.header_offset)
    magic, name, padding = struct.unpack("<4s22xHH", part.read(30))
    begin = info.header_offset + 30 + name + padding
    if magic != b"PK\3\4" or begin + info.file_size > part.length:
        raise ValueError(f"no record at byte {info.header_offset}")
    return begin


def _mapped(file: io.FileIO, offset: int, like: Tensor) -> Tensor:
    """A part of a file as a tensor of the shape and dtype of `like`; later changes of the tensor stay in memory."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    skip = offset % mmap.ALLOCATIONGRANULARITY
    area = mmap.mmap(file.fileno(), skip + like.nbytes, access=mmap.ACCESS_COPY, offset=offset - skip)
    flat = torch.frombuffer(area, dtype=torch.uint8, offset=skip)
    if offset % like.itemsize:
        flat = flat.clone()
    return flat.view(like.dtype).view(like.shape)


class _Part(io.RawIOBase):
    """A window of an open file, as a file of its own."""

    def __init__(self, file: io.FileIO, offset: int, length: int):
        self._file, self._begin, self._at = file, offset, 0
        self.length = length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self._at)]
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count
