"""The pure parts of the two objectives: what a rollout is worth, how far it may be trusted, how fast to learn."""

from __future__ import annotations

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


def schedule(step: int, total: int, warmup: float, floor: float = 0.1) -> float:
    """Learning-rate factor of update `step` (0-based): linear rise over the first `warmup` share, then linear fall to
    `floor` at the last update. The first update is never 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 1.0 - (1.0 - floor) * (step - rise) / max(1, total - 1 - rise)
