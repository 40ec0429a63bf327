"""Calibration objective: fit the student at prescribed exits to the teacher, and its gates to exits or hazards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .divergences import Teacher
from .weights import Positions, Weights, mean_weights

if TYPE_CHECKING:
    from torch import Tensor

    from ..exits import ExitLayout

# What gates learn: (batch, layout, target hazards of the traces [B, S, M], those of the student's own divergence at the
# exits taken [B, S], computed on demand) -> target hazards [B, S, M], -1 for none, or None: the prescribed exits.
GateTargets = Callable[[Positions, "ExitLayout", "Tensor", Callable[[], "Tensor"]], "Tensor | None"]


def current_targets(batch: Positions, layout: ExitLayout, traced: Tensor, own: Callable[[], Tensor]) -> Tensor:
    """The student's own target hazard at the gate of its prescribed exit, no target at all other gates."""
    taken = batch.exit_depths.unsqueeze(-1) == batch.exit_depths.new_tensor(layout.depths)
    return own().unsqueeze(-1).where(taken & batch.gate_mask.unsqueeze(-1), -1.0)


GATE_TARGETS: dict[str, GateTargets] = {
    "sampled": lambda batch, layout, traced, own: None,
    "soft": lambda batch, layout, traced, own: traced,
    "current": current_targets,
}


@dataclass(frozen=True)
class Distillation:
    """Mean divergence from the teacher plus `gate_weight` times the gates' mean negative log-likelihood (method.md,
    stage 1). A position's divergence d counts f = (exit depth / L) to the power `depth_power`; with a `kl_scale` in
    nats f + (1 - f) exp(-d / kl_scale)."""

    teacher: Teacher
    gate_targets: GateTargets
    gate_weight: float
    depth_power: float
    kl_scale: float

    def weights(
        self,
        batch: Positions,
        layout: ExitLayout,
        traced: Tensor,
        divergence: Callable[[], Tensor],
        target: Callable[[Tensor], Tensor],
    ) -> Weights:
        """`traced` [B, S, M]: as in `GateTargets`; `divergence`: the student's at the exits taken [B, S], nats, called
        at most once; `target`: divergences -> target hazards."""
        student = cache(divergence)
        counts = (batch.exit_depths.clamp(min=1).float() / layout.num_layers) ** self.depth_power
        if self.kl_scale:
            counts = counts + (1 - counts) * (-student() / self.kl_scale).exp()
        return Weights(
            divergence=mean_weights(batch, batch.loss_mask) * counts,
            exit=self.gate_weight * mean_weights(batch, batch.gate_mask),
            target_hazards=self.gate_targets(batch, layout, traced, lambda: target(student())),
        )
