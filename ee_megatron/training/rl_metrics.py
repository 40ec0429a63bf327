"""Metrics of an RL step, computed from its records for the log alone.

FLOPs and padding depend on seed and settings alone and are in metrics.jsonl; times are in timings.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..config.derive import has_actors, ranks
from ..config.schema import RunConfig
from ..families import ModelDims
from ..learner.batch import ReplayBatch
from ..learner.packing import PackingStats
from ..objectives.depth import DEPTH_COSTS
from ..planning.devices import board
from ..planning.flops import step_flops
from ..planning.layout import Layout
from ..types import Group
from .advantages import Advantages, StepScores, rollouts_of
from .update import LogprobDiff, UpdateResult

PHASES = ("rollout", "score", "update")


class TargetState(NamedTuple):
    """Running mean of the policy's accuracy, and its target; in [0, 1]."""

    running: float
    goal: float


def accuracy(groups: Sequence[Group]) -> float:
    return float(np.mean(np.concatenate([group.correct for group in groups])))


def step_metrics(
    batch: ReplayBatch,
    groups: Sequence[Group],
    scores: StepScores,
    advantages: Advantages,
    result: UpdateResult,
    *,
    num_layers: int,
    lambda_depth: float,
    target: TargetState | None,
) -> dict[str, float]:
    """All metrics of a step except its costs."""
    values = advantage_metrics(batch, advantages, lambda_depth)
    difference, policy = result.logprob_diff, scores.policy
    if policy is not None:
        seen = LogprobDiff.of(batch, rollouts_of(groups), policy)
        values |= {"logprob_diff": seen.token, "exit_logprob_diff": seen.exit}
        values["token_entropy"] = float(policy.token_entropy[batch.loss_mask].mean())
        values["exit_entropy"] = float(policy.exit_entropy[batch.loss_mask].mean())
    values |= rollout_metrics(batch, groups, num_layers)
    if target is not None:
        values |= {"accuracy_running": target.running, "accuracy_goal": target.goal}
    if difference is not None:
        values |= {"logprob_diff": difference.token, "exit_logprob_diff": difference.exit}
    if result.kl:
        values["kl_exact"] = float(np.mean(result.kl))
        values.setdefault("kl_to_reference", result.kl[0])
    for name, key in (("body", "grad_norm/body"), ("gates", "grad_norm/gates"), ("all", "grad_norm")):
        values[key] = float(np.mean([u.norms[name] for u in result.updates]) if result.updates else 0.0)
    return values | {
        "updates": float(sum(u.applied for u in result.updates)),
        "updates_left_out": float(sum(not u.applied for u in result.updates)),
        "groups_dropped": float(len(groups) - len(result.groups)),
        "clip_fraction": float(np.mean(result.clip_fraction)) if result.clip_fraction else 0.0,
    }


def advantage_metrics(batch: ReplayBatch, x: Advantages, lambda_depth: float) -> dict[str, float]:
    ratio, counts = x.log_importance.exp()[batch.loss_mask], batch.loss_mask
    left_out = (x.experience.token_importance == 0) | (x.experience.exit_importance == 0)
    values = {
        "reward": float(x.reward.mean()),
        "task_reward": float(x.task_reward.mean()),
        "depth_cost": float(x.depth_cost.mean()),
        "lambda": lambda_depth,
        "advantage_std": float(x.advantage.std(unbiased=False)),
        "charged": float(x.penalized.float().mean()),
        "filtered": float((~x.loss_included).float().mean()),
        "importance_ratio_mean": float(ratio.mean()),
        "importance_ratio_max": float(ratio.max()),
        "importance_left_out": float(left_out[counts].float().mean()),
    }
    return values if x.kl is None else values | {"kl_to_reference": float(x.kl.mean())}


