"""What exits cost and save in the learner: a forward and backward pass at several mean depths, interleaved.

    python tools/bench_train.py --model models/SmolLM2-135M-Instruct --repeats 7

Rows: plain (the same Megatron model and adapters without gates and without control tensor), then the early-exit model
at full depth and at drawn exits of mean depth 0.7, 0.5 and 0.3. Every repeat runs all rows once, in turn, so that a
drift of the machine's speed touches all alike; ratios are taken within a repeat. One process, one thread, CPU seconds,
which other processes on the machine disturb less than the clock. Prints a table and, with --json, writes the figures.

The floor of a row counts multiply-adds per position: keys and values of every layer, the rest of a layer for the
positions that are active in it, and the head.

--memory measures instead the peak of resident memory while 4 x 1024 tokens are scored with a vocabulary of 150,000
(random weights, few layers), above what is resident before; Linux only.

--checkpoint measures how long training waits for a checkpoint (the rest is written beside it), with adapters and under
full fine-tuning, by the clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from workloads import exits_with_mean, make_weights

from ee_megatron.config.schema import DeepspeedConfig, ParallelConfig
from ee_megatron.families import ModelDims
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.learner.learner import Learner
from ee_megatron.learner.packing import deal
from ee_megatron.learner.passes import MicroBatch
from ee_megatron.model.gpt import EarlyExitGPT
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.parallel.schedule import run_schedule
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.training.checkpoints import TrainingStreams, write_training


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


def scoring_memory(device: torch.device, rows: int = 4, length: int = 1024, vocab: int = 150_000) -> dict:
    """Peak resident memory of one scoring pass above the memory before it, MiB."""
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen2Config(
            vocab_size=vocab, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
            intermediate_size=1024, tie_word_embeddings=False,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        source = HFDirectory(folder)
        spec = PolicySpec(4, (2,))
        learner = Learner(
            source, spec, initial_policy(source.dims, spec, 0), ParallelConfig(tokens_per_micro_batch=rows * length),
            DeepspeedConfig(), device=device,
        )  # fmt: skip
    batch = make_batch(learner.dims, [2, 4], 0.75, rows, length)
    learner.score(make_batch(learner.dims, [2, 4], 0.75, rows, 16))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    learner.score(batch)
    above = _status("VmHWM") - before
    print(f"scoring {rows} x {length} tokens, vocabulary {vocab}: {above:.0f} MiB above the {before:.0f} MiB before it")
    return {"rows": rows, "length": length, "vocab": vocab, "before_mib": before, "peak_mib": above}


def _status(field: str) -> float:
    """A field of /proc/self/status, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}: this measurement needs Linux")


def checkpoint_waits(options: argparse.Namespace, device: torch.device) -> dict:
    """Seconds that training waits while a checkpoint's tensors are collected, and seconds to write them."""
    source = HFDirectory(options.model)
    dims, found = source.dims, {}
    exits = tuple(range(5, dims.num_layers, 5))
    for name, spec in (
        ("adapters", PolicySpec(dims.num_layers, exits)),
        ("full", PolicySpec(dims.num_layers, exits, rank=0, full=True)),
    ):
        learner = Learner(
            source, spec, initial_policy(dims, spec, 0, source.tensor), ParallelConfig(), DeepspeedConfig(),
            device=device,
        )  # fmt: skip
        batch = make_batch(dims, [*exits, dims.num_layers], 0.5, 2, 16)
        learner.step(batch, make_weights(batch), adapter_lr=1e-4, gate_lr=1e-4)
        waits, writes = [], []
        for _ in range(options.repeats):
            clock = [time.perf_counter()]
            policy, state = learner.export_policy(), learner.export_optimizer()
            clock.append(time.perf_counter())
            with tempfile.TemporaryDirectory(dir=".") as folder:
                write_training(Path(folder), spec, TrainingStreams.of(policy, state), {})
                clock.append(time.perf_counter())
            waits.append(clock[1] - clock[0])
            writes.append(clock[2] - clock[1])
        size = sum(t.numel() for tensors in (policy, *state.tensors.values()) for t in tensors.values()) * 4 / 2**20
        found[name] = {"wait_s": statistics.median(waits), "write_s": statistics.median(writes), "mib": size}
        print(
            f"{name:<9} {size:7.0f} MiB  waits {found[name]['wait_s']:.2f} s, written in {found[name]['write_s']:.2f} s"
        )
        del learner, policy, state
        gc.collect()
    return found


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
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in rows}
    for repeat in range(options.repeats + 1):
        for name, which, mean in rows:
            taken = run(learners[which], batches[mean], plain=name == "plain")
            if repeat:
                seconds[name].append(taken)
    print(f"{options.rows} x {options.length} tokens, {options.dtype}, {options.repeats} repeats, one thread")
    print(f"{'row':<10} {'mean depth':>10} {'median s':>9} {'ratio to full':>14} {'min':>6} {'max':>6} {'floor':>6}")
    table = []
    for name, _, mean in rows:
        ratios = [a / b for a, b in zip(seconds[name], seconds["depth 1"], strict=True)]
        batch = batches[mean]
        depth = float(batch.exit_depths[batch.counts].float().mean()) / dims.num_layers
        row = {
            "row": name,
            "mean_depth": depth,
            "median_s": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
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
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = groups.initialise(Degrees())
    if options.memory:
        found = scoring_memory(device)
    else:
        found = (checkpoint_waits if options.checkpoint else step_times)(options, device)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=str))
    groups.finish()


if __name__ == "__main__":
    main()
