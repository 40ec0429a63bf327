"""What an exit itself does: the price of its depth and the divergence that it causes, against going on.

The signal of an answer's reward is shared by all its exits, and its noise grows with their number; what an exit costs
at its own position doesn't.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..exits import ExitLayout
from .weights import Positions

PARTS = 8
"""Positions that come by a gate are told apart by its hazard there, into so many parts of equal size."""
PRIOR = 4.0
"""The whole gate's mean counts as so many positions of each part, for parts that have few of their own."""


def hazard_costs(
    batch: Positions, layout: ExitLayout, costs: Tensor, divergence: Tensor | None, hazards: Tensor | None
) -> Tensor:
    """What firing costs more than going on, float32 [B, S, M]; 0 at gates that a position doesn't come by.

    costs [B, S, M + 1]: of each outcome (`DepthCost.of_outcomes`); divergence: what an outcome costs beside that, of
    the one that was taken [B, S] or of all up to it [B, S, M + 1], None for nothing; hazards [B, S, M] of the gates
    that were asked, None if nobody knows them.

    With C_i the cost of exiting at gate i and V_i that of going on, the expected cost there is s_i C_i + (1 - s_i) V_i
    and its slope by the hazard s_i is C_i - V_i. A loss in which the hazard has this weight therefore has the expected
    cost's gradient over both decisions of the gate, without the noise of the one that was drawn (all-action policy
    gradient: Sutton et al. 2000, "Policy gradient methods for reinforcement learning with function approximation").
    One of C_i and V_i happened; the other is the mean over positions that decided otherwise at this gate, with about
    the same hazard. The price of an exit needs no such estimate, and with the divergences of all outcomes C_i needs
    none: tokens that gates take for alike then teach them apart. Where only the divergence that was taken counts and a
    gate never fired, nothing is known of its exit and nothing is taught.
    """
    exits = len(layout.depths)
    outcome = _outcomes(batch, layout)
    result = costs.new_zeros(*outcome.shape, exits)
    for gate in range(exits):
        reached = batch.asked & (outcome >= gate)
        ends, here = outcome[reached], costs[reached]
        fired = ends == gate
        if not len(ends) or (divergence is not None and divergence.dim() == 2 and not fired.any()):
            continue
        part = _equal_parts(hazards[..., gate][reached]) if hazards is not None else torch.zeros_like(ends)
        went_on = one_hot(ends[~fired], exits + 1).float()
        # Where all fire, what would have come behind is taken for full depth.
        behind = _means(went_on, part[~fired], otherwise=one_hot(ends.new_tensor(exits), exits + 1).float())[part]
        taken = here.gather(-1, ends.unsqueeze(-1)).squeeze(-1)
        difference = here[:, gate] - torch.where(fired, (behind * here).sum(-1), taken)
        if divergence is not None:
            known = divergence[reached]
            own = known if known.dim() == 1 else known.gather(-1, ends.unsqueeze(-1)).squeeze(-1)
            of_firing, of_going_on = (
                _means(own[which, None], part[which], otherwise=own.mean(0, keepdim=True))[part, 0]
                for which in (fired, ~fired)
            )
            if known.dim() == 2:
                of_firing = known[:, gate]
            difference = difference + torch.where(fired, own - of_going_on, of_firing - own)
        result[..., gate][reached] = difference
    return result


def _outcomes(batch: Positions, layout: ExitLayout) -> Tensor:
    """Number of the outcome that each position took, int64 [B, S]."""
    return (batch.exit_depths.unsqueeze(-1) == batch.exit_depths.new_tensor(layout.outcomes)).int().argmax(-1)


def _equal_parts(values: Tensor) -> Tensor:
    """[n] -> int64 [n], which of PARTS parts of equal size, by rank; equal values share one. NaN, a policy's that has
    diverged, is in the last: that its gradient is not finite is said of the update."""
    ranks = torch.searchsorted(values.sort().values, values).clamp(max=len(values) - 1)
    return ranks * PARTS // len(values)


def _means(values: Tensor, part: Tensor, *, otherwise: Tensor) -> Tensor:
    """Means of values [n, C] by part, drawn towards the mean of all, float32 [PARTS, C]; `otherwise` [C] if n is 0."""
    whole = values.mean(0) if len(values) else otherwise
    sums = values.new_zeros(PARTS, values.size(1)).index_add_(0, part, values)
    counts = torch.bincount(part, minlength=PARTS).unsqueeze(-1)
    return (sums + PRIOR * whole) / (counts + PRIOR)
