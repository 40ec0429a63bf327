"""The parts that a decoder with early exits is made of beside its base's own. Needs torch and transformers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
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
    """[B, T, D] -> [B, heads, T, d], with the norm that Qwen3 puts on each head of queries and keys, OLMo-2 on all."""
    x, normed = projection(x_BTE), getattr(attention, norm or "", None)
    if normed is not None and normed.weight.shape[0] == x.shape[-1]:
        x, normed = normed(x), None
    x = x.unflatten(-1, (-1, attention.head_dim))
    return (x if normed is None else normed(x)).transpose(1, 2)


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward pass share.

    mask: see `attention_mask_4d`. rope: cos and sin [B or 1, 1, new, d]. past: positions before the new ones in the
    cache. eager: attention spells out its weights. weights: of every layer that ran, where they are wanted.
    """

    mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    cache: Any
    past: int
    eager: bool = False
    weights: dict[int, Tensor] | None = None

    def keep(self, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the new positions [B, G, new, d] -> of all, put down in the cache."""
        if self.cache is None:
            return k, v
        total = self.past + k.shape[2]
        where = {"cache_position": torch.arange(self.past, total, device=k.device)}
        cached = self.cache.update(k, v, index, where) if TELL_POSITION else self.cache.update(k, v, index)
        # A fixed cache gives back its whole length.
        return cached[0][:, :, :total], cached[1][:, :, :total]


class Exiting:
    """Makes modules whose class `exit_class` has derived picklable."""

    def __reduce__(self) -> tuple:
        mixin, base = type(self).__bases__
        return blank, (mixin, base), self.__dict__


class ExitAttention(Exiting):
    """A base's attention that can skip rows, for which it makes keys and values only. As in the base, it is called with
    the normed stream and returns (output, weights or None), which is what hooks see."""

    def rotated(self: Any, x_BHTd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate`, unless it is one of SmolLM3's layers without positions."""
        return rotate(x_BHTd, cos, sin) if getattr(self, "use_rope", True) else x_BHTd

    def keys_and_values(self: Any, normed_BTD: Tensor, shared: Pass) -> tuple[Tensor, Tensor]:
        """Make keys and values of the new positions [B, T, D] and cache them; returns those of all positions, each
        [B, G, past + T, d]."""
        k = self.rotated(heads(normed_BTD, self.k_proj, self, "k_norm"), *shared.rope)
        return shared.keep(k, heads(normed_BTD, self.v_proj, self), self.layer_idx)

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`attend` if called by `ExitLayer.run`, else the base's forward."""
        if args and isinstance(args[0], Pass):
            return self.attend(hidden_states, *args)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def attend(
        self: Any, hidden_states: Tensor, shared: Pass, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] -> [rows, T, D]: keys and values for all rows, attention for `rows` (int64; None: all)."""
        k, v = self.keys_and_values(hidden_states, shared)
        (cos, sin), mask = shared.rope, shared.mask
        if rows is not None:
            hidden_states, k, v = hidden_states[rows], k[rows], v[rows]
            # A single row of positions or of the mask holds for all rows.
            cos, sin = (t[rows] if t.shape[0] > 1 else t for t in (cos, sin))
            mask = mask[rows] if mask is not None and mask.shape[0] > 1 else mask
        q = self.rotated(heads(hidden_states, self.q_proj, self, "q_norm"), cos, sin)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        weights = None
        if shared.eager:
            context, weights = eager_attention(q, k, v, mask, self.head_dim**-0.5)
        else:
            context = F.scaled_dot_product_attention(q, k, v, mask, scale=self.head_dim**-0.5, enable_gqa=True)
        return self.o_proj(context.transpose(1, 2).flatten(2)), weights


class ExitLayer(Exiting):
    """A base's decoder layer that returns the positions that have exited unchanged."""

    def skip(self: Any, hidden_states: Tensor, shared: Pass) -> None:
        """Make keys and values only, from the stream [B, T, D]: every position has exited."""
        self.self_attn.keys_and_values(self.entering(hidden_states), shared)

    def entering(self: Any, hidden_states: Tensor) -> Tensor:
        """What attention reads of the stream: OLMo-2 norms what attention and MLP add instead."""
        return self.input_layernorm(hidden_states) if hasattr(self, "input_layernorm") else hidden_states

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`run` if called by `EarlyExitForCausalLM`, else (by the base's own loop, say) the base's forward."""
        if args and isinstance(args[-1], Pass):
            return self.run(hidden_states, *args)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def run(self: Any, hidden_states: Tensor, active_BT: Tensor, shared: Pass) -> Tensor:
        """Stream [B, T, D] -> [B, T, D]. active_BT: bool, the positions that run the layer, at least one. Queries, MLP
        and second norm are computed for the rows that have one, keys and values for all."""
        active_B = active_BT.any(dim=1)
        rows = None if bool(active_B.all()) else active_B.nonzero().squeeze(1)
        made, weights = self.self_attn(self.entering(hidden_states), shared, rows)
        stream = hidden_states if rows is None else hidden_states[rows]
        if hasattr(self, "post_feedforward_layernorm"):
            stream = stream + self.post_attention_layernorm(made)
            stream = stream + self.post_feedforward_layernorm(self.mlp(stream))
        else:
            stream = stream + made
            stream = stream + self.mlp(self.post_attention_layernorm(stream))
        if shared.weights is not None and weights is not None:
            if rows is not None:
                weights = weights.new_zeros(len(active_B), *weights.shape[1:]).index_copy(0, rows, weights)
            shared.weights[self.self_attn.layer_idx] = weights
        if rows is not None:
            stream = hidden_states.index_copy(0, rows, stream)
        return torch.where(active_BT[..., None], stream, hidden_states)


def with_exits(layer: Any) -> None:
    """Give a decoder layer of the base, and its attention, a `forward` with exits. The classes keep their names, by
    which interpretability tools and `device_map` recognise them."""
    for module, mixin in ((layer, ExitLayer), (layer.self_attn, ExitAttention)):
        base: Any = type(module)
        module.__class__ = exit_class(mixin, base)


@cache
def exit_class(mixin: Any, base: Any) -> Any:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__})


def blank(mixin: Any, base: Any) -> Any:
    made = exit_class(mixin, base)
    return made.__new__(made)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with its weights: q [B, H, T, d], k and v [B, G, S, d] -> [B, H, T, d] and [B, H, T, S]."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


def check_cache(cache: Any) -> None:
    """Raise ValueError for a cache that forgets: exits were trained with all keys and values there."""
    for part in (cache, *(getattr(cache, "layers", None) or ())):
        if any(word in type(part).__name__ for word in ("Sliding", "Hybrid", "Indexed", "LinearAttention")):
            raise ValueError(f"a cache of {type(part).__name__} isn't supported; use a DynamicCache or a StaticCache")


__all__ = ["Gate", "Pass", "WideLinear", "attention_mask_4d", "check_cache", "with_exits"]
