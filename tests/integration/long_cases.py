"""What the ranks compute in the test of long answers."""

from __future__ import annotations

import time
from pathlib import Path

from layout_cases import gradients, make_learner

from ee_megatron.policy import PolicySpec
from ee_megatron.training.advantages import StepScores, collate, compute_advantages
from ee_megatron.training.update import objective_of

# Tokens that an answer may have.
LONGEST = 16_384


def step(path, spec: PolicySpec, policy, degrees, stages, groups, rl):
    """A step's scores, weights and gradients, its seconds by phase, and the most memory that this rank held, bytes."""
    learner = make_learner(path, spec, policy, degrees, stages, tokens_per_micro_batch=16_384, recompute=True)
    clock = [time.monotonic()]
    batch = collate(groups, spec.num_layers)
    first, reference = learner.score(batch), learner.score(batch, reference=True).token_logprobs
    clock.append(time.monotonic())
    experience = compute_advantages(
        batch, groups, StepScores(first, reference), rl, spec.layout, lambda_depth=rl.depth_penalty.weight
    ).experience
    weights, _ = objective_of(rl, LONGEST).weights(batch, experience, first.token_logprobs, first.exit_logprobs)
    found = gradients(learner, batch, weights)
    clock.append(time.monotonic())
    status = Path("/proc/self/status").read_text()
    return {
        "batch": batch, "weights": weights, "gradients": found, "packed": learner.pack(batch).stats,
        "token_logprobs": first.token_logprobs, "exit_logprobs": first.exit_logprobs,
        "peak": int(status.split("VmHWM:")[1].split()[0]) * 1024,
        "seconds": {"score": clock[1] - clock[0], "train": clock[2] - clock[1]},
    }  # fmt: skip
