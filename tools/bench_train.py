"""What exits cost and save in the learner: a forward and backward pass at several mean depths, interleaved.

    python tools/bench_train.py --model models/SmolLM2-135M-Instruct --repeats 7

Rows: plain (the same Megatron model and adapters without gates and without control tensor), then the early-exit model
at full depth and at drawn exits of mean depth 0.7, 0.5 and 0.3. Every repeat runs all rows once, in turn, so that a
drift of the machine's speed touches all alike; ratios are taken within a repeat. One process, one thread, CPU seconds,
which other processes on the machine disturb less than the clock. Prints a table and, with --json, writes the figures.

The floor of a row counts multiply-adds per position: keys and values of every layer, the rest of a layer for the
positions that are active in it, and the head.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from workloads import exits_with_mean, interleaved, make_weights, ratio, save

from ee_megatron.config.schema import DeepspeedConfig, ParallelConfig
from ee_megatron.families import ModelDims
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.learner.learner import Learner
from ee_megatron.learner.packing import deal
from ee_megatron.learner.passes import MicroBatch, run_schedule
from ee_megatron.model.gpt import EarlyExitGPT
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, initial_policy


def make_batch(dims: ModelDims, outcomes: list[int], mean: float, rows: int, length: int) -> ReplayBatch:
    """Sequences that are all answer but for one prompt token, with exits of the given mean depth (share of L)."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, dims.vocab, (rows, length))
    depths = np.full((rows, length - 1), dims.num_layers)
    if mean < 1:
        depths = exits_with_mean(outcomes, mean * dims.num_layers, depths.shape, seed=1)
        depths[:, 0] = dims.num_layers
    return pack(list(tokens[:, :1]), list(tokens[:, 1:]), list(depths), dims.num_layers)


def floor_share(dims: ModelDims, depths: torch.Tensor) -> float:
    """Multiply-adds at these depths as a share of full depth, head included."""
    linear = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    kv = 2 * dims.kv_size * dims.hidden
    head = dims.vocab * dims.hidden
    mean = float(depths.float().mean())
    return (dims.num_layers * kv + mean * (linear - kv) + head) / (dims.num_layers * linear + head)


def run(learner: Learner, batch: ReplayBatch, *, plain: bool) -> float:
    """CPU seconds of one forward and backward pass of a micro-batch; `plain`: without control, by megatron-core's own
    layers, which take sequences of one length side by side."""
    for parameter in learner.model.parameters():
        parameter.grad = None

    weights = make_weights(batch)
    begun = time.process_time()
    ((strip,),) = deal(batch, batch.tokens.numel(), 1).ranks
    packed = MicroBatch.of(batch, strip).weighted(weights, strip, 1.0, len(learner.spec.exit_depths))

    def forward(model: EarlyExitGPT, part: MicroBatch) -> torch.Tensor:
        return model(batch.tokens, None) if plain else model(part.tokens, part.control)

    def loss(part: MicroBatch, output: torch.Tensor) -> torch.Tensor:
        hidden = output.transpose(0, 1)[batch.counts] if plain else output.flatten(0, 1)[part.counted]
        assert learner.head is not None
        weight, labels = (
            (weights.token[batch.counts], batch.labels()[batch.counts]) if plain else (part.token, part.labels)
        )
        return learner.head(hidden, labels.unsqueeze(-1), lambda log_probs, at: -(weight[at] * log_probs[:, 0]).sum())[
            0
        ]

    run_schedule(learner.model, [packed], forward, loss, slots=packed.tokens.size(1), train=True)
    return time.process_time() - begun


def step_times(options: argparse.Namespace, device: torch.device) -> dict:
    """Time every row `repeats` times, in turn; print the table and return it."""
    source = HFDirectory(options.model)
    dims = source.dims
    exits = tuple(range(5, dims.num_layers, 5))
    outcomes = [*exits, dims.num_layers]
    learners = {}
    for name, depths in (("plain", ()), ("exits", exits)):
        spec = PolicySpec(dims.num_layers, depths)
        learners[name] = Learner(
            source, spec, initial_policy(dims, spec, 0), ParallelConfig(),
            DeepspeedConfig(), device=device, dtype=getattr(torch, options.dtype),
        )  # fmt: skip
    batches = {mean: make_batch(dims, outcomes, mean, options.rows, options.length) for mean in (1.0, 0.7, 0.5, 0.3)}
    rows = [("plain", "plain", 1.0)] + [(f"depth {mean:g}", "exits", mean) for mean in batches]
    cases = {name: partial(run, learners[which], batches[mean], plain=name == "plain") for name, which, mean in rows}
    seconds = interleaved(cases, options.repeats, warm_up=1)
    print(f"{options.rows} x {options.length} tokens, {options.dtype}, {options.repeats} repeats, one thread")
    print(f"{'row':<10} {'mean depth':>10} {'median s':>9} {'ratio to full':>14} {'min':>6} {'max':>6} {'floor':>6}")
    table = []
    for name, _, mean in rows:
        median, low, high = ratio(seconds[name], seconds["depth 1"])
        batch = batches[mean]
        depth = float(batch.exit_depths[batch.counts].float().mean()) / dims.num_layers
        row = {
            "row": name,
            "mean_depth": depth,
            "median_s": statistics.median(seconds[name]),
            "ratio": median,
            "ratio_min": low,
            "ratio_max": high,
            "floor": floor_share(dims, batch.exit_depths[batch.counts]),
        }
        table.append(row)
        print(
            f"{name:<10} {depth:>10.3f} {row['median_s']:>9.2f} {row['ratio']:>14.3f} {row['ratio_min']:>6.3f} "
            f"{row['ratio_max']:>6.3f} {row['floor']:>6.3f}"
        )
    return {"settings": vars(options), "rows": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = groups.initialise(Degrees())
    found = step_times(options, device)
    save(options.json, found)
    groups.finish()


if __name__ == "__main__":
    main()
