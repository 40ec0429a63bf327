"""Norm, attention core and gate: the small modules that the layers are made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from .config import EarlyExitConfig


class RMSNorm(nn.Module):
    """RMSNorm with fp32 statistics; in and out [..., D] in the input's dtype. Under sequence parallelism its gradient
    is partial on each tensor-parallel rank, which the attribute `sequence_parallel` of the weight announces."""

    def __init__(self, config: EarlyExitConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class HeadNorm(RMSNorm):
    """RMSNorm over a head's dimension (Qwen3). Each tensor-parallel rank sees only its own heads, so its gradient is
    partial whether or not the sequence is sharded; `sum_over_tensor_ranks` announces that."""

    def __init__(self, config: EarlyExitConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.weight.sum_over_tensor_ranks = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]


class CausalAttention(nn.Module):
    """Core attention through scaled_dot_product_attention: q [s, b, h, d], k and v [s, b, g, d] -> [s, b, h * d].

    Sequences are padded on the right, so the causal mask alone keeps padding out of every real position.
    """

    def __init__(self, config: EarlyExitConfig, *_: object, **__: object):
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        dtype = query.dtype
        if query.device.type == "cpu":
            # torch's bfloat16 attention kernel is several times slower than its fp32 one on a CPU.
            query, key, value = query.float(), key.float(), value.float()
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1).to(dtype)


class SkippingAttention(SelfAttention):
    """Self-attention whose queries and output are computed for active positions only.

    With `active` None it is megatron-core's own. Else `active` has flat indices int64 [N] into [s, b]: keys and values
    are computed for every position, queries for these; the result is [N, 1, D]. Frozen positions get a query of zeros,
    whose attention output nobody reads.
    """

    active: Tensor | None = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any):
        if self.active is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        s, b, _ = hidden_states.shape
        d = self.hidden_size_per_attention_head
        key, value = (x.unflatten(-1, (-1, d)) for x in self.linear_qkv.project(hidden_states, ("k_proj", "v_proj")))
        (query,) = self.linear_qkv.project(hidden_states.flatten(0, 1)[self.active], ("q_proj",))
        query = query.unflatten(-1, (-1, d))
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        whole = query.new_zeros(s * b, *query.shape[1:]).index_copy(0, self.active, query)
        return whole.unflatten(0, (s, b)), key, value

    def forward_active(self, hidden_states: Tensor, active: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Normed stream [s, b, D] -> (output [N, 1, D], bias)."""
        self.active = self.linear_proj.active = active
        try:
            return self.forward(hidden_states, **kwargs)
        finally:
            self.active = self.linear_proj.active = None


class Gate(nn.Module):
    """The exit gate at one depth: z = W2 relu(W1 x + b1) + b2 on the residual stream x, [..., D] -> fp32 [...].

    Replicated on every tensor-parallel rank. Under sequence parallelism each rank sees its own positions only, so the
    gradients are partial there.
    """

    def __init__(self, config: EarlyExitConfig):
        super().__init__()
        assert config.spec is not None
        hidden, width = config.hidden_size, config.spec.gate_width * config.hidden_size
        self.normalise = config.spec.gate_input == "normalised"
        self.eps = config.layernorm_epsilon
        self.fc1 = nn.Linear(hidden, width)
        self.fc2 = nn.Linear(width, 1)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, residual: Tensor) -> Tensor:
        x = residual.float()
        if self.normalise:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.fc2(F.relu(self.fc1(x))).squeeze(-1)
