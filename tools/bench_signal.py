"""Signal to noise of the gates' gradient in one RL step, by length of the answers and by objective.

    python tools/bench_signal.py --json signal.json
    python tools/bench_signal.py --lengths 2000 --repeats 32 --objectives answer,exit
    python tools/bench_signal.py --model models/SmolLM2-135M-Instruct --exits 10,15,20,25 --repeats 6

Rollouts are the engine's own under sampled exits, never ended before the length that is asked for; the learner scores
and differentiates them as training does, for every objective on the same rollouts. A step is learned from --repeats
times, each time with other rollouts of the same policy, gates half open. With g the gradient of all gates' weights,
signal is the length of its mean and noise the root mean square of what is left:

    signal² = mean over pairs r ≠ s of g_r · g_s (unbiased),   noise² = mean |g_r|² - signal²

with 95% intervals by a bootstrap over repeats (5,000 resamples; pairs of a repeat with itself left out). Half of the
answers are right, by a hash of their tokens: a verdict on a whole answer says next to nothing of one of its exits.
A shape without weights (--model configs/ladder/300k) gets random ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from ee_megatron.config.derive import scoring
from ee_megatron.config.load import load
from ee_megatron.config.schema import DeepspeedConfig, DepthPenalty, ExitCredit, KLPenalty, ParallelConfig, RLConfig
from ee_megatron.exit_rules import Sample
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.batch import ReplayBatch
from ee_megatron.learner.learner import Learner, Scores
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.parallel import groups as rank_groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, initial_policy
from ee_megatron.rollout import Decoder
from ee_megatron.rollout.engine.generation import generate
from ee_megatron.rollout.engine.request import GenerationRequest
from ee_megatron.rollout.engine.sampling import SamplingParams
from ee_megatron.training.experience import credit, objective_of, replay
from ee_megatron.training.scratch import draw_model
from ee_megatron.types import Group, Prompt, Rollout

OPENNESS = -1.0
"""Logit of all gates: hazards of .27, so that every exit is taken."""

BASE = RLConfig(depth_penalty=DepthPenalty(weight=1.0), kl_penalty=KLPenalty(weight=0.05, kind="reward"))
OBJECTIVES = {
    "answer": BASE,
    "token": replace(BASE, exit_credit=None, depth_penalty=replace(BASE.depth_penalty, credit="token")),
    "exit_price": replace(
        BASE,
        exit_credit=ExitCredit(task_weight=0.0, kl_weight=0.0),
        depth_penalty=replace(BASE.depth_penalty, penalize="right"),
    ),
    "exit_price_divergence": replace(
        BASE,
        exit_credit=ExitCredit(task_weight=0.0),
        depth_penalty=replace(BASE.depth_penalty, penalize="right"),
        kl_penalty=replace(BASE.kl_penalty, kind="exact", weight=1.0),
    ),
    "exit": replace(
        BASE,
        exit_credit=ExitCredit(),
        depth_penalty=replace(BASE.depth_penalty, penalize="right"),
        kl_penalty=replace(BASE.kl_penalty, kind="exact", weight=1.0),
    ),
}
"""The paper's first: all others are compared with it."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rank_groups.initialise(Degrees())
    step = f"{options.prompts} x {options.samples} answers a step"
    print(f"{options.model}, exits {options.exits}, {step}, {options.repeats} repeats")
    print(f"{'tokens':>7} {'objective':<28} {'signal / noise':>15} {'95% interval':>20} {'against answer':>15}")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for length, rows in measure(options, Path(scratch)):
            found[length] = rows
            show(length, rows)
    rank_groups.finish()
    if options.json:
        settings = vars(options) | {"objectives": list(options.objectives)}
        options.json.write_text(json.dumps({"settings": settings, "found": found}, default=str, indent=1))


def show(length: str, rows: dict[str, Any]) -> None:
    first = next(iter(rows.values()))
    for name, row in rows.items():
        low, high = row["interval"]
        # Against what the interval still allows the first objective to have.
        least = f">= {low / first['interval'][1]:.1f}" if row is not first else ""
        print(f"{length:>7} {name:<28} {row['ratio']:>15.3f} [{low:>8.3f}, {high:>8.3f}] {least:>15}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("configs/ladder/300k"))
    parser.add_argument("--exits", default="2,4,6", help="depths, comma-separated")
    parser.add_argument("--lengths", default="20,200,2000")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--objectives", type=objectives, default=",".join(OBJECTIVES), help="some of %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def objectives(text: str) -> dict[str, RLConfig]:
    """Of "answer,exit"; the first of all is always among them."""
    unknown = set(text.split(",")) - set(OBJECTIVES)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(OBJECTIVES)}")
    first = next(iter(OBJECTIVES))
    return {name: rl for name, rl in OBJECTIVES.items() if name in (first, *text.split(","))}


