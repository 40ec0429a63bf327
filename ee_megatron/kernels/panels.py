"""Matrices as product.c multiplies with them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compiled
from .compiled import PAIRS, Library, Product, pointer


class Panels:
    """Packed for product.c; with `wide` results are float32 whatever W's dtype is."""

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None, wide: bool):
        self.out, self.width = weight.shape
        self.wide, self.library = wide, library
        weight = weight.contiguous()
        panels = -(-self.out // library.columns)
        self.packed = torch.empty(panels * library.columns * self.width, dtype=weight.dtype)
        library.pack(weight.data_ptr(), self.packed.data_ptr(), self.width, self.out)
        # The kernels add it before they round.
        self._bias = None if bias is None else bias.float().contiguous()
        self.product = Product(self.packed.data_ptr(), pointer(self._bias), self.width, self.out)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dtype = torch.float32 if self.wide else x.dtype
        y = torch.empty(*x.shape[:-1], self.out, dtype=dtype)
        self.library.multiply(self.product, x.data_ptr(), y.data_ptr(), x.shape[:-1].numel(), self.wide)
        return y

    def plain(self) -> Tensor:
        pair = PAIRS[self.packed.dtype]
        panels = self.packed.view(-1, self.width // pair, self.library.columns, pair)
        return panels.transpose(1, 2).reshape(-1, self.width)[: self.out]


def panels(weight: Tensor, bias: Tensor | None = None, *, wide: bool) -> Panels | None:
    """A CPU's matrix in panels, or None where the processor or its compiler has no products for it."""
    found = compiled.library(weight.dtype) if weight.device.type == "cpu" else None
    if found is None or not found.columns or weight.shape[1] % PAIRS[weight.dtype]:
        return None
    return Panels(found, weight, bias, wide)
