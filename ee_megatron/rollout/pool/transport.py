"""Transfer of a version of the weights: in chunks that need no copy on arrival."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ...config.schema import RolloutConfig
from ...policy import WeightSet, may_travel_in
from ...tensors import Shape, Stream

# A chunk's size unless one tensor alone is larger: what the sender holds beside the weights while it packs.
CHUNK_BYTES = 64 << 20
Chunk = dict[str, tuple[torch.dtype, Shape, np.ndarray]]
"""Some tensors by name: dtype, shape and bytes, uint8 [N], which Ray's object store hands out where they lie."""


def pack(stream: Stream, dtype_of: Callable[[str], torch.dtype], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Pack every tensor once, rounded to its dtype, in name order, into chunks of at most `chunk_bytes` (or of one
    tensor that is larger)."""
    table, chunk, size = stream.table, Chunk(), 0
    for name, blocks in groupby(stream, lambda block: block.name):
        whole = torch.empty(table[name], dtype=dtype_of(name))
        for block in blocks:
            target = whole[block.first : block.first + len(block.data)] if whole.dim() else whole
            target.copy_(block.data)
        if chunk and size + whole.nbytes > chunk_bytes:
            yield chunk
            chunk, size = Chunk(), 0
        chunk[name] = whole.dtype, tuple(whole.shape), whole.flatten().view(torch.uint8).numpy()
        size += whole.nbytes
    if chunk:
        yield chunk


def unpack(chunk: Chunk) -> dict[str, Tensor]:
    """Views of the tensors in a chunk's bytes: read-only once it has been transferred."""
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns.
        warnings.simplefilter("ignore", UserWarning)
        return {name: torch.from_numpy(data).view(dtype).view(shape) for name, (dtype, shape, data) in chunk.items()}


def sync_dtype(rollout: RolloutConfig) -> torch.dtype | None:
    """Dtype that weights are narrowed to for transfer; None: they aren't."""
    return torch.bfloat16 if rollout.sync_dtype == "bfloat16" else None


def travels_in(name: str, dtype: torch.dtype | None, decoder: torch.dtype) -> torch.dtype:
    """Dtype in which a policy tensor is transferred to a decoder of dtype `decoder`, if narrowed to `dtype`."""
    return dtype if dtype is not None and may_travel_in(dtype, name, decoder) else torch.float32


def narrowed(weights: WeightSet, dtype: torch.dtype | None, decoder: torch.dtype) -> WeightSet:
    """The same version with the tensors that may be narrowed in `dtype` (None: none are) for a decoder of dtype
    `decoder`; if that changes any it has a digest of its own."""
    if dtype is None:
        return weights
    tensors = {name: tensor.detach().to(travels_in(name, dtype, decoder)) for name, tensor in weights.tensors.items()}
    if all(tensors[name].dtype == tensor.dtype for name, tensor in weights.tensors.items()):
        return weights
    return WeightSet(weights.version, tensors)
