"""Norm, attention, MLP and gate: what the layers are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from ..exits import gate_units
from ..products import linear
from .active import Active
from .config import EarlyExitTransformerConfig


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
    """Core attention through scaled_dot_product_attention: q [s, b, h, d], k and v [s, b, g, d] -> [s, b, h * d].

    Sequences are padded on the right, so the causal mask alone keeps padding out of every real position.
    """

    def __init__(self, config: EarlyExitTransformerConfig, *_: object, **__: object):
        super().__init__()
        self.config = config

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = attend(q, k, v, mask=None)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def forward_active(self, query: Tensor, key: Tensor, value: Tensor, active: Active) -> Tensor:
        """query [N, h, d] of the active positions, key and value [s, b, g, d] of all -> [N, h * d].

        Few queries are packed per sequence; many keep their places, where the kernel skips what causality forbids.
        """
        key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        packed = query.new_zeros(active.rows * active.width, *query.shape[1:]).index_copy(0, active.at, query)
        packed = packed.unflatten(0, (active.rows, active.width)).transpose(1, 2)
        out = attend(packed, key, value, active.mask).transpose(1, 2)
        return out.flatten(0, 1).index_select(0, active.at).flatten(1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention, q [b, h, n, d], k and v [b, g, s, d] -> [b, h, n, d]; causal without a mask."""
    dtype, grouped = query.dtype, query.size(1) != key.size(1)
    if query.device.type == "cpu":
        # torch's bfloat16 attention kernel is several times slower than its fp32 one on a CPU.
        query, key, value = query.float(), key.float(), value.float()
    elif grouped and mask is not None:
        # The fused CUDA kernels take either a mask or grouped heads.
        key, value = (x.repeat_interleave(query.size(1) // key.size(1), 1) for x in (key, value))
        grouped = False
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)
    return out.to(dtype)


class SkippingAttention(SelfAttention):
    """Self-attention; `forward` is megatron-core's own, `forward_active` is for layers that some positions skip."""

    def forward_active(self, normed: Tensor, active: Active, rotary: Tensor) -> Tensor:
        """Queries and output of the active positions only, keys and values of all that have some of their own.

        normed [s_local, b, D]; rotary [s, 1, 1, d], megatron-core's angles -> [n, D] at this rank's active positions.
        """
        whole = self.linear_qkv.enter(normed)
        d = self.hidden_size_per_attention_head
        whole, keys = whole.flatten(0, 1), active.keys
        key, value = self.linear_qkv.local(keys.enter(whole), ("k_proj", "v_proj")).unflatten(-1, (2, -1, d)).unbind(1)
        query = self.linear_qkv.local(whole.index_select(0, active.index), ("q_proj",)).unflatten(-1, (-1, d))
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)

        def turn(x: Tensor, positions: Tensor) -> Tensor:
            return apply_rotary_pos_emb(x.unsqueeze(1), rotary.index_select(0, positions), self.config).squeeze(1)

        key, query = turn(key, keys.positions), turn(query, active.positions)
        attended = self.core_attention.forward_active(query, keys.share(key), keys.share(value), active)
        output = self.linear_proj.leave(self.linear_proj.local(attended), active)
        return output if self.linear_proj.bias is None else output + self.linear_proj.bias


def mlp_of_active(mlp: MLP, normed: Tensor, active: Active) -> Tensor:
    """megatron-core's SwiGLU MLP for this rank's active positions only: normed [n, D] -> [n, D]."""
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
