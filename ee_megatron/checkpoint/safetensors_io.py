"""Writing safetensors files block by block, so that no file and no tensor has to be in memory whole.

The format: an unsigned 64-bit little-endian length, that many bytes of JSON (name -> dtype, shape, data_offsets), then
the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..tensors import DTYPES, Block, Digest, Stream
from .manifest import tensor_bytes
from .workspace import OutputFile

CODES = {dtype: code for code, dtype in DTYPES.items()}
Table = Mapping[str, tuple[torch.dtype, Sequence[int]]]


def nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * torch.Size(shape).numel()


def aligned(table: Table) -> list[str]:
    """Names in the order of the file: wide numbers first, so that each tensor begins at a multiple of its item size."""
    return sorted(table, key=lambda name: -table[name][0].itemsize)


class SafetensorsWriter:
    """One file. Its tensors are written in the order of `aligned(table)`, each in as many blocks as one likes.

    `metadata`: what the header says beside the tensors; transformers wants to know the format."""

    def __init__(
        self, path: Path, table: Table, metadata: Mapping[str, str] | None = MappingProxyType({"format": "pt"})
    ):
        header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in aligned(table):
            dtype, shape = table[name]
            if dtype not in CODES:
                raise ValueError(f"{name}: dtype {dtype} is not supported; supported: {', '.join(CODES.values())}")
            begin, end = end, end + nbytes(dtype, shape)
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._end = 8 + len(text) + end
        self._file = OutputFile(path)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, block: Tensor) -> None:
        self._file.write(tensor_bytes(block))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.__exit__(kind, *rest)
        if kind is None:
            size = Path(self._file.name).stat().st_size
            assert size == self._end, (self._file.name, size, self._end)


def write_through(path: Path, stream: Stream) -> Generator[Block, None, str]:
    """The stream, of which a file is made as it passes; returns the digest.

    The tensors are fp32; the file has the bytes that safetensors' own `save_file` gives it.
    """
    table = {name: (torch.float32, shape) for name, shape in sorted(stream.table.items())}
    with SafetensorsWriter(path, table, metadata=None) as writer, Digest() as found:
        for block in stream:
            if block.data.dtype != torch.float32:
                raise ValueError(f"{block.name}: dtype {block.data.dtype}, a checkpoint holds float32")
            found.update(block)
            writer.write(block.data)
            yield block
        return found.hexdigest()


def write_stream(path: Path, stream: Stream) -> str:
    """`write_through` for a stream that goes nowhere else."""
    passing = write_through(path, stream)
    while True:
        try:
            next(passing)
        except StopIteration as end:
            return end.value


def write_small(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A whole file of tensors that are in memory anyway."""
    table = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, table) as writer:
        for name in aligned(table):
            writer.write(tensors[name])


def read_small(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names begin with `prefix`, in memory. Raises ValueError if it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file or truncated ({error}); copy it again") from None


def places(path: Path) -> Iterator[tuple[str, tuple[Path, int, int]]]:
    """Name -> file, offset, length of every tensor of a file that is known to be sound."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        table = json.loads(file.read(length))
    for name, line in table.items():
        if name != "__metadata__":
            begin, end = line["data_offsets"]
            yield name, (path, 8 + length + begin, end - begin)
