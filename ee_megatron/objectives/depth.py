"""What depth costs: that of an answer, of each exit that a position might take, and of what is left from a token on.

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
    """Sum over an answer's tokens of depth / L, divided by `divisor(tokens, rl.depth_penalty.cost_tokens)`; or, if
    `largest`, the maximum of depth / L over the tokens that may exit."""

    divisor: Callable[[Tensor, int], Tensor] = lambda lengths, cost_length: lengths
    largest: bool = False

    def of_answers(self, batch: Positions, num_layers: int, cost_length: int) -> Tensor:
        """float32 [B]."""
        fraction = batch.exit_depths.float() / num_layers
        if self.largest:
            return (fraction * batch.asked).amax(1)
        return self._parts(batch, fraction, cost_length).sum(1)

    def of_outcomes(self, batch: Positions, layout: ExitLayout, cost_length: int) -> Tensor:
        """float32 [B, S, M + 1]: what the answer would cost if the position took that outcome and all others stayed,
        less what doesn't depend on it."""
        outcomes = batch.exit_depths.new_tensor(layout.outcomes).float() / layout.num_layers
        if not self.largest:
            each = outcomes / self.divisor(_lengths(batch), cost_length).unsqueeze(-1)
            return each.expand(*batch.counts.shape, -1)
        others = _largest_of_others(batch.exit_depths.float() / layout.num_layers * batch.asked)
        return outcomes.maximum(others.unsqueeze(-1))

    def to_go(self, batch: Positions, num_layers: int, cost_length: int) -> Tensor:
        """float32 [B, S]: the part of the cost that a token and those after it bear. Not defined for `largest`."""
        fraction = batch.exit_depths.float() / num_layers
        return self._parts(batch, fraction, cost_length).flip(1).cumsum(1).flip(1)

    def _parts(self, batch: Positions, fraction: Tensor, cost_length: int) -> Tensor:
        return fraction * batch.counts / self.divisor(_lengths(batch), cost_length)


DEPTH_COSTS = {
    "mean": DepthCost(),
    "total": DepthCost(divisor=lambda lengths, cost_length: lengths * 0 + cost_length),
    "max": DepthCost(largest=True),
}
"""mean: method.md, stage 2. total: long easy filler is paid for. max: does not depend on length, so
filler gains nothing."""


def _lengths(batch: Positions) -> Tensor:
    return batch.counts.sum(1, keepdim=True).clamp(min=1)


def _largest_of_others(values: Tensor) -> Tensor:
    """[B, S] >= 0 -> the largest of the row without the position itself, [B, S]."""
    top = values.topk(min(2, values.size(1)), dim=1).values
    second = top[:, 1:2] if values.size(1) > 1 else top * 0
    return (values == top[:, :1]).float() * second + (values < top[:, :1]).float() * top[:, :1]


def token_advantage(batch: Positions, to_go: Tensor, charged: Tensor, group: int) -> Tensor:
    """Advantage [B, S] of every generated token in what its answer's depth costs from it on, per unit of lambda.

    The baseline is the mean cost to go of the group's other answers at the same token, 0 past their ends, so it does
    not depend on the token. Answers that are not charged, bool [B], and those with no other to compare with have none.
    `group` answers of a prompt are neighbours in the batch; to_go [B, S].
    """
    counts = batch.counts & charged.unsqueeze(1)
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
    """What a position answers for. to_go: of its answer's depth, that from it on. local: an exit for what it costs
    itself (exit_credit.py), a token for its answer. Neither: tokens and exits for the answer."""

    to_go: bool = False
    local: bool = False


CREDITS = {"answer": Credit(), "token": Credit(to_go=True), "exit": Credit(local=True)}
