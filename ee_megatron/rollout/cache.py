"""The decoder's key/value cache: one contiguous slot per row, index = position in the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families import ModelDims


class KVCache:
    """keys, values [L, R, S, KVH, hd]; row r holds valid entries at positions 0..length-1, which its owner counts.

    Entries past a row's length are finite leftovers (zeros or an earlier row's): attention masks them.
    """

    def __init__(self, dims: ModelDims, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (dims.num_layers, rows, capacity, dims.kv_heads, dims.head_dim)
        self.rows, self.capacity = rows, capacity
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def fill(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [L, T, KVH, hd] of one sequence at positions start..start+T-1 of a row."""
        stop = start + keys.shape[1]
        self.keys[:, row, start:stop] = keys
        self.values[:, row, start:stop] = values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a row onto another, so that occupied rows stay a prefix."""
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]
