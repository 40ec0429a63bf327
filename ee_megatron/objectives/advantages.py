"""What a rollout is worth (task reward, distance from the reference, depth), and its advantage among the K rollouts of
its prompt: the functions in ADVANTAGES take rewards float [N, K] and return as many."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .weights import Positions

if TYPE_CHECKING:
    from torch import Tensor


def rloo(rewards: np.ndarray) -> np.ndarray:
    """Leave-one-out: A_k = R_k - mean of the others (Ahmadian et al. 2024, arXiv 2402.14740)."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * (k / (k - 1))


def mean_centred(rewards: np.ndarray) -> np.ndarray:
    """A_k = R_k - mean of the group (Liu et al. 2025, arXiv 2503.20783)."""
    return rewards - rewards.mean(1, keepdims=True)


def grpo(rewards: np.ndarray) -> np.ndarray:
    """A_k = (R_k - mean) / (standard deviation + 1e-4) (Shao et al. 2024, arXiv 2402.03300)."""
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)


def none(rewards: np.ndarray) -> np.ndarray:
    """A_k = R_k: plain REINFORCE, no baseline."""
    return rewards


ADVANTAGES = {"rloo": rloo, "mean": mean_centred, "grpo": grpo, "none": none}

DEPTH_COSTS: dict[str, Callable[[Tensor, int], Tensor | int]] = {
    "mean": lambda lengths, cost_length: lengths,
    "total": lambda lengths, cost_length: cost_length,
}
"""What the sum of depth / L over an answer's tokens is divided by, from its length and rl.cost_length: with "total"
long easy filler is paid for."""


def depth_cost(batch: Positions, num_layers: int, kind: str, cost_length: int) -> Tensor:
    """What the answer's depth costs, float32 [B]: the sum of depth / L over generated tokens (method.md, stage 2),
    divided as DEPTH_COSTS says."""
    fraction = batch.exit_depths.float() / num_layers * batch.counts
    lengths = batch.counts.sum(1).clamp(min=1)
    return fraction.sum(1) / DEPTH_COSTS[kind](lengths, cost_length)


def mean_log_ratio(batch: Positions, policy: Tensor, reference: Tensor) -> Tensor:
    """k1 estimate of KL(policy ‖ reference): mean over generated tokens of log pi - log pi_ref, float32 [B]."""
    return ((policy - reference) * batch.counts).sum(1) / batch.counts.sum(1).clamp(min=1)


def rollout_reward(task: Tensor, log_ratio: Tensor, cost: Tensor, beta: float, lambda_exit: float) -> Tensor:
    """R = r_task - beta * mean log-ratio - lambda * depth cost, float32 [B] (method.md, stage 2)."""
    return task - beta * log_ratio - lambda_exit * cost


def token_depth_advantage(batch: Positions, group: int, num_layers: int, kind: str, cost_length: int) -> Tensor:
    """Advantage [B, S] of every generated token in what its answer's depth costs from it on, per unit of lambda.

    The cost to go at token t is sum over u >= t of depth_u / L, divided as in `depth_cost`; the baseline is the mean
    cost to go of the group's other answers at the same t, 0 past their ends, so it does not depend on the token.
    `group` answers of a prompt are neighbours in the batch.
    """
    counts = batch.counts
    lengths = counts.sum(1, keepdim=True).clamp(min=1)
    cost = batch.exit_depths.float() / num_layers * counts / DEPTH_COSTS[kind](lengths, cost_length)
    to_go = cost.flip(1).cumsum(1).flip(1)
    # Answers begin at different positions: put token t of all of them into column t.
    rows, _ = counts.nonzero(as_tuple=True)
    columns = (counts.long().cumsum(1) - 1)[counts]
    width = int(lengths.max())
    packed = to_go.new_zeros(len(counts), width)
    packed[rows, columns] = to_go[counts]
    grouped = packed.view(-1, group, width)
    others = (grouped.sum(1, keepdim=True) - grouped) / max(1, group - 1)
    advantage = to_go.new_zeros(to_go.shape)
    advantage[counts] = (others - grouped).reshape(-1, width)[rows, columns]
    return advantage


DEPTH_CREDITS: dict[str, Callable[[Positions, int, int, str, int], Tensor] | None] = {
    "sequence": None,
    "token": token_depth_advantage,
}
"""How a token answers for depth: None, by its answer's reward; else by an advantage of its own."""
