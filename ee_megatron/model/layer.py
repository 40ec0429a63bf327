"""The transformer layer that knows "frozen", what it is made of (norm, attention, MLP, gate), and the gate's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.jit import jit_fuser
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..exits import gate_log_term, gate_units
from ..mixed_matmul import linear
from .attention import attend_packed
from .config import EarlyExitTransformerConfig
from .packed import EXIT_DEPTH, HAZARD, LIKELIHOOD, TARGET, Active, Control, Turn

# What follows with `fused` is one kernel each way, for a GPU: PyTorch's, one that PyTorch compiles, megatron-core's. It
# rounds once, ours is the reference.


def normed(x: Tensor, gain: Tensor, eps: float, fused: bool) -> Tensor:
    """RMSNorm over the last dimension."""
    if fused:
        return F.rms_norm(x, gain.shape, gain, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return gain * wide.to(x.dtype)


def turned(x: Tensor, turn: Turn, fused: bool) -> Tensor:
    """Rotary position embedding of x [N, h, d], the halves of a head being the pairs that turn (Su et al. 2021, arXiv
    2104.09864, in Hugging Face's order)."""
    return (_compiled_turn if fused else _turn)(x, *turn)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


_compiled_turn = jit_fuser(_turn)


def swiglu(hidden: Tensor, fused: bool) -> Tensor:
    """Gates and what they let through, one behind the other [n, 2 I] -> [n, I]."""
    if fused:
        return bias_swiglu_impl(hidden, None)
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """RMSNorm with fp32 statistics; in and out [..., D] in the input's dtype. Under sequence parallelism its gradient
    is partial on each tensor-parallel rank, which the attribute `sequence_parallel` of the weight announces."""

    def __init__(self, config: EarlyExitTransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, self.eps, self.config.fused)


class HeadNorm(RMSNorm):
    """RMSNorm over a head's dimension (Qwen3). Each tensor-parallel rank sees only its own heads, so its gradient is
    partial whether or not the sequence is sharded; `sum_over_tensor_ranks` announces that."""

    def __init__(self, config: EarlyExitTransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.weight.sum_over_tensor_ranks = config.tensor_model_parallel_size > 1  # type: ignore[attr-defined]


class WholeNorm(RMSNorm):
    """RMSNorm over all heads together (OLMo-2), x [..., h, d] of this rank's heads; `width`: elements of all heads.
    Each tensor-parallel rank has the gain of its own heads."""

    def __init__(self, config: EarlyExitTransformerConfig, width: int, eps: float = 1e-6, **_: object):
        super().__init__(config, width // config.tensor_model_parallel_size, eps)
        self.width = width
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.flatten(-2).float()
        squares = wide.pow(2).sum(-1, keepdim=True)
        # Every rank's heads depend on all ranks' sums: a sum over ranks forward, and of their gradients backward.
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        wide = wide * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * wide.to(x.dtype)).view_as(x)


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
        if self.layer_number - 1 not in self.config.dims.no_rope:
            turn_keys, turn_queries = active.turns(angles, query.dtype)
            fused = self.config.fused
            key, query = turned(key, turn_keys, fused), turned(query, turn_queries, fused)
        attended = attend_packed(query, key, value, active.spans, self.config.flex_attention)
        return self.linear_proj.finish(self.linear_proj.leave(self.linear_proj.local(attended.flatten(1)), active))


def mlp_of_active(mlp: MLP, normed: Tensor, active: Active) -> Tensor:
    """megatron-core's SwiGLU MLP for this rank's active slots only: normed [n, D] -> [n, D]."""
    hidden = mlp.linear_fc1.local(mlp.linear_fc1.enter(normed, active))
    if mlp.linear_fc1.bias is not None:
        hidden = hidden + mlp.linear_fc1.bias
    inner = swiglu(hidden, mlp.config.fused)
    return mlp.linear_fc2.finish(mlp.linear_fc2.leave(mlp.linear_fc2.local(inner), active))


class ExitGate(nn.Module):
    """The exit gate at one depth: z = W2 relu(W1 x + b1) + b2 on the residual stream x, [..., D] -> fp32 [...].

    Parameters are fp32 whatever the model's dtype, in which W1 x is multiplied (mixed_matmul.py); the rest is fp32.
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


class _AttachLoss(torch.autograd.Function):
    """Identity on the activation; in the backward pass the loss receives the gradient 1.

    So a loss that lives on one pipeline stage is differentiated there, in the pass that the schedule runs anyway.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return activation

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)


def gate_loss(gate_logit: Tensor, channels: Tensor, weights: Mapping[int, Tensor], depth: int) -> Tensor:
    """The loss of one gate, a scalar: the sum over positions of what `weights` say.

    gate_logit [n], channels [n, C], weights [n] by term (model/packed.py) of the positions that reach the gate.
    """
    likelihood = gate_log_term(gate_logit, channels[..., EXIT_DEPTH], depth, weights.get(TARGET))
    loss = -weights[LIKELIHOOD] * likelihood
    if HAZARD in weights:
        loss = loss + weights[HAZARD] * torch.sigmoid(gate_logit)
    return loss.sum()


def gate_entropy(gate_logit: Tensor) -> Tensor:
    """Entropy of firing or not, nats, of the gate logits' shape. Summed over the gates that decide at a position, its
    expectation is the entropy of the exit distribution (chain rule)."""
    hazard = torch.sigmoid(gate_logit)
    return -(hazard * F.logsigmoid(gate_logit) + (1 - hazard) * F.logsigmoid(-gate_logit))


class EarlyExitLayer(TransformerLayer):
    """Layer l (1-based). Positions whose exit depth is below l keep their residual stream; their keys and values are
    still computed, from the frozen stream, because they are computed from whatever enters the layer. Padding is not
    computed at all.

    If l - 1 is an exit depth, the layer owns that exit's gate, which reads the stream that enters the layer.
    """

    def __init__(self, config: EarlyExitTransformerConfig, submodules: Any, layer_number: int = 1, **kwargs: Any):
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        self.depth = self.layer_number - 1
        self.gate: ExitGate | None = None
        if config.spec is not None and self.depth in config.spec.exit_depths:
            self.gate = ExitGate(config)
            self.gate_index = config.spec.exit_depths.index(self.depth)
        # Gate logits of the last forward pass [w] (this rank's slots, 0 where it did not run), if `record` is set.
        self.record = False
        self.recorded: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # megatron-core passes everything by name, but hooks (ZeRO-3's among them) see only what is passed by position.
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: Tensor, context: Control | None = None, **kwargs: Any):
        """hidden [w, 1, D] and control, or [s, b, D] and None (megatron-core's layer) -> (hidden, control)."""
        # megatron-core's name of the argument.
        control = context
        if self.config.recompute and self.training and torch.is_grad_enabled():
            # megatron-core's own saves tensors only, and the control is more. Nothing but dropout draws numbers.
            hidden_states = checkpoint(
                self._forward,
                hidden_states,
                control,
                kwargs,
                use_reentrant=True,
                preserve_rng_state=bool(self.config.adapter_dropout),
            )
            return hidden_states, control
        return self._forward(hidden_states, control, kwargs), control

    def _forward(self, hidden_states: Tensor, control: Control | None, kwargs: dict[str, Any]) -> Tensor:
        if control is None:
            return super().forward(hidden_states, **kwargs)[0]
        if self.gate is not None and (self.record or torch.is_grad_enabled()):
            hidden_states = self._ask(self.gate, hidden_states, control)
        active = control.active(self.layer_number)
        if active is None:
            return hidden_states
        return self._forward_active(hidden_states, active, kwargs["rotary_pos_emb"])

    def _ask(self, gate: ExitGate, hidden_states: Tensor, control: Control) -> Tensor:
        """Run the gate where it decides and is reached; its loss goes with the returned hidden states."""
        active, flat = control.active(self.depth), hidden_states.flatten(0, 1)
        mine = flat.new_empty(0, dtype=torch.int64) if active is None else active.local_gated
        logit = gate(flat.index_select(0, mine))
        if self.record:
            self.recorded = logit.new_zeros(len(flat)).index_copy(0, mine, logit.detach())
        if not logit.requires_grad or active is None or control.gates is None:
            return hidden_states
        gates = control.gates[:, self.gate_index].index_select(0, active.gated)
        weights = dict(zip(control.terms, gates.unbind(-1), strict=True))
        loss = gate_loss(logit, control.channels.index_select(0, active.gated), weights, self.depth)
        return _AttachLoss.apply(hidden_states, loss)

    def _forward_active(self, hidden_states: Tensor, active: Active, rotary: Tensor) -> Tensor:
        """The layer for the active positions; the others keep their stream and pay for their keys and values only."""
        flat = hidden_states.flatten(0, 1)
        stream = active.pick_mine(flat) + self.self_attention.forward_active(
            self.input_layernorm(hidden_states), active, rotary
        )
        stream = stream + mlp_of_active(self.mlp, self.pre_mlp_layernorm(stream), active)
        return active.put_mine(stream, flat).view_as(hidden_states)

    def sharded_state_dict(self, *args: Any, **kwargs: Any):
        """The base tensors only: gates are saved by name, without regard to the layout (policy.py)."""
        gate, self.gate = self.gate, None
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.gate = gate
