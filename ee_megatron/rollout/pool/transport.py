"""How a version of the weights travels: in chunks of bytes that need no copy on arrival, compared tensor by tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...config.schema import RolloutConfig
from ...policy import WeightSet, may_travel_in
from ...tensors import Shape, Stream, digest

# A chunk's size unless one tensor alone is larger: what the sender holds beside the weights while it packs.
CHUNK_BYTES = 64 << 20
# Tensors start at multiples of this, so that they can be used where they lie.
ALIGNMENT = 64


Entry = tuple[str, torch.dtype, Shape, int]


@dataclass
class Chunk:
    """Some tensors: (name, dtype, shape, first byte) each, and all their bytes, uint8 [N]."""

    entries: list[Entry]
    data: np.ndarray


def pack(stream: Stream, dtype_of: Callable[[str], torch.dtype], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Every tensor once, rounded to its dtype, in name order, as chunks of at most `chunk_bytes` (or of one tensor that
    is larger). A chunk is there as soon as its tensors are."""
    blocks = iter(stream)
    for entries, size in _layout(stream.table, dtype_of, chunk_bytes):
        chunk = Chunk(entries, np.empty(size, dtype=np.uint8))
        for name, tensor in unpack(chunk).items():
            filled = 0
            while filled < tensor.numel():
                block = next(blocks)
                assert block.name == name, (block.name, name)
                target = tensor[block.first : block.first + len(block.data)] if tensor.dim() else tensor
                target.copy_(block.data)
                filled += block.data.numel()
        yield chunk
    # To its end: whoever makes the blocks may have something to do there.
    assert not list(blocks)


def _layout(
    table: Mapping[str, Shape], dtype_of: Callable[[str], torch.dtype], chunk_bytes: int
) -> Iterator[tuple[list[Entry], int]]:
    entries: list[Entry] = []
    end = 0
    for name in sorted(table):
        dtype, shape = dtype_of(name), table[name]
        start, size = -(-end // ALIGNMENT) * ALIGNMENT, dtype.itemsize * math.prod(shape)
        if entries and start + size > chunk_bytes:
            yield entries, end
            entries, start = [], 0
        entries.append((name, dtype, shape, start))
        end = start + size
    if entries:
        yield entries, end


def unpack(chunk: Chunk) -> dict[str, Tensor]:
    """The tensors where the chunk's bytes lie: once it has travelled to be read, never written."""
    with warnings.catch_warnings():
        # torch has no tensors that can't be written and says so.
        warnings.simplefilter("ignore", UserWarning)
        whole = torch.from_numpy(chunk.data)
    found = {}
    for name, dtype, shape, start in chunk.entries:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        found[name] = whole[start : start + size].view(dtype).view(shape)
    return found


def sync_dtype(rollout: RolloutConfig) -> torch.dtype | None:
    """What weights are narrowed to on their way; None: nothing is."""
    return torch.bfloat16 if rollout.sync_dtype == "bfloat16" else None


def travels_in(name: str, dtype: torch.dtype | None, decoder: torch.dtype) -> torch.dtype:
    """What a policy tensor travels in, where they are narrowed to `dtype`, to a decoder of dtype `decoder`."""
    return dtype if dtype is not None and may_travel_in(dtype, name, decoder) else torch.float32


def narrowed(weights: WeightSet, dtype: torch.dtype | None, decoder: torch.dtype) -> WeightSet:
    """The same version with the tensors that may travel in `dtype` (None: as they are) to a decoder of dtype `decoder`
    in it; where that changes any it has a digest of its own."""
    if dtype is None:
        return weights
    tensors = {
        name: tensor.detach().to(dtype) if may_travel_in(dtype, name, decoder) else tensor
        for name, tensor in weights.tensors.items()
    }
    if all(tensors[name].dtype == tensor.dtype for name, tensor in weights.tensors.items()):
        return weights
    return WeightSet(weights.version, tensors)


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """name -> digest of this tensor alone."""
    return {name: digest({name: tensor}) for name, tensor in tensors.items()}


def first_difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """A line on the first tensor, in name order, that one side lacks or whose hash differs; None: all are equal."""
    differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if not differing:
        return None
    here, there = (side.get(differing[0], "missing")[:12] for side in (expected, found))
    return f"{differing[0]} is {here} here and {there} there ({len(differing)} of {len(expected)} tensors differ)"
