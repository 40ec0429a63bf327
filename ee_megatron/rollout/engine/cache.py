"""The decoder's key/value cache: one contiguous slot per row, index = position in the sequence; it grows as needed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...families import ModelDims


class KVCache:
    """keys, values [L, R, S, KVH, hd]; slot r holds valid entries at positions 0..length-1, which its owner counts.

    Entries past a row's length are finite leftovers (zeros or an earlier row's) that attention never reads or masks.
    """

    def __init__(self, dims: ModelDims, rows: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.rows, self.capacity = rows, capacity
        self._shape = (dims.num_layers, rows, dims.kv_heads, dims.head_dim)
        self.keys, self.values = (self._zeros(capacity, dtype, device) for _ in range(2))

    def fill(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [L, T, KVH, hd] of one sequence at positions start..start+T-1 of a slot."""
        stop = start + keys.shape[1]
        self.keys[:, row, start:stop] = keys
        self.values[:, row, start:stop] = values

    def reserve(self, positions: int, longest: int, used: int) -> None:
        """Make room for `positions` per slot: at least doubles, up to `longest`; the first `used` slots stay."""
        if positions <= self.capacity:
            return
        old = self.capacity
        self.capacity = max(positions, min(longest, 2 * old))
        for name in ("keys", "values"):
            before: Tensor = getattr(self, name)
            after = self._zeros(self.capacity, before.dtype, before.device)
            after[:, :used, :old] = before[:, :used]
            setattr(self, name, after)

    def _zeros(self, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        layers, rows, heads, size = self._shape
        # Fresh zeros take no memory on a CPU until they are written: slots that are never used cost nothing.
        return torch.zeros(layers, rows, capacity, heads, size, dtype=dtype, device=device)
