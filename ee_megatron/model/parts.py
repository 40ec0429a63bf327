"""Norm, attention, MLP and gate: what the layers are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from ..exits import gate_units
from ..products import linear
from .attention import attend_packed
from .config import EarlyExitTransformerConfig
from .packed import Active, Turn


class RMSNorm(nn.Module):
    """RMSNorm with fp32 statistics; in and out [..., D] in the input's dtype. Under sequence parallelism its gradient
    is partial on each tensor-parallel rank, which the attribute `sequence_parallel` of the weight announces."""

    def __init__(self, config: EarlyExitTransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
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

    def __init__(self, config: EarlyExitTransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.weight.sum_over_tensor_ranks = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]


class CausalAttention(nn.Module):
    """Core attention of megatron-core's own layer, for sequences of one length: q [s, b, h, d], k and v [s, b, g, d]
    -> [s, b, h * d]."""

    def __init__(self, config: EarlyExitTransformerConfig, *_: object, **__: object):
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
        return out.permute(2, 0, 1, 3).flatten(2)


class SkippingAttention(SelfAttention):
    """Self-attention; `forward` is megatron-core's own, `forward_active` is for packed sequences, of which some
    positions skip the layer."""

    def forward_active(self, normed: Tensor, active: Active, angles: Tensor) -> Tensor:
        """Queries and output of the active slots only, keys and values of all that are in use.

        normed [w, 1, D]; angles [W, 1, 1, d], megatron-core's rotary ones -> [n, D] at this rank's active slots.
        """
        used = self.linear_qkv.enter(normed).flatten(0, 1)[: active.packed.length]
        d = self.hidden_size_per_attention_head
        if active.everywhere:
            grouped = self.linear_qkv.local(used).unflatten(-1, (self.num_query_groups_per_partition, -1, d))
            query, key, value = grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]
        else:
            both = self.linear_qkv.local(used, ("k_proj", "v_proj"))
            key, value = both.unflatten(-1, (2, -1, d)).unbind(1)
            query = self.linear_qkv.local(used.index_select(0, active.index), ("q_proj",)).unflatten(-1, (-1, d))
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        turn_keys, turn_queries = active.turns(angles, query.dtype)
        key, query, take = turned(key, turn_keys), turned(query, turn_queries), active.packed.take
        attended = attend_packed(query, take(key), take(value), active.spans, self.config.flex_attention)
        output = self.linear_proj.leave(self.linear_proj.local(attended.flatten(1)), active)
        return output if self.linear_proj.bias is None else output + self.linear_proj.bias


def turned(x: Tensor, turn: Turn) -> Tensor:
    """Rotary position embedding of x [N, h, d], the halves of a head being the pairs that turn (Su et al. 2021, arXiv
    2104.09864, in Hugging Face's order)."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def mlp_of_active(mlp: MLP, normed: Tensor, active: Active) -> Tensor:
    """megatron-core's SwiGLU MLP for this rank's active slots only: normed [n, D] -> [n, D]."""
    hidden = mlp.linear_fc1.local(mlp.linear_fc1.enter(normed, active))
    if mlp.linear_fc1.bias is not None:
        hidden = hidden + mlp.linear_fc1.bias
    gate, up = hidden.chunk(2, dim=-1)
    output = mlp.linear_fc2.leave(mlp.linear_fc2.local(F.silu(gate) * up), active)
    return output if mlp.linear_fc2.bias is None else output + mlp.linear_fc2.bias


class ExitGate(nn.Module):
    """The exit gate at one depth: z = W2 relu(W1 x + b1) + b2 on the residual stream x, [..., D] -> fp32 [...].

    Parameters are fp32 whatever the model's dtype, in which W1 x is multiplied (products.py); the rest is fp32.
    Replicated on every tensor-parallel rank. Under sequence parallelism each rank sees its own positions only, so the
    gradients are partial there.
    """

    def __init__(self, config: EarlyExitTransformerConfig):
        super().__init__()
        assert config.spec is not None
        hidden, width = config.hidden_size, gate_units(config.spec.gate_width, config.hidden_size)
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
        inner = linear(x, self.fc1.weight, self.fc1.bias, residual.dtype)
        return self.fc2(F.relu(inner)).squeeze(-1)
