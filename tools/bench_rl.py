"""One whole RL step (rollouts, scoring, update) against TRL's GRPO trainer: the same model, prompts and lengths.

    pip install -e '.[bench]'; python tools/bench_rl.py --model models/SmolLM2-135M-Instruct --repeats 5

8 prompts x 4 answers of exactly 32 tokens at temperature 1, full depth, LoRA on all linear layers, KL to the base
model, one update, float32. Each side is a process of its own that holds its model; they take turns, step by step, so
that a drift of the machine's speed touches both. Prints tokens per second, this project's phases and the peak resident
memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from workloads import interleaved, ratio, save, spread

PROMPTS, SAMPLES, LENGTH, RANK, BETA = 8, 4, 32, 32, 0.05


def prompt_texts(count: int) -> list[str]:
    """Few-shot arithmetic as in the demo, about 60 tokens each."""
    shots = "".join(f"Question: What is {a} times {a + 3}?\nAnswer: {a} x {a + 3} = {a * (a + 3)}.\n" for a in (2, 4))
    return [f"{shots}Question: What is {a} times {a + 1}?\nAnswer:" for a in range(2, 2 + count)]


def reward(text: str) -> float:
    return sum(c.isdigit() for c in text) / max(1, len(text))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(step: Any) -> None:
    """Answer every line on stdin with one JSON line: a step's phases and seconds."""
    for _ in sys.stdin:
        begun = time.perf_counter()
        phases = step()
        print(json.dumps({"seconds": time.perf_counter() - begun, "peak_mib": peak_mib(), **phases}), flush=True)


def ours(options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from ee_megatron.config.schema import DeepspeedConfig, DepthPenalty, KLPenalty, Loss, ParallelConfig, RLConfig
    from ee_megatron.exit_rules import Off
    from ee_megatron.families.hf_directory import HFDirectory
    from ee_megatron.learner.learner import Learner
    from ee_megatron.parallel import groups
    from ee_megatron.parallel.groups import Degrees
    from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
    from ee_megatron.rollout.engine.request import GenerationRequest
    from ee_megatron.rollout.engine.sampling import SamplingParams
    from ee_megatron.rollout.pool.local import LocalPool
    from ee_megatron.training.advantages import StepScores, collate, compute_advantages
    from ee_megatron.training.update import objective_of
    from ee_megatron.types import Group, Prompt

    torch.set_num_threads(options.threads)
    source = HFDirectory(options.model)
    dims = source.dims
    spec = PolicySpec(dims.num_layers, tuple(range(5, dims.num_layers, 5)), rank=RANK, alpha=float(RANK))
    device = groups.initialise(Degrees())
    policy = initial_policy(dims, spec, 0)
    learner = Learner(source, spec, policy, ParallelConfig(), DeepspeedConfig(), device=device)
    pool = LocalPool(options.model, spec, rows=PROMPTS * SAMPLES)
    pool.decoder.eos_ids = frozenset()
    prompts = [Prompt(str(i), text, "", "bench") for i, text in enumerate(prompt_texts(PROMPTS))]
    rl = RLConfig(
        group_size=SAMPLES,
        kl_penalty=KLPenalty(weight=BETA),
        depth_penalty=DepthPenalty(weight=0.0),
        loss=Loss(advantage="grpo"),
    )
    objective = objective_of(rl, LENGTH)
    versions = iter(range(1, 10**6))

    def step() -> dict[str, float]:
        clock, version = [time.perf_counter()], next(versions)
        pool.load(WeightSet(version, learner.export_policy()))
        clock.append(time.perf_counter())
        answers = pool.generate(GenerationRequest(prompts, SAMPLES, SamplingParams(1.0, LENGTH), Off(), version))
        found = []
        for prompt, group in zip(prompts, answers, strict=True):
            task = np.array([reward(r.text) for r in group], dtype=np.float32)
            found.append(Group(prompt, group, task, task > 0, task > 0))
        clock.append(time.perf_counter())
        batch = collate(found, dims.num_layers)
        first = learner.score(batch)
        reference = learner.score(batch, reference=True).token_logprobs
        experience = compute_advantages(
            batch, found, StepScores(first, reference), rl, spec.layout, lambda_depth=0.0
        ).experience
        weights, _ = objective.weights(batch, experience, first.token_logprobs, first.exit_logprobs)
        clock.append(time.perf_counter())
        learner.step(batch, weights, objective.kl.teacher, adapter_lr=1e-5, gate_lr=1e-5)
        clock.append(time.perf_counter())
        names = ("weights", "rollouts", "scoring", "update")
        phases = dict(zip(names, np.diff(clock).tolist(), strict=True))
        return {"tokens": float(sum(r.length for g in answers for r in g)), **phases}

    serve(step)


def trl(options: argparse.Namespace) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        """Steps begin when asked for; the asking thread hears of their end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.release()

    lengths: list[int] = []

    def score(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths[:] = [len(ids) for ids in completion_ids]
        return [reward(text) for text in completions]

    config = GRPOConfig(
        output_dir=options.scratch, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES,
        max_completion_length=LENGTH, generation_kwargs={"min_new_tokens": LENGTH}, temperature=1.0, top_k=0,
        beta=BETA, learning_rate=1e-5, max_steps=10**6, gradient_checkpointing=False, bf16=False, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = GRPOTrainer(
        model=model, reward_funcs=score, args=config, callbacks=[Turns()],
        train_dataset=Dataset.from_dict({"prompt": prompt_texts(PROMPTS) * 64}),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=linears),
    )  # fmt: skip
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> dict[str, float]:
        go.release()
        done.acquire()
        return {"tokens": float(sum(lengths))}

    serve(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        {"ours": ours, "trl": trl}[options.side](options)
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    scratch = tempfile.mkdtemp()
    command = [sys.executable, __file__, "--model", str(options.model), "--scratch", scratch]
    command += ["--threads", str(options.threads), "--side"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    sides = {side: subprocess.Popen([*command, side], text=True, **pipes) for side in ("ours", "trl")}
    try:
        cases = {side: partial(ask, side, process) for side, process in sides.items()}
        seen = interleaved(cases, options.repeats, warm_up=2)
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    report(options, seen)


def ask(side: str, process: subprocess.Popen) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    # Libraries print to stdout too; the answer is the line that is JSON.
    for line in process.stdout:
        if line.startswith("{") and '"seconds"' in line:
            return json.loads(line)
    raise RuntimeError(f"{side}: the process ended; run it with --side {side} to see why")


def report(options: argparse.Namespace, seen: dict[str, list[dict[str, float]]]) -> None:
    speeds = {side: [step["tokens"] / step["seconds"] for step in steps] for side, steps in seen.items()}
    table, times = {}, ratio(speeds["ours"], speeds["trl"])
    print(f"{PROMPTS} x {SAMPLES} answers of {LENGTH} tokens, float32, {options.threads} threads, "
          f"{options.repeats} repeats")  # fmt: skip
    for side, steps in seen.items():
        table[side] = {key: spread([step[key] for step in steps])[0] for key in steps[0]}
        phases = "  ".join(f"{key} {value:.2f}" for key, value in table[side].items())
        print(f"{side:<5} {spread(speeds[side])[0]:8.1f} tokens/s  {phases}")
    print("ratio {:.2f} [{:.2f}, {:.2f}]".format(*times))
    save(options.json, {"sides": table, "ratio": times})


if __name__ == "__main__":
    main()
