"""What runs on the pretend GPU: every path of rollout and learner, on the CPU and on the device, in one process.

A path takes a `Bench` and returns what it computed as values of the CPU.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from device_setup import (
    FULL,
    LORA,
    MICRO_BATCHES,
    OBJECTIVES,
    RULES,
    SAMPLINGS,
    SINGLE,
    TOKENS,
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
from ee_megatron.model.active import Active
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, load_policy, save_policy
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.sampling import truncate
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.engine.scoring import inspect, score, trace
from ee_megatron.types import Prompt, Rollout
from tests import pretend_gpu

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

    def decoder(self, spec: PolicySpec = LORA) -> Decoder:
        return make_decoder(self.path, self.device, spec)

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


def continued(bench: Bench) -> list[list[Rollout]]:
    """Answers that were stopped half-way go on under other weights."""
    decoder, tokenizer, pieces = bench.decoder(), bench.tokenizer(), iter(range(12))
    begun = answer(decoder, tokenizer, PROMPTS, samples=2, version=1, rows=4, stop=lambda: next(pieces, None) is None)
    decoder.load_policy(start(bench.path, LORA, seed=1))
    return answer(decoder, tokenizer, PROMPTS, samples=2, version=2, rows=4, begun=begun)


def nucleus_of_a_flat_distribution(bench: Bench) -> Tensor:
    """Some rows need the whole vocabulary sorted, some don't."""
    logits = torch.randn(6, 130, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 8.0] * 3)[:, None]
    return truncate(logits.to(bench.device), 0, 0.7, candidates=16).cpu()


def scored(bench: Bench, spec: PolicySpec = LORA) -> list:
    return score(bench.decoder(spec), start(bench.path, spec), rollouts(bench))


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
    policy, state = learner.export_policy(), learner.export_optimizer()
    again = bench.learner(spec, policy=policy, **options)
    again.load_optimizer(state)
    seen += [update(again, make_lesson(seed=i)) for i in range(2, 4)]
    return [seen, policy, state, again.export_policy(), again.export_optimizer()]


