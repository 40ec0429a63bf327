"""What speculation saves: tokens a second by draft depth and concurrent answers, against full depth and the model's own
exits, interleaved; of an export in transformers, prompt lookup beside it.

    python tools/bench_speculation.py --model runs/demo_cpu --depths 10 19 --csv speculation.csv
    python tools/bench_speculation.py --model runs/demo_cpu --at 1 --prompts questions.txt --tokens 200
    python tools/bench_speculation.py --model runs/demo_cpu --export exported --problems 20

Answers are greedy (or of `--temperature`) to the task's test prompts, or to the lines of a file. The tool fails if a
case other than the model's own exits makes other tokens than full depth (of an export it says how many do). `ceiling`
counts the weights that are read: of full depth over that of drafts and checks, for one answer at a time. Ratios are
taken within a repeat, median and least to most over repeats.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM
from workloads import answer_all, interleaved, ratio, spread

from ee_megatron.config.schema import RunConfig
from ee_megatron.exit_rules import ExitRule, Off, Speculate
from ee_megatron.inference.model import EarlyExitModel
from ee_megatron.rollout import Request, SamplingParams
from ee_megatron.rollout.engine.prompts import encode_text
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.tasks import make_task


def prompts_of(model: EarlyExitModel, file: Path | None, count: int) -> list[list[int]]:
    """Token ids of a file's lines, or of the test prompts of the run's task."""
    if file is None:
        settings = model.settings
        if not isinstance(settings, RunConfig):
            raise SystemExit("the model has no task of its own; give --prompts FILE")
        texts = [prompt.text for prompt in make_task(settings.task).prompts("evaluation")]
    else:
        texts = file.read_text().splitlines()
    return [encode_text(model.tokenizer, text) for text in texts[:count]]


def run(
    model: EarlyExitModel, prompts: list[list[int]], rule: ExitRule, at_once: int, sampling: SamplingParams
) -> tuple[float, Scheduler]:
    """Seconds, and the engine with its finished answers."""
    begun = time.perf_counter()
    requests = (Request(prompt, sampling, rule, prompt_id=str(i)) for i, prompt in enumerate(prompts))
    scheduler = answer_all(model.decoder, model.tokenizer, requests, at_once)
    return time.perf_counter() - begun, scheduler


def tokens(scheduler: Scheduler) -> list[list[int]]:
    return [row.tokens for _, row in sorted(scheduler.finished_rows.items())]


def run_export(model: Any, prompts: list[list[int]], count: int, ends: list[int], **options: Any) -> tuple[float, list]:
    """Seconds, and the greedy tokens of transformers' `generate`, one prompt at a time."""
    begun, answers = time.perf_counter(), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=ends,
            pad_token_id=0, **options,
        )  # fmt: skip
        answers.append(made[0, len(prompt) :].tolist())
    return time.perf_counter() - begun, answers


def bench_export(folder: Path, prompts: list[list[int]], ends: list[int], options: argparse.Namespace) -> pd.DataFrame:
    """An export's modes, all with full depth's tokens but for its own exits."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()
    cases: dict[str, dict[str, Any]] = {"full depth": {"exit_policy": "off"}, "own exits": {}}
    cases |= {f"speculate:{d}": {"exit_policy": f"speculate:{d}"} for d in options.depths or model.config.exit_depths}
    cases["prompt lookup"] = {"exit_policy": "off", "prompt_lookup_num_tokens": 4}
    runs = {name: partial(run_export, model, prompts, options.tokens, ends, **more) for name, more in cases.items()}
    results = interleaved(runs, options.repeats, warm_up=1)
    full = results["full depth"][0][1]
    per_token = {name: [took / sum(map(len, made)) for took, made in part] for name, part in results.items()}
    table = []
    for name, part in results.items():
        speed = dict(zip(("speed-up", "least", "most"), ratio(per_token["full depth"], per_token[name]), strict=True))
        equal = sum(a == b for a, b in zip(full, part[0][1], strict=True)) / len(full)
        table.append({"export": name, "tokens/s": 1 / spread(per_token[name])[0], **speed, "equal": equal})
    return pd.DataFrame(table)


def ceiling(model: EarlyExitModel, scheduler: Scheduler, made: int) -> float:
    """Full depth's reads of weights over those of speculation, one answer at a time, drafts' readouts left out."""
    dims, spec = model.decoder.dims, scheduler.speculation
    layer = dims.hidden * (2 * dims.q_size + 2 * dims.kv_size + 3 * dims.intermediate)
    head, bounds = dims.hidden * dims.vocab, (0, *model.decoder.layout.outcomes)
    layers = sum(reads * (bounds[i + 1] - bounds[i]) for i, reads in enumerate(spec.reads))
    return made * (dims.num_layers * layer + head) / (layers * layer + spec.passes * head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="what ee-megatron generate --model takes")
    parser.add_argument("--prompts", type=Path, help="a file, one prompt per line; default: the task's test problems")
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--depths", type=int, nargs="+", help="draft depths; default: every exit")
    parser.add_argument("--at", type=int, nargs="+", default=[1, 4, 8], help="concurrent answers")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--export", type=Path, help="measure this export of the model in transformers instead")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    model = EarlyExitModel.load(options.model, dtype=options.dtype, threads=options.threads)
    prompts = prompts_of(model, options.prompts, options.problems)
    if options.export:
        # Transformers' batches round otherwise than its single positions, so equality is a column there, not a demand.
        ends = [*model.decoder.eos_ids, *model.tokenizer.encode("\n")]
        frame = bench_export(options.export, prompts, ends, options)
        print(frame.round(3).to_string(index=False))
        if options.csv:
            frame.round(4).to_csv(options.csv, index=False)
        return
    sampling = SamplingParams(options.temperature, options.tokens, stop=("\n",))
    depths = options.depths or list(model.exit_depths)
    rules = {"full depth": Off(), "own exits": model.default_exits} | {f"{d}": Speculate(d) for d in depths}
    table = []
    for at_once in options.at:
        cases = {name: partial(run, model, prompts, rule, at_once, sampling) for name, rule in rules.items()}
        results = interleaved(cases, options.repeats, warm_up=1)
        seconds = {name: [took for took, _ in runs] for name, runs in results.items()}
        full = tokens(results["full depth"][0][1])
        made = sum(map(len, full)) - len(full)
        for name, rule in rules.items():
            scheduler = results[name][0][1]
            own = tokens(scheduler)
            row = {"dtype": options.dtype, "at once": at_once, "draft depth": name}
            row["tokens/s"] = sum(map(len, own)) / spread(seconds[name])[0]
            per_token = [
                [took / sum(map(len, lengths)) for took in times]
                for times, lengths in ((seconds["full depth"], full), (seconds[name], own))
            ]
            row |= dict(zip(("speed-up", "least", "most"), ratio(*per_token), strict=True))
            if isinstance(rule, Speculate):
                spec = scheduler.speculation
                row["tokens/pass"] = made / max(1, spec.passes)
                row["accepted"] = spec.accepted / max(1, spec.drafted)
                row["ceiling"] = ceiling(model, scheduler, made) if at_once == 1 else float("nan")
                row["equal"] = sum(a == b for a, b in zip(full, own, strict=True)) / len(full)
            table.append(row)
            print(pd.DataFrame([row]).round(3).to_string(index=False), flush=True)
    frame = pd.DataFrame(table)
    if (frame["equal"] < 1).any():
        raise SystemExit("speculation changed answers: the column `equal` above says where")
    print(f"\n{frame.round(3).to_string(index=False)}")
    if options.csv:
        frame.round(4).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
