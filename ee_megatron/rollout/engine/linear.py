"""Linear layers of the decoder: each matrix stored once, in the form that is fastest on this machine.

On processors with 512-bit registers that is the panels of product.c, else oneDNN's layout, else the plain matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import Panels, panels
from ...mixed_matmul import linear

# The number of rows that oneDNN packs for; any number works.
PACKED_ROWS = 16
# oneDNN's kernels for one and two rows read the matrix more slowly than that for four (by 1.2 to 2.3, in float32 and
# bfloat16, on one and two threads): fewer rows are filled up.
LEAST_ROWS = 4


class OneDNN:
    """A matrix W packed by oneDNN, results in W's dtype."""

    def __init__(self, packed: Tensor, bias: Tensor | None):
        self.packed, self.bias = packed, bias

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows >= LEAST_ROWS:
            return self._product(x)
        filled = torch.cat([x.reshape(rows, -1), x.new_zeros(LEAST_ROWS - rows, x.shape[-1])])
        return self._product(filled)[:rows].reshape(*x.shape[:-1], -1)

    def plain(self) -> Tensor:
        return self.packed.to_dense()

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Plain:
    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plain(self) -> Tensor:
        return self.weight


Matrix = Panels | OneDNN | Plain
"""W [out, in] and perhaps a bias [out]: x [..., in] -> x W^T + b; `plain`: W, as it was given."""


def _packed(weight: Tensor, bias: Tensor | None) -> OneDNN | None:
    """The matrix in oneDNN's layout, or None where this PyTorch or processor has no packed product for it."""
    dtypes = (torch.bfloat16, torch.float32)
    if weight.device.type != "cpu" or weight.dtype not in dtypes or not torch.backends.mkldnn.is_available():
        return None
    try:
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        return OneDNN(torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS), bias)
    except (AttributeError, RuntimeError):
        return None


class Linear:
    """Linear layer x [..., in] -> x W^T + b, in W's dtype. `adapted`: not the base's matrix."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, adapted: bool = False):
        self.bias, self.adapted = bias, adapted
        self.matrix: Matrix = panels(weight, bias, wide=False) or _packed(weight, bias) or Plain(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.matrix(x)

    def plain(self) -> Tensor:
        """W [out, in]."""
        return self.matrix.plain()


class WideLinear(Linear):
    """x [..., in] -> x W^T + b in float32, x rounded to W's dtype: readout and gates (mixed_matmul.py); b float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.dtype = weight.dtype
        packed = panels(weight, bias, wide=True)
        if packed is not None:
            self.bias, self.adapted, self.matrix = bias, False, packed
            return
        # Without a kernel for it a CPU multiplies the same values in float32: one copy of the matrix for all products.
        super().__init__(weight.float() if weight.device.type == "cpu" else weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if isinstance(self.matrix, Panels) and self.matrix.wide:
            return self.matrix(x)
        if isinstance(self.matrix, Plain) and self.matrix.weight.dtype == self.dtype:
            return linear(x, self.matrix.weight, self.bias, self.dtype)
        return self.matrix(x.float())

    def plain(self) -> Tensor:
        return super().plain().to(self.dtype)
