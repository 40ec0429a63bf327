"""How much faster a trained policy answers than the same engine with the same weights at full depth, interleaved.

    python tools/bench_policy.py runs/demo_cpu/rl-1a2b3c4d --threshold 0.5 --problems 300 --rows 8 32 --json policy.json

Both answer the same problems of the evaluation split, greedily, prompts included. The first ceiling is full cost / cost
under the exits that were taken, in multiply-adds (gates and the keys and values of skipped layers included). The second
counts the weights that one generated token uses, its layers' and the readout's, and nothing of prompts. Every repeat
runs both in turn; the ratio is taken within a repeat, median [least, most] over repeats. With other work on the machine
`--clock cpu` (processor seconds of this process, on one thread) is disturbed least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ee_megatron.exit_rules import Off, Threshold
from ee_megatron.families import ModelDims
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.planning.flops import answer_cost
from ee_megatron.policy import WeightSet, load_policy
from ee_megatron.rollout import GenerationRequest, SamplingParams
from ee_megatron.rollout.pool.local import LocalPool
from ee_megatron.tasks import task_of
from ee_megatron.training import stages

KINDS = {"off": "nothing", "threshold": "gates"}


def used_weights(dims: ModelDims, mean_depth: float) -> float:
    """Elements of the matrices that a token of this depth, in layers, is multiplied by: layers and readout."""
    layer = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    return mean_depth * layer + dims.vocab * dims.hidden


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", type=Path, help="directory of a calibrate or rl stage")
    parser.add_argument("--threshold", type=float, default=0.5, help="hazard above which a gate fires")
    parser.add_argument("--problems", type=int, default=300, help="of the evaluation split, which may hold fewer")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="answers in flight")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    try:
        cfg, model, checkpoint = stages.trained(options.stage)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clock: Callable[[], float] = time.process_time if options.clock == "cpu" else time.perf_counter
    spec, tensors = load_policy(checkpoint)
    dims, task = HFDirectory(model).dims, task_of(cfg, model)
    prompts = task.prompts("evaluation")[: options.problems]
    sampling = SamplingParams(0.0, cfg.rollout.max_new_tokens, tuple(cfg.rollout.stop))
    pool = LocalPool(model, spec, getattr(torch, options.dtype), threads=options.threads)
    pool.load(WeightSet(1, tensors))
    rules = {"off": Off(), "threshold": Threshold(options.threshold)}
    rows = []
    ceilings = f"{'products':>8} {'share':>6} {'weights':>8} {'share':>6}"
    print(f"{'rows':>5} {'full s':>8} {'exits s':>8} {'speed-up':>20} {ceilings}")
    for in_flight in options.rows:
        pool.rows = in_flight
        for exits in rules.values():
            pool.generate(GenerationRequest(prompts[: 2 * in_flight], 1, sampling, exits, 0))
        seconds: dict[str, list[float]] = {kind: [] for kind in rules}
        cost, right, depth = {}, {}, {}
        for _ in range(options.repeats):
            for kind, exits in rules.items():
                start = clock()
                answers = [group[0] for group in pool.generate(GenerationRequest(prompts, 1, sampling, exits, 0))]
                seconds[kind].append(clock() - start)
                cost[kind] = sum(
                    answer_cost(
                        dims, spec.exit_depths, spec.gate_width, len(a.prompt_tokens), a.exit_depths.tolist(),
                        KINDS[kind], spec.first_token,
                    )
                    for a in answers
                )  # fmt: skip
                right[kind] = sum(task.verify(p, a.text).correct for p, a in zip(prompts, answers, strict=True))
                depth[kind] = sum(int(a.exit_depths.sum()) for a in answers) / sum(len(a.tokens) for a in answers)
        gains = [full / early for full, early in zip(seconds["off"], seconds["threshold"], strict=True)]
        gain, ceiling = statistics.median(gains), cost["off"] / cost["threshold"]
        full, early = (statistics.median(seconds[kind]) for kind in rules)
        spread = f"{gain:.3f} [{min(gains):.3f}, {max(gains):.3f}]"
        weights = used_weights(dims, depth["off"]) / used_weights(dims, depth["threshold"])
        ceilings = " ".join(f"{bound:>8.3f} {gain / bound:>6.0%}" for bound in (ceiling, weights))
        print(f"{in_flight:>5} {full:>8.1f} {early:>8.1f} {spread:>20} {ceilings}", flush=True)
        rows.append(
            {
                "rows": in_flight,
                "seconds": seconds,
                "speed_up": gain,
                "least": min(gains),
                "most": max(gains),
                "ceiling": ceiling,
                "share": gain / ceiling,
                "weights_ceiling": weights,
                "weights_share": gain / weights,
                "problems": len(prompts),
                "right": right,
                "mean_depth": {kind: value / spec.num_layers for kind, value in depth.items()},
            }
        )
    last = rows[-1]
    print(f"right of {len(prompts)}: {last['right']}; mean depth: {last['mean_depth']}")
    if options.json:
        options.json.write_text(json.dumps({"clock": options.clock, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