def measure(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Length, and what was found of every objective at it."""
    path = options.model
    if not any(path.glob("model*.safetensors")):
        path = with_random_weights(path, scratch, longest=max(map(int, options.lengths.split(","))))
    source = HFDirectory(path)
    spec = PolicySpec(source.dims.num_layers, tuple(map(int, options.exits.split(","))), rank=8, alpha=16.0)
    policy = initial_policy(source.dims, spec, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    for name, tensor in policy.items():
        if name.endswith("fc2.bias"):
            tensor.fill_(OPENNESS)
        elif name.endswith("lora_B.weight"):
            # As after some training: the policy is no longer its reference, and its readouts differ by exit.
            tensor.normal_(0, 0.02, generator=generator)
    decoder = Decoder.from_hf(path, spec, torch.float32, "cpu")
    # No token ends an answer.
    decoder.eos_ids = frozenset({-1})
    decoder.load_policy(policy)
    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    learner = Learner(source, spec, policy, ParallelConfig(), DeepspeedConfig(), device=torch.device("cpu"))
    for length in map(int, options.lengths.split(",")):
        gradients: dict[str, list[torch.Tensor]] = {name: [] for name in options.objectives}
        for repeat in range(options.repeats):
            groups = rollouts(options, decoder, tokenizer, length, repeat)
            batch = replay(groups, spec.num_layers)
            # All that any objective asks for.
            first = learner.score(batch, teacher=Teacher.REFERENCE, hazards=True)
            reference = learner.score(batch, reference=True).token_logprobs
            for name, settings in options.objectives.items():
                rl = replace(settings, group_size=options.samples)
                known = reference if scoring(rl).reference else None
                gradients[name].append(gradient(learner, batch, groups, first, known, rl, length))
        yield str(length), {name: ratio(torch.stack(each)) for name, each in gradients.items()}


def with_random_weights(shape: Path, scratch: Path, longest: int) -> Path:
    """A model of this shape that has positions for answers of `longest` tokens."""
    config = json.loads((shape / "config.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], longest + 100)
    (scratch / "shape").mkdir()
    (scratch / "shape" / "config.json").write_text(json.dumps(config))
    return draw_model(load(["experiment=ladder", f"model.path={scratch / 'shape'}"]), scratch / "model")


def rollouts(options: argparse.Namespace, decoder: Decoder, tokenizer: Any, length: int, repeat: int) -> list[Group]:
    prompts = [
        Prompt(f"p{i}", f"Question: What is {7 + i} plus {11 * i}?\nAnswer:", "", "") for i in range(options.prompts)
    ]
    request = GenerationRequest(
        prompts, options.samples, SamplingParams(max_new_tokens=length), Sample(), options.seed + 1000 * repeat
    )
    answers = generate(decoder, tokenizer, request, 1, rows=options.prompts * options.samples)
    made = []
    for prompt, group in zip(prompts, answers, strict=True):
        correct = np.array([verdict(answer) for answer in group])
        made.append(Group(prompt, group, correct.astype(np.float32), correct, correct))
    return made


def verdict(answer: Rollout) -> bool:
    return bool(np.random.default_rng(answer.tokens.astype(np.uint32)).random() < 0.5)


def gradient(
    learner: Learner,
    batch: ReplayBatch,
    groups: list[Group],
    first: Scores,
    reference: torch.Tensor | None,
    rl: RLConfig,
    length: int,
) -> torch.Tensor:
    """Of the gates' weights, as one vector."""
    layout = learner.spec.layout
    experience, _ = credit(batch, groups, first, reference, rl, layout, price=rl.depth_penalty.weight, longest=length)
    objective = objective_of(rl, length)
    weights, _ = objective.weights(batch, experience, first.token_logprobs, first.exit_logprobs)
    sums: dict[int, torch.Tensor] = {}

    def add(place: int, part: torch.Tensor) -> None:
        sums[place] = sums[place] + part if place in sums else part.clone()

    gates = [piece.parameter for piece in learner.pieces if piece.entry.parameter.startswith("gates.")]
    hooks = [gate.register_hook(lambda part, place=i: add(place, part)) for i, gate in enumerate(gates)]
    learner.step(batch, weights, objective.kl.teacher, adapter_lr=0.0, gate_lr=0.0)
    for hook in hooks:
        hook.remove()
    return torch.cat([sums[i].flatten() for i in range(len(gates))])


def ratio(gradients: torch.Tensor) -> dict[str, Any]:
    """Signal over noise [R, P] -> its value and interval."""
    products = (gradients @ gradients.T).double().numpy()

    def of(rows: np.ndarray) -> float:
        apart = rows[:, None] != rows[None, :]
        part = products[np.ix_(rows, rows)]
        signal, power = part[apart].mean(), products[rows, rows].mean()
        return float(np.sqrt(max(signal, 0.0) / (power - signal))) if power > signal else np.inf

    draw = np.random.default_rng(0)
    count = len(products)
    resampled = [draw.integers(0, count, count) for _ in range(5000)]
    values = [of(rows) for rows in resampled if len(set(rows.tolist())) > 1]
    low, high = np.quantile(values, [0.025, 0.975])
    return {"ratio": of(np.arange(count)), "interval": [float(low), float(high)], "repeats": count}


if __name__ == "__main__":
    main()
