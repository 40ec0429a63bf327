"""The pure parts of the two objectives: what a rollout is worth, how far it may be trusted, how fast to learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..learner.batch import ReplayBatch


def depth_cost(batch: ReplayBatch, num_layers: int, kind: str, cost_length: int) -> Tensor:
    """What the answer's depth costs, float32 [B]. "mean": mean over generated tokens of depth / L (method.md, stage 2);
    "total": their sum divided by `cost_length`, so that long easy filler is paid for."""
    fraction = batch.depths.float() / num_layers * batch.counts
    lengths = batch.counts.sum(1).clamp(min=1)
    return fraction.sum(1) / (lengths if kind == "mean" else cost_length)


def mean_log_ratio(batch: ReplayBatch, policy: Tensor, reference: Tensor) -> Tensor:
    """k1 estimate of KL(policy ‖ reference): mean over generated tokens of log pi - log pi_ref, float32 [B]."""
    return ((policy - reference) * batch.counts).sum(1) / batch.counts.sum(1).clamp(min=1)


def rollout_reward(task: Tensor, log_ratio: Tensor, cost: Tensor, beta: float, lambda_exit: float) -> Tensor:
    """R = r_task - beta * mean log-ratio - lambda * depth cost, float32 [B] (method.md, stage 2)."""
    return task - beta * log_ratio - lambda_exit * cost


def truncated_ratio(learner: Tensor, rollout: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Importance ratios per position, exp(log p_learner - log p_rollout) of token and exit together, and the same
    truncated from above at `cap` (truncated importance sampling, Ionides 2008). All [B, S]."""
    raw = (learner - rollout).exp()
    return raw, raw.clamp(max=cap)


def clipped(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """`ratio` where PPO's clipped surrogate min(ratio A, clip(ratio, 1 - c, 1 + c) A) still has a gradient, else 0.

    The surrogate's gradient is then (what this returns) * A * grad log pi (Schulman et al. 2017, arXiv 1707.06347).
    clip 0: the ratio everywhere. All [B, S].
    """
    if not clip:
        return ratio
    gone = torch.where(advantage >= 0, ratio > 1 + clip, ratio < 1 - clip)
    return torch.where(gone, 0.0, ratio)


def k3_slope(policy: Tensor, reference: Tensor) -> Tensor:
    """Slope of the k3 estimate of KL(policy ‖ reference) by log pi: 1 - pi_ref / pi, of the log-probabilities' shape.

    k3 = pi_ref / pi - 1 - log(pi_ref / pi) (Schulman 2020, "Approximating KL divergence").
    """
    return 1.0 - (reference - policy).exp()


def token_depth_advantage(batch: ReplayBatch, group: int, num_layers: int, kind: str, cost_length: int) -> Tensor:
    """Advantage [B, S] of every generated token in what its answer's depth costs from it on, per unit of lambda.

    The cost to go at token t is sum over u >= t of depth_u / L, divided as in `depth_cost`; the baseline is the mean
    cost to go of the group's other answers at the same t, 0 past their ends, so it does not depend on the token.
    `group` answers of a prompt are neighbours in the batch.
    """
    counts = batch.counts
    lengths = counts.sum(1, keepdim=True).clamp(min=1)
    cost = batch.depths.float() / num_layers * counts / (lengths if kind == "mean" else cost_length)
    to_go = cost.flip(1).cumsum(1).flip(1)
    # Answers begin at different positions: put token t of all of them into column t.
    index = counts.long().cumsum(1) - 1
    width = int(lengths.max())
    packed = torch.zeros(len(counts), width)
    rows = torch.arange(len(counts)).unsqueeze(1).expand_as(index)
    packed[rows[counts], index[counts]] = to_go[counts]
    grouped = packed.view(-1, group, width)
    others = (grouped.sum(1, keepdim=True) - grouped) / max(1, group - 1)
    advantage = (others - grouped).reshape(-1, width)
    found = torch.zeros_like(to_go)
    found[counts] = advantage[rows[counts], index[counts]]
    return found


def price(step: int, steps: int, lambda_exit: float, warmup: float) -> float:
    """lambda at step `step` (0-based): rises linearly over the first `warmup` share of the steps, then stays."""
    rise = round(steps * warmup)
    return lambda_exit if step >= rise else lambda_exit * (step + 1) / (rise + 1)


def learning_rate(update: int, total: int, warmup: int, decay: str, floor: float = 0.1) -> float:
    """Factor of update `update` (0-based): linear rise over `warmup` updates, then constant, or a linear or cosine fall
    to `floor` at the last update."""
    if update < warmup:
        return (update + 1) / warmup
    if decay == "constant":
        return 1.0
    done = (update - warmup) / max(1, total - 1 - warmup)
    return 1.0 - (1.0 - floor) * (done if decay == "linear" else 0.5 * (1 - math.cos(math.pi * done)))


def schedule(step: int, total: int, warmup: float) -> float:
    """`learning_rate` with `warmup` as a share of the updates (at least one) and a linear fall."""
    return learning_rate(step, total, max(1, round(total * warmup)), "linear")
