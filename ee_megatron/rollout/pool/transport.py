"""How a version of the weights travels: in chunks of bytes that need no copy on arrival, compared tensor by tensor."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...config.schema import RolloutConfig
from ...policy import WeightSet, may_travel_in
from ...tensors import digest

# A chunk's size unless one tensor alone is larger: what the sender holds beside the weights while it packs.
CHUNK_BYTES = 64 << 20
# Tensors start at multiples of this, so that they can be used where they lie.
ALIGNMENT = 64


@dataclass
class Chunk:
    """Some tensors: (name, dtype, shape, first byte) each, and all their bytes, uint8 [N]."""

    entries: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    data: np.ndarray


def pack(tensors: dict[str, Tensor], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Every tensor once, in name order, as chunks of at most `chunk_bytes` (or of one tensor that is larger)."""
    entries: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if entries and start + tensor.nbytes > chunk_bytes:
            yield _fill(entries, end, tensors)
            entries, start = [], 0
        entries.append((name, tensor.dtype, tuple(tensor.shape), start))
        end = start + tensor.nbytes
    if entries:
        yield _fill(entries, end, tensors)


def _fill(entries: list[tuple[str, torch.dtype, tuple[int, ...], int]], size: int, tensors: dict[str, Tensor]) -> Chunk:
    data = np.empty(size, dtype=np.uint8)
    for name, _, _, start in entries:
        tensor = tensors[name].detach().cpu().contiguous()
        data[start : start + tensor.nbytes] = tensor.flatten().view(torch.uint8).numpy()
    return Chunk(entries, data)


def unpack(chunk: Chunk) -> dict[str, Tensor]:
    """The tensors where the chunk's bytes lie: to be read, never written."""
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


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """name -> digest of this tensor alone."""
    return {name: digest({name: tensor}) for name, tensor in tensors.items()}


def first_difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """A line on the first tensor, in name order, that one side lacks or whose hash differs; None: all are equal."""
    differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if not differing:
        return None
    here, there = (side.get(differing[0], "missing")[:12] for side in (expected, found))
    return f"{differing[0]} is {here} here and {there} there ({len(differing)} of {len(expected)} tensors differ)"
