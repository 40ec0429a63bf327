"""The transformer layer that knows "frozen", and the gate's share of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..exits import gate_log_term
from .config import EarlyExitTransformerConfig
from .control import EXIT_DEPTH, HAZARD, LIKELIHOOD, TARGET, Control
from .packed import Active
from .parts import ExitGate, mlp_of_active


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

    gate_logit [n], channels [n, C], weights [n] by term (model/control.py) of the positions that reach the gate.
    """
    likelihood = gate_log_term(gate_logit, channels[..., EXIT_DEPTH], depth, weights.get(TARGET))
    loss = -(weights[LIKELIHOOD] * likelihood)
    if HAZARD in weights:
        loss = loss + weights[HAZARD] * torch.sigmoid(gate_logit)
    return loss.sum()


def gate_entropy(gate_logit: Tensor) -> Tensor:
    """Entropy of firing or not, nats, of the gate logits' shape. Summed over the gates that a position is asked at, its
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
        # Gate logits of the last forward pass [w] (this rank's slots, 0 where not asked), if `record` is set.
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
        """Run the gate where it is asked and reached; its loss goes with the returned hidden states."""
        active, flat = control.active(self.depth), hidden_states.flatten(0, 1)
        mine = flat.new_empty(0, dtype=torch.int64) if active is None else active.asked_mine
        logit = gate(flat.index_select(0, mine))
        if self.record:
            self.recorded = logit.new_zeros(len(flat)).index_copy(0, mine, logit.detach())
        if not logit.requires_grad or active is None or control.gates is None:
            return hidden_states
        asked = control.gates[:, self.gate_index].index_select(0, active.asked)
        weights = dict(zip(control.terms, asked.unbind(-1), strict=True))
        loss = gate_loss(logit, control.channels.index_select(0, active.asked), weights, self.depth)
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