def rollout_metrics(batch: ReplayBatch, groups: Sequence[Group], num_layers: int) -> dict[str, float]:
    """Metrics computed from the rollouts alone."""
    counts, lengths = batch.loss_mask, batch.loss_mask.sum(1).float()
    fraction = batch.exit_depths.float()[counts] / num_layers
    depths, hits = torch.unique(batch.exit_depths[counts], return_counts=True)
    low, middle, high = torch.quantile(fraction, torch.tensor([0.1, 0.5, 0.9])).tolist()
    largest = DEPTH_COSTS["max"].of_answers(batch, num_layers, 1)
    rollouts = rollouts_of(groups)
    return {
        "accuracy": accuracy(groups),
        "well_formed": float(np.mean(np.concatenate([g.well_formed for g in groups]))),
        "finished": float(np.mean([r.finished for r in rollouts])),
        "mean_depth": float(fraction.mean()),
        "depth_q10": low,
        "depth_q50": middle,
        "depth_q90": high,
        "max_depth": float(largest.mean()),
        "total_depth": float((batch.exit_depths * counts).sum(1).float().mean()),
        "length": float(lengths.mean()),
        "prompt_length": float(np.mean([len(r.prompt_tokens) for r in rollouts])),
        "tokens": float(lengths.sum()),
    } | {f"exit_share/{int(d)}": float(h) / int(counts.sum()) for d, h in zip(depths, hits, strict=True)}


def cost_metrics(
    cfg: RunConfig,
    dims: ModelDims,
    groups: Sequence[Group],
    learned: Sequence[int],
    packing: PackingStats,
    passed: Sequence[int] | None = None,
) -> dict[str, float]:
    """FLOPs of the step's phases, and the padding of its micro-batches. learned: rows of the answers that entered the
    loss. packing: of a pass over the rows `passed`, all by default."""
    size, rollouts = cfg.rl.group_size, rollouts_of(groups)
    prompts = [len(rollout.prompt_tokens) for rollout in rollouts]
    rows = range(len(rollouts)) if passed is None else passed
    # Share of the largest possible saving from computing each group's prompt once.
    apart = sum(prompts[row] + rollouts[row].length - 1 for row in rows)
    most = sum((n - 1) * (prompts[group * size] - 1) for group, n in Counter(row // size for row in rows).items())
    shared = min(1.0, max(0.0, (apart - packing.positions) / most)) if most else 1.0
    depths = [rollout.exit_depths for rollout in rollouts]
    flops = step_flops(Layout.of(cfg, dims), cfg, prompts, depths, learned, shared)
    return {f"flops/{phase}": value for phase, value in flops.items()} | {
        "padding": 1 - packing.positions / packing.slots if packing.slots else 0.0,
        "micro_batches": float(packing.micro_batches),
    }


def step_timings(cfg: RunConfig, values: dict[str, float], seconds: dict[str, float], peak: float) -> dict[str, float]:
    """Seconds by phase; answer tokens and FLOPs per second of a phase and device that worked in it; mfu: the latter as
    a share of the device's peak FLOP/s, `peak`, 0 if unknown. `values`: of `rollout_metrics` and `cost_metrics`.

    No rates for rollouts that were generated while the learner trained, nor for a phase without work.
    """
    timings = {f"seconds_{phase}": value for phase, value in seconds.items()}
    timings["tokens_per_s"] = values["tokens"] / seconds["step"]
    for phase in PHASES:
        waited_for = phase != "rollout" or not cfg.rollout.max_staleness
        if phase not in seconds or not waited_for or not values[f"flops/{phase}"]:
            continue
        each = seconds[phase] * devices(cfg, phase)
        timings[f"tokens_per_s_device/{phase}"] = values["tokens"] / each
        timings[f"flops_per_s_device/{phase}"] = values[f"flops/{phase}"] / each
        if peak:
            timings[f"mfu/{phase}"] = values[f"flops/{phase}"] / each / peak
    return timings


def devices(cfg: RunConfig, phase: str) -> int:
    """Number of devices that work in a phase."""
    if phase != "rollout":
        return ranks(cfg)
    return cfg.rollout.actors * cfg.rollout.tensor if has_actors(cfg.rollout) else 1


def peak_flops(device_type: str, dtype: torch.dtype) -> float:
    """FLOP/s of this rank's GPU by its data sheet; 0 for unknown GPUs and CPUs."""
    if device_type != "cuda":
        return 0.0
    known = board(torch.cuda.get_device_name())
    return known.peak(dtype.itemsize) if known else 0.0
