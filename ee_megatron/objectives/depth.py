"""Depth costs: of a whole answer, of each exit that a position could take, and of a token with all later ones; and the
cost of exiting at a gate compared with continuing (`hazard_costs`). All exits of an answer share the signal of its
reward, whose noise grows with their number; the cost of an exit at its own position has no such noise.

Shapes: B answers, S positions, M exits; outcome j of a position is the j-th exit, outcome M none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .weights import Positions

if TYPE_CHECKING:
    from torch import Tensor

    from ..exits import ExitLayout


@dataclass(frozen=True)
class DepthCost:
    """Depth cost of an answer: sum over its tokens of depth / L, divided by `divisor(tokens,
    rl.depth_penalty.cost_tokens)`; or, if `largest`, the maximum of depth / L over the tokens that may exit."""

    divisor: Callable[[Tensor, int], Tensor] = lambda lengths, cost_length: lengths
    largest: bool = False

    def of_answers(self, batch: Positions, num_layers: int, cost_length: int) -> Tensor:
        """Cost of each answer, float32 [B]."""
        fraction = batch.exit_depths.float() / num_layers
        if self.largest:
            return (fraction * batch.gate_mask).amax(1)
        return self._parts(batch, fraction, cost_length).sum(1)

    def of_outcomes(self, batch: Positions, layout: ExitLayout, cost_length: int) -> Tensor:
        """Cost of the answer if the position took an outcome and all others stayed, less what doesn't depend on the
        outcome, float32 [B, S, M + 1]."""
        outcomes = batch.exit_depths.new_tensor(layout.outcomes).float() / layout.num_layers
        if not self.largest:
            each = outcomes / self.divisor(_lengths(batch), cost_length).unsqueeze(-1)
            return each.expand(*batch.loss_mask.shape, -1)
        others = _largest_of_others(batch.exit_depths.float() / layout.num_layers * batch.gate_mask)
        return outcomes.maximum(others.unsqueeze(-1))

    def to_go(self, batch: Positions, num_layers: int, cost_length: int) -> Tensor:
        """The part of the cost due to a token and later ones, float32 [B, S]. Not defined for `largest`."""
        fraction = batch.exit_depths.float() / num_layers
        return self._parts(batch, fraction, cost_length).flip(1).cumsum(1).flip(1)

    def _parts(self, batch: Positions, fraction: Tensor, cost_length: int) -> Tensor:
        return fraction * batch.loss_mask / self.divisor(_lengths(batch), cost_length)


DEPTH_COSTS = {
    "mean": DepthCost(),
    "total": DepthCost(divisor=lambda lengths, cost_length: lengths * 0 + cost_length),
    "max": DepthCost(largest=True),
}
"""mean: method.md, stage 2. total: long easy filler is paid for. max: does not depend on length, so
filler gains nothing."""


def _lengths(batch: Positions) -> Tensor:
    return batch.loss_mask.sum(1, keepdim=True).clamp(min=1)


def _largest_of_others(values: Tensor) -> Tensor:
    """[B, S] >= 0 -> the largest of the row without the position itself, [B, S]."""
    top = values.topk(min(2, values.size(1)), dim=1).values
    second = top[:, 1:2] if values.size(1) > 1 else top * 0
    return (values == top[:, :1]).float() * second + (values < top[:, :1]).float() * top[:, :1]


def token_advantage(batch: Positions, to_go: Tensor, charged: Tensor, group: int) -> Tensor:
    """Advantage [B, S] of every generated token in its own depth cost and that of later tokens, per unit of lambda.

    The baseline is the mean cost to go of the group's other answers at the same token, 0 past their ends, so it does
    not depend on the token. Answers that are not charged, bool [B], and those with no other to compare with have none.
    `group` answers of a prompt are neighbours in the batch; to_go [B, S].
    """
    counts = batch.loss_mask & charged.unsqueeze(1)
    if not counts.any():
        return to_go * 0
    # Answers begin at different positions: put token t of all of them into column t.
    rows, _ = counts.nonzero(as_tuple=True)
    columns = (counts.long().cumsum(1) - 1)[counts]
    width = int(counts.sum(1).max())
    packed = to_go.new_zeros(len(counts), width)
    packed[rows, columns] = to_go[counts]
    grouped, rest = packed.view(-1, group, width), charged.view(-1, group, 1).float()
    rest = rest.sum(1, keepdim=True) - rest
    others = (grouped.sum(1, keepdim=True) - grouped) / rest.clamp(min=1)
    advantage = to_go.new_zeros(to_go.shape)
    advantage[counts] = ((others - grouped) * (rest > 0)).reshape(-1, width)[rows, columns]
    return advantage


@dataclass(frozen=True)
class Credit:
    """What a position is credited with. to_go: its own depth cost and that of later tokens. local: an exit with its own
    cost (`hazard_costs`), a token with its answer's. Neither: both with the answer's."""

    to_go: bool = False
    local: bool = False


CREDITS = {"answer": Credit(), "token": Credit(to_go=True), "exit": Credit(local=True)}


PARTS = 8
"""Positions that reach a gate are divided by its hazard there into this many parts of equal size."""
PRIOR = 4.0
"""The whole gate's mean counts as so many positions of each part, for parts that have few of their own."""


