"""What exits and shared prompts save where finished answers are read again (scores, divergences), interleaved.

    python tools/bench_reading.py runs/demo_cpu/rl-1a2b3c4d --prompts 8 --samples 8 --json reading.json

A policy answers problems of the evaluation split, as RL samples, `--samples` times each. Then its answers are read
again: as though no token had left (`full`), under their own exits (`exits`), and with each prompt read once (`shared`).
Every repeat does all of them in turn; ratios to `full` are taken within a repeat, median [least, most] over repeats.
The ceiling is the ratio of multiply-adds: layers, keys and values of those that are skipped, and readouts, for the
teacher and the policy. Processor seconds of this process, on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from ee_megatron.exit_rules import Sample
from ee_megatron.families import ModelDims
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.planning.flops import merged_layers_cost
from ee_megatron.planning.workload import Load
from ee_megatron.policy import PolicySpec, WeightSet, load_policy
from ee_megatron.rollout import GenerationRequest, SamplingParams
from ee_megatron.rollout.engine import scoring
from ee_megatron.rollout.pool.local import LocalPool
from ee_megatron.tasks import task_of
from ee_megatron.training import stages
from ee_megatron.types import Rollout

READINGS = ("score", "read_exits")
# More than any part of the positions: no prompt is read apart from its answers.
NEVER = 2.0


def cost(
    dims: ModelDims, spec: PolicySpec, answers: Sequence[Rollout], reading: str, samples: int, once: bool
) -> float:
    """FLOPs of reading groups of `samples` answers by the teacher and by the policy, each prompt once or with each."""
    depths = [a.exit_depths for a in answers]
    prompts = [len(a.prompt_tokens) for a in answers]
    load = Load.counted(prompts, depths, dims.num_layers, samples, float(once), spec.first_token)
    layers = merged_layers_cost(dims, load, full=True) + merged_layers_cost(dims, load)
    tokens = sum(map(len, depths))
    asked = np.concatenate([taken[not spec.first_token :] for taken in depths])
    policy = tokens if reading == "score" else sum(int((asked >= depth).sum()) for depth in spec.layout.outcomes)
    return layers + 2 * dims.vocab * dims.hidden * (tokens + policy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", type=Path, help="directory of a calibrate or rl stage")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="answers to each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    try:
        cfg, model, checkpoint = stages.trained(options.stage)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    spec, tensors = load_policy(checkpoint)
    dims, task = HFDirectory(model).dims, task_of(cfg, model)
    pool = LocalPool(model, spec, getattr(torch, options.dtype), threads=1)
    pool.load(WeightSet(1, tensors))
    sampling = SamplingParams(cfg.rl.temperature, cfg.rollout.max_new_tokens, tuple(cfg.rollout.stop))
    asked = GenerationRequest(task.prompts("evaluation")[: options.prompts], options.samples, sampling, Sample(), 0)
    answers = [rollout for group in pool.generate(asked) for rollout in group]
    deep = [replace(a, exit_depths=np.full_like(a.exit_depths, spec.num_layers)) for a in answers]
    prompt, answer = (
        sum(map(len, of)) / len(answers) for of in ([a.prompt_tokens for a in answers], [a.tokens for a in answers])
    )
    depth = float(np.concatenate([a.exit_depths for a in answers]).mean()) / spec.num_layers
    print(f"{len(answers)} answers, prompts of {prompt:.1f} tokens, answers of {answer:.1f}, depth {depth:.3f}")
    print(f"{'reading':>17} {'how':>7} {'seconds':>8} {'speed-up':>20} {'ceiling':>8} {'share':>6}")
    rows = []
    for reading in READINGS:
        variants = {"full": (deep, False), "exits": (answers, False), "shared": (answers, True)}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for repeat in range(1 + options.repeats):
            for name, (read, once) in variants.items():
                with nullcontext() if once else patch.object(scoring, "SHARED_FROM", NEVER):
                    start = time.process_time()
                    getattr(pool, reading)(read)
                    # The first time warms up.
                    seconds[name] += [time.process_time() - start] * (repeat > 0)
        most = cost(dims, spec, deep, reading, options.samples, False)
        for name, (read, once) in variants.items():
            gains = [full / own for full, own in zip(seconds["full"], seconds[name], strict=True)]
            gain, bound = statistics.median(gains), most / cost(dims, spec, read, reading, options.samples, once)
            spread = f"{gain:.3f} [{min(gains):.3f}, {max(gains):.3f}]"
            median = statistics.median(seconds[name])
            print(f"{reading:>17} {name:>7} {median:>8.2f} {spread:>20} {bound:>8.3f} {gain / bound:>6.0%}", flush=True)
            rows.append(
                {"reading": reading, "how": name, "seconds": seconds[name], "speed_up": gain, "least": min(gains),
                 "most": max(gains), "ceiling": bound, "share": gain / bound}
            )  # fmt: skip
    if options.json:
        found = {"answers": len(answers), "prompt": prompt, "answer": answer, "mean_depth": depth, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
