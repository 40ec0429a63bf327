"""The parts that a decoder with early exits is made of beside its base's own. Needs torch and transformers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

# Older transformers need the position at which a fixed cache is written.
TELL_POSITION = "cache_kwargs" in inspect.signature(DynamicCache.update).parameters
# PyTorch 2.8 and later multiply bfloat16 matrices into float32 on a GPU.
WIDE_PRODUCT = "dtype" in torch.ops.aten.mm.overloads()
# Rows of a matrix that are copied in float32 at a time where there is no such product: few enough to stay in the cache.
ROWS = 4096


class WideLinear(nn.Linear):
    """A linear map whose result is float32: the weight is rounded to the input's dtype, the sums are not."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> float32 [..., out]."""
        bias = None if self.bias is None else self.bias.float()
        if x.dtype == torch.float32:
            return F.linear(x, self.weight.float(), bias)
        weight = self.weight.to(x.dtype)
        if WIDE_PRODUCT and x.is_cuda and not torch.is_grad_enabled():
            rows = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32)
            made = rows.view(*x.shape[:-1], weight.shape[0])
        else:
            made = torch.cat([F.linear(x.float(), part.float()) for part in weight.split(ROWS)], dim=-1)
        return made if bias is None else made + bias


class Gate(nn.Module):
    """A two-layer perceptron on the residual stream: its output is the logit of exiting here."""

    def __init__(self, hidden: int, width: float, normalised: bool, eps: float):
        super().__init__()
        # By name, since older transformers make modules in the requested dtype.
        self.fc1 = WideLinear(hidden, round(width * hidden), dtype=torch.float32)
        self.fc2 = nn.Linear(round(width * hidden), 1, dtype=torch.float32)
        self.normalised, self.eps = normalised, eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Residual stream [..., D] -> logit, float32 [...]."""
        x = x_BTD.float()
        if self.normalised:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        inner = F.relu(self.fc1(x.to(x_BTD.dtype)))
        return self.fc2(inner.to(self.fc2.weight.dtype)).float().squeeze(-1)


def rotate(x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split form; cos and sin [B, 1, T, d]."""
    first, second = x_BHTd.chunk(2, dim=-1)
    return x_BHTd * cos + torch.cat((-second, first), dim=-1) * sin


def attention_mask_4d(
    mask: Tensor | dict | None, positions: Tensor | None, rows: int, new: int, past: int, device: torch.device
) -> Tensor | None:
    """Which keys a query sees, [B or 1, 1 or H, new, past + new], bool or what is added to the scores; None where one
    new position sees them all.

    mask: [B, past + new], 1 for tokens and 0 for padding; or of four dimensions, as it is used, and as long as a fixed
    cache at most. positions [B or 1, new]: sequences in one row, each of which begins anew, don't see each other.
    Every position sees itself, so that padding has something to look at and no row of the softmax is empty.
    """
    total = past + new
    # Newer transformers make one mask for every kind of layer.
    mask = mask["full_attention"] if isinstance(mask, dict) else mask
    if mask is not None and mask.dim() == 4:
        if mask.shape[0] not in (1, rows) or mask.shape[2] != new or mask.shape[3] < total:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {(rows, 1, new, total)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"attention_mask of 4 dimensions holds {mask.dtype}, expected bool or floating point")
        return mask[..., :total]
    if mask is not None and mask.shape != (rows, total):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected {(rows, total)} or 4 dimensions")
    if mask is not None and bool(mask.all()):
        mask = None
    begins = None if positions is None or mask is not None else positions.diff(dim=1) != 1
    if begins is not None and bool(begins.any()):
        number_BT = F.pad(begins.long().cumsum(dim=1), (1, 0))
        return ((number_BT[:, :, None] == number_BT[:, None, :]).tril())[:, None]
    if mask is None and new == 1:
        return None
    query = torch.arange(past, total, device=device)[:, None]
    key = torch.arange(total, device=device)[None, :]
    visible = (key <= query)[None, None]
    if mask is None:
        return visible
    return (visible & mask.bool()[:, None, None, :]) | (key == query)[None, None]


def heads(x_BTE: Tensor, projection: nn.Module, attention: Any, norm: str | None = None) -> Tensor:
    """[B, T, D] -> [B, heads, T, d], with the per-head norm that Qwen3 puts on queries and keys."""
    x = projection(x_BTE).unflatten(-1, (-1, attention.head_dim))
    if norm is not None and hasattr(attention, norm):
        x = getattr(attention, norm)(x)
    return x.transpose(1, 2)


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward pass share.

    mask: see `attention_mask_4d`. rope: cos and sin [B or 1, 1, new, d]. past: positions before the new ones in the
    cache.
    """

    mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    cache: Any
    past: int

    def keep(self, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the new positions [B, G, new, d] -> of all, put down in the cache."""
        if self.cache is None:
            return k, v
        total = self.past + k.shape[2]
        where = {"cache_position": torch.arange(self.past, total, device=k.device)}
        cached = self.cache.update(k, v, index, where) if TELL_POSITION else self.cache.update(k, v, index)
        # A fixed cache gives back its whole length.
        return cached[0][:, :, :total], cached[1][:, :, :total]


def check_cache(cache: Any) -> None:
    """Raise ValueError for a cache that forgets: exits were trained with all keys and values there."""
    for part in (cache, *(getattr(cache, "layers", None) or ())):
        if any(word in type(part).__name__ for word in ("Sliding", "Hybrid", "Indexed", "LinearAttention")):
            raise ValueError(f"a cache of {type(part).__name__} isn't supported; use a DynamicCache or a StaticCache")


__all__ = ["Gate", "Pass", "WideLinear", "attention_mask_4d", "check_cache", "heads", "rotate"]
