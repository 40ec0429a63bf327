"""The learner on long answers of very different lengths: what padding costs, against another commit's learner.

    git worktree add ../before 31f64db
    python tools/bench_length.py --before ../before --json length.json

Per model (SmolLM2-135M, and a Qwen2-shaped one with random weights) and per distribution of lengths (lognormal: mean
600 and at most 900 tokens; mean 2,000 and at most 4,096): scoring under the prescribed exits, and a training step.
Each commit runs in a process of its own, one at a time, in turn, so that a drift of the machine's speed touches both
alike; ratios are taken within a repeat. One thread, CPU seconds. Prints a table and, with --json, writes the figures.

slots: what was computed over what was there. floor: FLOPs of exactly the positions, exits and attended keys that there
are; of floor: the ratio of this commit's seconds between the two distributions, over that of their floors. MiB: peak
resident memory above what was resident before the first pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from workloads import exits_with_mean, make_weights, spread

from ee_megatron.config.schema import DeepspeedConfig, ParallelConfig
from ee_megatron.families import ModelDims
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.learner.learner import Learner
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, initial_policy

PROMPT, DEPTH = 60, 0.65
# Mean, cap, tokens of a micro-batch; the padded learner's micro-batch holds as many tokens of mean length.
LENGTHS = {"600": (600, 900, 2048), "2000": (2000, 4096, 4224)}


def answer_lengths(mean: int, cap: int, count: int, seed: int) -> np.ndarray:
    """Lognormal with sigma .8 before the cap, the mean of what is drawn set to `mean` by its median."""
    normal = np.random.default_rng(seed).standard_normal(count)
    low, high = 1.0, float(cap) * 4
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        drawn = np.clip(middle * np.exp(0.8 * normal), 1, cap)
        low, high = (middle, high) if drawn.mean() < mean else (low, middle)
    return np.clip(low * np.exp(0.8 * normal), 1, cap).astype(int)


def make_batch(spec: PolicySpec, vocab: int, name: str, groups_: int, group: int) -> ReplayBatch:
    mean, cap, _ = LENGTHS[name]
    generator = np.random.default_rng(7)
    lengths = answer_lengths(mean, cap, groups_ * group, seed=3)
    prompts = [generator.integers(0, vocab, PROMPT) for _ in range(groups_)]
    answers = [generator.integers(0, vocab, n) for n in lengths]
    depths = []
    for i, n in enumerate(lengths):
        drawn = exits_with_mean(spec.layout.outcomes, DEPTH * spec.num_layers, int(n), seed=i)
        depths.append(np.concatenate([[spec.num_layers], drawn[1:]]).astype(np.int32))
    return pack([prompts[i // group] for i in range(len(answers))], answers, depths, spec.num_layers)


def floor_flops(dims: ModelDims, batch: ReplayBatch) -> float:
    """Multiply-adds x 2 of a forward pass over every sequence's own positions (a shared prompt once a group is not
    counted for): linear layers at the prescribed depths, keys and values of every layer, keys that are seen, the head
    where a token counts."""
    linear = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    kv = 2 * dims.kv_size * dims.hidden
    depths = batch.exit_depths.double()
    positions = (batch.exit_depths > 0).double()
    seen = torch.arange(1, depths.size(1) + 1).double()
    flops = dims.num_layers * kv * positions.sum() + (linear - kv) * depths.sum()
    flops += 2 * dims.heads * dims.head_dim * (depths * seen).sum() + dims.vocab * dims.hidden * batch.counts.sum()
    return 2 * float(flops)


def serve(model: Path, groups_: int, group: int) -> None:
    """Answer lines "NAME score|step" with a JSON line each."""
    torch.set_num_threads(1)
    device = groups.initialise(Degrees())
    source = HFDirectory(model)
    spec = PolicySpec(source.dims.num_layers, tuple(range(5, source.dims.num_layers, 5)))
    learners: dict[str, Learner] = {}
    packing = any(field.name == "tokens_per_micro_batch" for field in fields(ParallelConfig))
    for name, (mean, _, tokens) in LENGTHS.items():
        rows = max(1, tokens // (mean + PROMPT))
        parallel = ParallelConfig(recompute=True)
        setattr(parallel, *(("tokens_per_micro_batch", tokens) if packing else ("micro_batch_size", rows)))
        learners[name] = Learner(
            HFDirectory(model), spec, initial_policy(source.dims, spec, 0), parallel, DeepspeedConfig(), device=device
        )
    batches = {name: make_batch(spec, source.dims.vocab, name, groups_, group) for name in LENGTHS}
    print("ready", flush=True)
    for line in sys.stdin:
        name, what = line.split()
        learner, batch = learners[name], batches[name]
        Path("/proc/self/clear_refs").write_text("5")
        before, begun = resident("VmRSS"), time.process_time()
        if what == "score":
            scores = learner.score(batch)
        else:
            scores = learner.step(batch, make_weights(batch), adapter_lr=0.0, gate_lr=0.0).scores
        found: dict[str, Any] = {"seconds": time.process_time() - begun, "mib": resident("VmHWM") - before}
        found["check"] = float(scores.token_logprobs.double().sum())
        positions = int((batch.exit_depths > 0).sum())
        if packing:
            packed = learner.pack(batch).stats
            found |= {"slots": packed.slots / packed.positions, "positions": packed.positions / positions}
            found["largest"] = packed.largest * packed.micro_batches / packed.positions
        else:
            found["slots"] = batch.tokens.numel() / positions
            rows = learner.micro_batch_size  # type: ignore[attr-defined]
            sums = torch.stack([(part > 0).sum() for part in batch.exit_depths.split(rows)]).double()
            found["largest"] = float(sums.max() / sums.mean())
        print(json.dumps(found), flush=True)
    groups.finish()


def resident(field: str) -> float:
    """A field of /proc/self/status, MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def ask(process: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert process.stdin and process.stdout
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def qwen2_shaped(folder: Path) -> Path:
    """A small model of Qwen2's proportions: many query heads to a key-value head, a large vocabulary, untied."""
    config = Qwen2Config(
        vocab_size=32_000, hidden_size=448, intermediate_size=1216, num_hidden_layers=14, num_attention_heads=7,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def compare(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    here = Path(__file__).resolve().parent.parent
    roots = {"this": here} | ({"before": options.before.resolve()} if options.before else {})
    processes = {}
    for name, root in roots.items():
        environment = {**os.environ, "PYTHONPATH": f"{root}:{here / 'tools'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(model.resolve())]
        command += ["--prompts", str(options.prompts), "--group", str(options.group)]
        processes[name] = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    for process in processes.values():
        assert process.stdout
        while (line := process.stdout.readline()).strip() != "ready":
            if not line:
                raise RuntimeError(f"{process.args}: ended with {process.wait()}")
    found: dict[str, Any] = {}
    for length in LENGTHS:
        for what in ("score", "step"):
            runs: dict[str, list[dict]] = {name: [] for name in processes}
            for _ in range(options.repeats):
                for name, process in processes.items():
                    runs[name].append(ask(process, f"{length} {what}"))
            found[f"{length} {what}"] = runs
    for process in processes.values():
        assert process.stdin
        process.stdin.close()
        process.wait(60)
    source = HFDirectory(model)
    spec = PolicySpec(source.dims.num_layers, tuple(range(5, source.dims.num_layers, 5)))
    batches = {n: make_batch(spec, source.dims.vocab, n, options.prompts, options.group) for n in LENGTHS}
    floors = {name: floor_flops(source.dims, batch) for name, batch in batches.items()}
    return {"runs": found, "floors": floors}


def report(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}")
    print(f"{'':<12} {'seconds':>8} {'slots':>6} {'largest':>8} {'MiB':>6}   times as fast as before (least, most)")
    for what, runs in found["runs"].items():
        for which, results in runs.items():
            seconds = spread([r["seconds"] for r in results])[0]
            line = f"{what:<12} {seconds:>8.1f} {results[-1]['slots']:>6.2f} {results[-1]['largest']:>8.2f}"
            line += f" {max(r['mib'] for r in results):>6.0f}   {which}"
            if which == "this" and "before" in runs:
                pairs = zip(runs["before"], results, strict=True)
                ratios = spread([before["seconds"] / now["seconds"] for before, now in pairs])
                line += " {:.2f} ({:.2f}, {:.2f})".format(*ratios)
                assert abs(results[0]["check"] / runs["before"][0]["check"] - 1) < 1e-5, "the commits disagree"
            print(line)
    first, last = LENGTHS
    for what in ("score", "step"):
        times = [spread([r["seconds"] for r in found["runs"][f"{at} {what}"]["this"]])[0] for at in (first, last)]
        floor = found["floors"][last] / found["floors"][first]
        print(
            f"{what}: {last} over {first} takes {times[1] / times[0]:.2f}, of floor {times[1] / times[0] / floor:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--only", choices=("model", "qwen2"), help="one of the two models alone")
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.prompts, options.group)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"model": options.model, "qwen2": None}
        for name in [options.only] if options.only else models:
            found[name] = compare(models[name] or qwen2_shaped(Path(folder) / "qwen2"), options)
            report(name, found[name])
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options), **found}, indent=1, default=str))


if __name__ == "__main__":
    main()