PATHS: dict[str, Callable[[Bench], Any]] = {
    **{f"decode_{rule}": partial(answers, rule=rule) for rule in RULES},
    **{f"sampling_{sampling}": partial(answers, sampling=sampling) for sampling in SAMPLINGS},
    "decode_shared_prefix": partial(answers, prompts=SHARED),
    "decode_mixed": mixed,
    "decode_continued": continued,
    "nucleus_of_a_flat_distribution": nucleus_of_a_flat_distribution,
    "score": scored,
    "score_full": partial(scored, spec=FULL),
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
    "learn_bfloat16": partial(learned, spec=FULL, zero_stage=1, dtype=torch.bfloat16),
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


# ---- what it costs: device_budgets.py has the table ----


def measure(path: Path, name: str) -> dict[str, Any]:
    """Counts per unit of a row of the budgets' table, and the lines that most of them come from."""
    with on("gpu"):
        counts, units = COSTS[name](Bench("gpu", path))
    totals = counts.totals()
    found: dict[str, Any] = {kind: round(totals[kind] / units, 2) for kind in pretend_gpu.KINDS}
    return found | {"duplicates": totals["duplicates"], "top": {k: counts.top(k) for k in pretend_gpu.KINDS}}


def token_rounds(bench: Bench, rule: str = "off", sampling: str = "whole", rows: int = 8) -> Cost:
    """Every row advances by a token; the prompts have been read."""
    scheduler = Scheduler(bench.decoder(), bench.tokenizer(), in_flight=rows)
    for i in range(rows):
        scheduler.add(Request(TEXTS[0], SAMPLINGS[sampling], RULES[rule], 0, f"p{i}"))
    scheduler.advance()
    with pretend_gpu.counting() as counts:
        while scheduler.busy:
            scheduler.advance()
    return counts, TOKENS - 1


def reading(bench: Bench) -> Cost:
    """Prompts of one length, read together; per layer."""
    decoder = bench.decoder()
    tokens = torch.arange(32).view(4, 8).to(bench.device)
    with pretend_gpu.counting() as counts:
        decoder.prefill(tokens, torch.full((4,), 8))
    return counts, decoder.dims.num_layers


def loading(bench: Bench) -> Cost:
    """A policy of adapters and gates from the host; per layer."""
    decoder, policy = bench.decoder(), start(bench.path, LORA, seed=1)
    with pretend_gpu.counting() as counts:
        decoder.load_policy(policy)
    return counts, decoder.dims.num_layers


def scoring(bench: Bench, score: Callable = score_lesson) -> Cost:
    """Per layer and micro-batch."""
    learner, lesson = bench.learner(), make_lesson()
    with pretend_gpu.counting() as counts:
        score(learner, lesson)
    return counts, LORA.num_layers * MICRO_BATCHES


def updating(bench: Bench, objective: str = "likelihood", spec: PolicySpec = LORA, **options: Any) -> Cost:
    """An update when the optimizer's state is there; per layer and micro-batch."""
    learner, lesson = bench.learner(spec, **options), make_lesson(objective)
    update(learner, lesson)
    with pretend_gpu.counting() as counts:
        update(learner, lesson)
    return counts, LORA.num_layers * MICRO_BATCHES


Cost = tuple[pretend_gpu.Counts, int]
COSTS: dict[str, Callable[[Bench], Cost]] = {
    "decode off": token_rounds,
    "decode sample": partial(token_rounds, rule="sample"),
    "decode threshold": partial(token_rounds, rule="threshold"),
    "decode confidence": partial(token_rounds, rule="confidence"),
    "decode patience": partial(token_rounds, rule="patience"),
    "decode sample, top-p": partial(token_rounds, rule="sample", sampling="top_p"),
    "read prompts": reading,
    "load policy": loading,
    "score": scoring,
    "score reference": partial(scoring, score=score_reference),
    "learn likelihood": updating,
    "learn likelihood, recompute": partial(updating, recompute=True),
    "learn likelihood, whole model": partial(updating, spec=FULL),
    "learn distill": partial(updating, objective="distill"),
    "learn distill_full": partial(updating, objective="distill_full"),
    "learn exact_kl": partial(updating, objective="exact_kl"),
}


# ---- the device itself ----


def semantics() -> dict[str, Any]:
    """What single operations do: "refused", or (syncs, copies) that were counted."""
    with on("gpu"):
        here, there = torch.arange(3.0), torch.arange(3.0).to(device_of("gpu"))
        tries: dict[str, Callable[[], Any]] = {
            "sum of two devices": lambda: here + there,
            "concatenation of two devices": lambda: torch.cat([there, here]),
            "index of the device into the CPU": lambda: here[there.long()],
            "numpy": there.numpy,
            "fused step on the CPU": lambda: torch._fused_adamw_(
                *([there.clone()] for _ in range(4)), [], [torch.tensor(1.0)], lr=0.1, beta1=0.9, beta2=0.9,
                weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
            ),
            "a scalar of the CPU": lambda: there * torch.tensor(2.0),
            "an index on the CPU": lambda: there[torch.tensor([0, 2])],
            "tensor with device": lambda: torch.tensor([1, 2], device=there.device),
            "item": lambda: float(there.sum()),
            "tolist": there.tolist,
            "to the CPU": there.cpu,
            "nonzero": there.nonzero,
            "boolean index": lambda: there[there > 0],
        }  # fmt: skip
        found: dict[str, Any] = {name: _tried(operation) for name, operation in tries.items()}
        with pretend_gpu.counting() as counts:
            Active.of(torch.ones(2, 3, dtype=torch.bool, device=there.device), torch.zeros(2, 3, device=there.device))
        found["site"] = counts.top("syncs")[0][0]
        with pretend_gpu.counting() as counts:
            places = torch.tensor([0, 1, 1, 1], device=there.device)
            there.index_put_((places,), torch.ones(4, device=there.device), accumulate=True)
        found["duplicates"] = counts.duplicates
        before = pretend_gpu.memory.live
        held = torch.zeros(1000, device=there.device)
        view, rise = held[10:], pretend_gpu.memory.live - before
        del held, view
        found["bytes"] = (rise, pretend_gpu.memory.live - before)
        inside = torch.tensor
    found["patched afterwards"] = torch.tensor is inside
    return found


def _tried(operation: Callable[[], Any]) -> Any:
    with pretend_gpu.counting() as counts:
        try:
            operation()
        except (RuntimeError, TypeError):
            return "refused"
    totals = counts.totals()
    return totals["syncs"], totals["copies"]


# ---- memory ----


def live_bytes(path: Path, what: str) -> list[int]:
    """Bytes alive on the device after each of four rounds of work that leaves nothing behind."""
    found = []
    with on("gpu"):
        for _ in WAVES[what](Bench("gpu", path)):
            gc.collect()
            found.append(pretend_gpu.memory.live)
    return found


def waves_of_requests(bench: Bench) -> Iterator[None]:
    """New prompts each time; more than fit at once."""
    scheduler = Scheduler(bench.decoder(), bench.tokenizer(), in_flight=2)
    for wave in range(4):
        ids = [
            scheduler.add(Request([wave, i + 1, 3], SAMPLINGS["whole"], RULES["sample"], 0, f"p{i}")) for i in range(3)
        ]
        while scheduler.busy:
            scheduler.advance()
        for i in ids:
            scheduler.take(i, 0)
        yield


def updates(bench: Bench) -> Iterator[None]:
    learner = bench.learner()
    for seed in range(4):
        update(learner, make_lesson("exact_kl", seed))
        yield


def loads(bench: Bench) -> Iterator[None]:
    decoder = bench.decoder()
    for seed in range(4):
        decoder.load_policy(start(bench.path, LORA, seed))
        yield


WAVES: dict[str, Callable[[Bench], Iterator[None]]] = {
    "requests": waves_of_requests,
    "updates": updates,
    "loads": loads,
}
