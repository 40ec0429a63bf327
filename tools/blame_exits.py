"""Of the answers that a model gets right at full depth and wrong under a threshold: is the token's own exit at fault or
the frozen streams that it read?

A token that exits is read out early, and its frozen stream is what later tokens see of it. Where greedy answers part,
the first differing token is made again at full depth, after the same tokens at the same exits. If it then is what full
depth writes, its own exit was at fault; if not, the exits of tokens before it were. Which of them: for every exit the
answer is begun again with the tokens that left there at full depth, too, and the others as they were.

    python tools/blame_exits.py runs/demo_cpu/calibrate-1a2b3c4d --threshold 0.95 --problems 400 --json blame.json

Answers the problems that the stage's configuration chooses thresholds on (the validation split's and, with
evaluate.wide_problems, wide ones), greedily, with its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
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
from ee_megatron.training.problems import wide_validation
from ee_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class FirstDifference:
    """Where two answers to a prompt part: at token `at` (0-based) the exited one, made after `depth` layers, wrote
    `wrote` where full depth writes `full` (token ids). `own`: its own exit is at fault, not its context. `mended` [M]:
    whether the answer gets as far as full depth's `full` if tokens that left at this exit, and the first that differs,
    run to full depth."""

    prompt_id: str
    at: int
    depth: int
    full: int
    wrote: int
    own: bool
    mended: tuple[bool, ...]


def partings(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    full: Sequence[Rollout],
    exited: Sequence[Rollout],
    sampling: SamplingParams,
    num_layers: int,
    exit_depths: Sequence[int] = (),
) -> list[FirstDifference]:
    """One entry for every pair of greedy answers that differ, made under the weights that the pool holds; exit_depths
    [M]: the exits that are asked after one by one.

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

    def begun_again(unless: int = 0) -> Mapping[str, bool]:
        """Whether the answer, with the tokens that left at depth `unless` and all from the parting on at full depth,
        is full depth's up to there."""
        depths = {
            (name, 0): [num_layers if d == unless else d for d in early.exit_depths[:at].tolist()]
            + [num_layers] * (sampling.max_new_tokens - at)
            for name, (at, _, _, early) in apart.items()
        }
        asked = [prompt for _, prompt, _, _ in apart.values()]
        made = pool.generate(GenerationRequest(asked, 1, sampling, Prescribed(depths), seed=0))
        return {
            name: np.array_equal(again.tokens[: at + 1], whole.tokens[: at + 1])
            for (name, (at, _, whole, _)), (again,) in zip(apart.items(), made, strict=True)
        }

    own = begun_again()
    mended = [begun_again(depth) for depth in exit_depths]
    return [
        FirstDifference(
            name,
            at,
            int(early.exit_depths[at]),
            int(whole.tokens[at]),
            int(early.tokens[at]),
            own[name],
            tuple(found[name] for found in mended),
        )
        for name, (at, _, whole, early) in apart.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", type=Path, help="directory of a calibrate or rl stage")
    parser.add_argument("--threshold", type=float, default=0.95, help="hazard above which a gate fires")
    parser.add_argument("--problems", type=int, default=400, help="of each set, which may hold fewer")
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
    sets = (task.prompts("validation"), wide_validation(cfg, model, task))
    prompts = [prompt for problems in sets for prompt in problems[: options.problems]]
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
    of_lost = ([of[i] for i in lost] for of in (prompts, full, exited))
    found = partings(pool, *of_lost, sampling, spec.num_layers, spec.exit_depths)
    tokens = np.concatenate([answer.exit_depths for answer in exited])
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
        "share_of_tokens_that_leave_at": {d: round(float((tokens == d).mean()), 3) for d in spec.exit_depths},
        "mended_without_exits_at": {d: sum(p.mended[i] for p in found) for i, d in enumerate(spec.exit_depths)},
    }
    for name, value in figures.items():
        print(f"{name:34} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