def hazard_costs(
    batch: Positions, layout: ExitLayout, costs: Tensor, divergence: Tensor | None, hazards: Tensor | None
) -> Tensor:
    """Cost of exiting at a gate less that of continuing, float32 [B, S, M]; 0 at gates that a position doesn't reach.

    costs [B, S, M + 1]: of each outcome (`DepthCost.of_outcomes`); divergence: what an outcome costs beside that, of
    the one that was taken [B, S] or of all up to it [B, S, M + 1], None for nothing; hazards [B, S, M] of the gates
    that decided, None if unknown.

    With C_i the cost of exiting at gate i and V_i that of going on, the expected cost there is s_i C_i + (1 - s_i) V_i
    and its slope by the hazard s_i is C_i - V_i. A loss in which the hazard has this weight therefore has the expected
    cost's gradient over both decisions of the gate, without the noise of the one that was drawn (all-action policy
    gradient: Sutton et al. 2000, "Policy gradient methods for reinforcement learning with function approximation").
    One of C_i and V_i is observed; the other is estimated by the mean over positions with about the same hazard that
    decided the other way at this gate. The price of depth needs no such estimate. With the divergences of all outcomes
    C_i needs none either, so gates can learn to distinguish tokens to which they now give the same hazard. If only the
    divergence of the exit taken is known and a gate never fired, its cost is unknown and the gate is not trained.
    """
    import torch
    import torch.nn.functional as F

    exits = len(layout.depths)
    outcome = _outcomes(batch, layout)
    result = costs.new_zeros(*outcome.shape, exits)
    for gate in range(exits):
        reached = batch.gate_mask & (outcome >= gate)
        ends, here = outcome[reached], costs[reached]
        fired = ends == gate
        if not len(ends) or (divergence is not None and divergence.dim() == 2 and not fired.any()):
            continue
        part = _equal_parts(hazards[..., gate][reached]) if hazards is not None else torch.zeros_like(ends)
        went_on = F.one_hot(ends[~fired], exits + 1).float()
        # Where all fire, what would have come behind is taken for full depth.
        behind = _means(went_on, part[~fired], otherwise=F.one_hot(ends.new_tensor(exits), exits + 1).float())[part]
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
    diverged, is in the last: the update reports that its gradient is not finite."""
    import torch

    ranks = torch.searchsorted(values.sort().values, values).clamp(max=len(values) - 1)
    return ranks * PARTS // len(values)


def _means(values: Tensor, part: Tensor, *, otherwise: Tensor) -> Tensor:
    """Means of values [n, C] by part, drawn towards the mean of all, float32 [PARTS, C]; `otherwise` [C] if n is 0."""
    import torch

    whole = values.mean(0) if len(values) else otherwise
    sums = values.new_zeros(PARTS, values.size(1)).index_add_(0, part, values)
    counts = torch.bincount(part, minlength=PARTS).unsqueeze(-1)
    return (sums + PRIOR * whole) / (counts + PRIOR)
