"""Of the answers that a model gets right at full depth and wrong under a threshold: is the token's own exit at fault or
the frozen streams that it read?

A token that exits is read out early, and its frozen stream is what later tokens see of it. Where greedy answers part,
the first differing token is made again at full depth, after the same tokens at the same exits. If it then is what full
depth writes, its own exit was at fault; if not, the exits of tokens before it were.

    python tools/blame_exits.py runs/demo_cpu/calibrate-1a2b3c4d --threshold 0.95 --problems 400 --json blame.json

Answers the validation split of the stage's own task, greedily, with its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ee_megatron.exit_rules import Off, Prescribed, Threshold
from ee_megatron.policy import WeightSet, load_policy
from ee_megatron.rollout import GenerationRequest, SamplingParams
from ee_megatron.rollout.pool.interface import RolloutPool
from ee_megatron.rollout.pool.local import LocalPool
from ee_megatron.tasks import task_of
from ee_megatron.training import stages
from ee_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class FirstDifference:
    """Where two answers to a prompt part: at token `at` (0-based) the exited one, made after `depth` layers, wrote
    `wrote` where full depth writes `full` (token ids). `own`: its own exit is at fault, not its context."""

    prompt_id: str
    at: int
    depth: int
    full: int
    wrote: int
    own: bool


def partings(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    full: Sequence[Rollout],
    exited: Sequence[Rollout],
    sampling: SamplingParams,
    num_layers: int,
) -> list[FirstDifference]:
    """One entry for every pair of greedy answers that differ, made under the weights that the pool holds.

    Raises ValueError for sampled tokens: they would differ by chance.
    """
    if sampling.temperature:
        raise ValueError(f"temperature {sampling.temperature}: only greedy answers can be compared token by token")
    apart: dict[str, tuple[int, Prompt, Rollout, Rollout]] = {}
    for prompt, whole, early in zip(prompts, full, exited, strict=True):
        shared = min(len(whole.tokens), len(early.tokens))
        differ = np.flatnonzero(whole.tokens[:shared] != early.tokens[:shared])
        if len(differ):
            apart[prompt.id] = (int(differ[0]), prompt, whole, early)
    if not apart:
        return []
    depths = {
        (name, 0): early.exit_depths[:at].tolist() + [num_layers] * (sampling.max_new_tokens - at)
        for name, (at, _, _, early) in apart.items()
    }
    asked = [prompt for _, prompt, _, _ in apart.values()]
    again = pool.generate(GenerationRequest(asked, 1, sampling, Prescribed(depths), seed=0))
    return [
        FirstDifference(
            name,
            at,
            int(early.exit_depths[at]),
            int(whole.tokens[at]),
            int(early.tokens[at]),
            own=int(made.tokens[at]) == int(whole.tokens[at]),
        )
        for (name, (at, _, whole, early)), (made,) in zip(apart.items(), again, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", type=Path, help="directory of a calibrate or rl stage")
    parser.add_argument("--threshold", type=float, default=0.95, help="hazard above which a gate fires")
    parser.add_argument("--problems", type=int, default=400, help="of the validation split, which may hold fewer")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    try:
        cfg, model, checkpoint = stages.trained(options.stage)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    spec, tensors = load_policy(checkpoint)
    task = task_of(cfg, model)
    prompts = task.prompts("validation")[: options.problems]
    pool = LocalPool(model, spec, getattr(torch, options.dtype), rows=32)
    pool.load(WeightSet(1, tensors))
    sampling = SamplingParams(0.0, cfg.rollout.max_new_tokens, tuple(cfg.rollout.stop))
    full, exited = (
        [group[0] for group in pool.generate(GenerationRequest(prompts, 1, sampling, exits, 0))]
        for exits in (Off(), Threshold(options.threshold))
    )
    right, kept = (
        [task.verify(p, a.text).correct for p, a in zip(prompts, answers, strict=True)] for answers in (full, exited)
    )
    lost = [i for i in range(len(prompts)) if right[i] and not kept[i]]
    found = partings(
        pool, [prompts[i] for i in lost], [full[i] for i in lost], [exited[i] for i in lost], sampling, spec.num_layers
    )
    figures = {
        "problems": len(prompts),
        "threshold": options.threshold,
        "right_at_full_depth": sum(right),
        "right_under_threshold": sum(kept),
        "lost": len(lost),
        "gained": sum(k and not r for k, r in zip(kept, right, strict=True)),
        "own_exit": sum(p.own for p in found),
        "context": sum(not p.own for p in found),
        "depths_of_the_first_wrong_token": dict(sorted(Counter(p.depth for p in found).items())),
    }
    for name, value in figures.items():
        print(f"{name:34} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
