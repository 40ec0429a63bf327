"""What runs on the pretend GPU: every path of rollout and learner, on the CPU and on the device, in one process.

A path takes a `Bench` and returns what it computed as values of the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from device_setup import (
    FULL,
    LORA,
    OBJECTIVES,
    RULES,
    SAMPLINGS,
    SINGLE,
    answer,
    device_of,
    make_decoder,
    make_learner,
    make_lesson,
    on,
    score_lesson,
    score_reference,
    start,
    update,
)
from torch import Tensor
from transformers import AutoTokenizer

from ee_megatron.learner.learner import Learner
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, load_policy, save_policy
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.sampling import truncate
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.engine.scoring import inspect, score, trace
from ee_megatron.types import Prompt, Rollout

TEXTS = ("Q: 1 + 1 =", "abc", "Q: 1 + 2 =", "a longer prompt than the others have")
PROMPTS = [Prompt(f"p{i}", text, "", "none") for i, text in enumerate(TEXTS)]
# A beginning in common, long enough to be read apart.
SHARED = [Prompt(f"p{i}", "Add these numbers: " + text, "", "none") for i, text in enumerate(TEXTS)]


@dataclass
class Bench:
    """Where a path runs: "cpu" or "gpu", on the model in `path`, cut over as many ranks as `degrees` has."""

    kind: str
    path: Path
    degrees: Degrees = SINGLE

    @property
    def device(self) -> torch.device:
        return device_of(self.kind)

    def decoder(self, spec: PolicySpec = LORA, dtype: torch.dtype = torch.float32) -> Decoder:
        return make_decoder(self.path, self.device, spec, dtype)

    def learner(self, spec: PolicySpec = LORA, **options: Any) -> Learner:
        return make_learner(self.path, self.device, spec, self.degrees, **options)

    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.path)


# ---- rollouts ----


def answers(
    bench: Bench, rule: str = "sample", sampling: str = "whole", prompts: Sequence[Prompt] = PROMPTS
) -> list[list[Rollout]]:
    return answer(bench.decoder(), bench.tokenizer(), prompts, rule, sampling, samples=2)


def rollouts(bench: Bench) -> list[Rollout]:
    """The same on every device: answers of the CPU, with exits of every depth."""
    return [rollout for group in answers(Bench("cpu", bench.path)) for rollout in group]


def mixed(bench: Bench) -> list[Rollout]:
    """Every rule and every sampling in flight together, with prefills and text stops."""
    scheduler = Scheduler(bench.decoder(), bench.tokenizer(), in_flight=7, batch=5)
    cases = [(r, s) for r in RULES for s in SAMPLINGS]
    ids = [
        scheduler.add(
            Request(TEXTS[i % 4], SAMPLINGS[s], RULES[r], 0, f"p{i % 4}", i % 2, prefill=[5, 6] if i % 5 == 0 else ())
        )
        for i, (r, s) in enumerate(cases)
    ]
    while scheduler.busy:
        scheduler.advance()
    return [scheduler.take(i, 0) for i in ids]


def nucleus_of_a_flat_distribution(bench: Bench) -> Tensor:
    """Some rows need the whole vocabulary sorted, some don't."""
    logits = torch.randn(6, 130, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 8.0] * 3)[:, None]
    return truncate(logits.to(bench.device), 0, 0.7, candidates=16).cpu()


def scored(bench: Bench, spec: PolicySpec = LORA, dtype: torch.dtype = torch.float32) -> list:
    return score(bench.decoder(spec, dtype), start(bench.path, spec), rollouts(bench))


def inspected(bench: Bench) -> list:
    return inspect(bench.decoder(), start(bench.path, LORA), rollouts(bench), streams=True)


def traced(bench: Bench) -> list:
    decoder = bench.decoder()
    decoder.load_policy(None)
    return trace(decoder, rollouts(bench), top_k=5)


def loaded(bench: Bench, spec: PolicySpec = LORA) -> list[list[Rollout]]:
    """Policies at once, in chunks and none, one after another; tensors come from the host and from the device."""
    decoder, found, tokenizer = bench.decoder(spec), [], bench.tokenizer()
    for seed in (1, 2):
        policy = start(bench.path, spec, seed)
        with tempfile.TemporaryDirectory() as folder:
            save_policy(Path(folder), spec, {name: tensor.to(bench.device) for name, tensor in policy.items()})
            policy = load_policy(folder)[1]
        for name, tensor in policy.items():
            decoder.load_chunk({name: tensor if seed == 1 else tensor.to(bench.device)})
        decoder.finish_load()
        found += answer(decoder, tokenizer, PROMPTS, version=seed)
    decoder.load_policy(None)
    return found + answer(decoder, tokenizer, PROMPTS, "off", version=3)


# ---- the learner ----


def learner_scores(bench: Bench, spec: PolicySpec = LORA, objective: str = "likelihood") -> list:
    learner, lesson = bench.learner(spec), make_lesson(objective)
    return [
        score_lesson(learner, lesson),
        score_lesson(learner, lesson, hazards=True),
        score_reference(learner, lesson),
    ]


def learned(bench: Bench, spec: PolicySpec = LORA, objective: str = "likelihood", **options: Any) -> list:
    """Two updates: what they saw, and the policy after them."""
    learner, lesson = bench.learner(spec, **options), make_lesson(objective)
    return [update(learner, lesson) for _ in range(2)] + [learner.export_policy()]


def resumed(bench: Bench, spec: PolicySpec = LORA, **options: Any) -> list:
    """Two updates, everything written down, a new learner from that, two more updates."""
    learner = bench.learner(spec, **options)
    seen = [update(learner, make_lesson(seed=i)) for i in range(2)]
    written = [learner.export_policy(), learner.export_optimizer()]
    # Ranks read what the leader was sent.
    dist.broadcast_object_list(written)
    policy, state = written
    again = bench.learner(spec, policy=policy, **options)
    again.load_optimizer(state)
    seen += [update(again, make_lesson(seed=i)) for i in range(2, 4)]
    return [seen, policy, state, again.export_policy(), again.export_optimizer()]


PATHS: dict[str, Callable[[Bench], Any]] = {
    **{f"decode_{rule}": partial(answers, rule=rule) for rule in RULES},
    **{f"sampling_{sampling}": partial(answers, sampling=sampling) for sampling in SAMPLINGS},
    "decode_shared_prefix": partial(answers, prompts=SHARED),
    "decode_mixed": mixed,
    "nucleus_of_a_flat_distribution": nucleus_of_a_flat_distribution,
    "score": scored,
    "score_full": partial(scored, spec=FULL),
    "score_bfloat16": partial(scored, dtype=torch.bfloat16),
    "inspect": inspected,
    "trace": traced,
    "load": loaded,
    "load_full": partial(loaded, spec=FULL),
    **{f"learner_score_{kind}": partial(learner_scores, objective=kind) for kind in OBJECTIVES},
    "learner_score_full": partial(learner_scores, spec=FULL, objective="exact_kl"),
    **{f"learn_{kind}": partial(learned, objective=kind) for kind in OBJECTIVES},
    "learn_recompute": partial(learned, recompute=True),
    "learn_dropout": partial(learned, adapter_dropout=0.1),
    "learn_full": partial(learned, spec=FULL, objective="exact_kl"),
    "learn_full_recompute": partial(learned, spec=FULL, recompute=True),
    "learn_jensen_shannon": partial(learned, objective="distill", kl_direction="jensen_shannon"),
    "learn_bfloat16": partial(learned, dtype=torch.bfloat16),
    "learn_full_bfloat16": partial(learned, spec=FULL, zero_stage=1, dtype=torch.bfloat16),
    "resume": resumed,
    "resume_flat": partial(resumed, zero_stage=1),
    "resume_full": partial(resumed, spec=FULL),
    "resume_full_flat": partial(resumed, spec=FULL, zero_stage=1),
    "resume_bfloat16": partial(resumed, spec=FULL, zero_stage=1, dtype=torch.bfloat16),
}


def run_path(path: Path, name: str, degrees: tuple[int, ...] = ()) -> dict[str, Any]:
    """A path on both devices: what it computed on "cpu" and "gpu"."""
    found: dict[str, Any] = {}
    for kind in ("cpu", "gpu"):
        torch.manual_seed(0)
        with on(kind, Degrees(*degrees)):
            found[kind] = plain(PATHS[name](Bench(kind, path, Degrees(*degrees))))
    return found


def plain(value: Any) -> Any:
    """Dictionaries and lists of arrays, numbers and texts. Raises TypeError for a tensor left on the device."""
    if is_dataclass(value):
        return {name: plain(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.detach().float().numpy() if isinstance(value, Tensor) else value
