"""What the pretend GPU is asked for by a unit of work, and the budgets for it; what stays on it, and what single
operations do.

Budgets may only go down. They are of the tiny model (6 layers, exits after 1, 3 and 4), everything included that
happens in the unit. A test fails where a number rises, and warns where one fell: lower it here then.

- decode: per token-round, in which every one of 8 rows advances by a token; by exit rule
- decode everything: per token; read, export, load: per layer
- score, learn: per layer and micro-batch of about 3 sequences; `learn` is a whole update, optimizer included
- syncs: the host waits for the device; copies: from host to device; kernels: launches
- pageable: copies in either direction by way of memory that isn't pinned; none, whatever the row
- unordered: sums in bfloat16 whose order CUDA leaves open; none, whatever the row
- duplicates: the most often one element is hit by one accumulating index, in the whole unit
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from device_cases import (
    FULL,
    LORA,
    MICRO_BATCHES,
    RULES,
    SAMPLINGS,
    TEXTS,
    TOKENS,
    Bench,
    device_of,
    make_lesson,
    mixed,
    on,
    rollouts,
    score_lesson,
    score_reference,
    start,
    update,
)

from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.objectives.weights import mean_weights
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout.engine.decoder import Decoder
from ee_megatron.rollout.engine.request import Request
from ee_megatron.rollout.engine.scheduler import Scheduler
from ee_megatron.rollout.engine.scoring import score
from ee_megatron.tensors import to_device, to_host
from tests import pretend_gpu

KINDS = (*pretend_gpu.KINDS, "duplicates")
# Kernels are what this version of PyTorch makes of an operation; with another one they are not compared.
MEASURED_WITH = "2.13.0"

_TABLE = {
    # what                              syncs  copies kernels duplicates
    "decode off":                      (     2,     10, 477.22,      0),
    "decode sample":                   (     5,   9.78, 516.00,      0),
    "decode threshold":                (     5,   9.78, 512.56,      0),
    "decode confidence":               (     5,     10, 568.44,      0),
    "decode patience":                 (     5,     10, 563.78,      0),
    # 541.11 while rows that end were written to the cache like the others, which needed no choice of rows.
    "decode sample, top-p":            (     5,   9.89, 548.44,      0),
    # 2.73, 4.92 and 123.19 before speculation was one of the rules, whose drafts the host must know.
    "decode everything":               (  2.82,   4.94, 131.74,      0),
    # 62.33 before keys and values were written where they stay, which halves the memory at the end of a read.
    "read prompts":                    (     0,      0,  64.67,      0),
    "read rollouts":                   (  0.33,   1.83, 167.50,      0),
    "export policy":                   (  0.83,      0,      0,      0),
    "load policy":                     (     0,   0.17,  17.83,      0),
    "load policy, whole model":        (     0,  11.50,  15.17,      0),
    # Attention counts by its parts, sequence by sequence, for compiled kernels don't run here: 8 kernels forward and 17
    # backward where CUDA has 1 and 2.
    "score":                          (  0.08,   0.17, 149.42,      0),
    "score reference":                (  0.08,   0.17, 101.75,      0),
    "learn likelihood":               (  0.42,   0.17, 435.58,      1),
    "learn likelihood, recompute":    (  0.42,   0.17, 562.08,      1),
    "learn likelihood, whole model":  (  0.42,   0.17, 365.25,      1),
    "learn likelihood, bfloat16":     (  0.42,   0.17, 484.25,      1),
    "learn distill":                  (  0.42,   0.17, 441.58,      1),
    # 548.67 while it left out the label's likelihood, which exact_kl, at 556.0, then read out by itself.
    "learn distill_full":             (  0.42,   0.17, 534.42,      1),
    "learn exact_kl":                 (  0.42,   0.17, 534.42,      1),
}  # fmt: skip
BUDGETS = {name: dict(zip(KINDS, (*row[:2], 0, row[2], 0, row[3]), strict=True)) for name, row in _TABLE.items()}


def measure(path: Path, name: str) -> dict[str, Any]:
    """Counts per unit of a row of the budgets' table, and the lines that most of them come from."""
    with on("gpu"):
        counts, units = COSTS[name](Bench("gpu", path))
    totals = counts.totals()
    found: dict[str, Any] = {kind: round(totals[kind] / units, 2) for kind in pretend_gpu.KINDS}
    return found | {"duplicates": totals["duplicates"], "top": {kind: counts.top(kind) for kind in pretend_gpu.KINDS}}


def token_rounds(bench: Bench, rule: str = "off", sampling: str = "whole", decoder: Decoder | None = None) -> Cost:
    """Each of 8 rows advances by a token; the prompts have been read."""
    scheduler = Scheduler(decoder or bench.decoder(), bench.tokenizer(), in_flight=8)
    for i in range(8):
        scheduler.add(Request(TEXTS[0], SAMPLINGS[sampling], RULES[rule], 0, f"p{i}"))
    scheduler.advance()
    with pretend_gpu.counting() as counts:
        while scheduler.busy:
            scheduler.advance()
    return counts, TOKENS - 1


def round_kernels(shallow: Path, deep: Path) -> dict[str, float]:
    """Kernels of a token-round at full depth in bfloat16: per layer, per exit and for the rest, as planning has them.
    `deep` has six layers more."""

    def counted(path: Path, exits: tuple[int, ...]) -> float:
        bench = Bench("gpu", path)
        spec = PolicySpec(HFDirectory(path).dims.num_layers, exits, rank=4, alpha=8.0)
        counts, rounds = token_rounds(bench, decoder=bench.decoder(spec, torch.bfloat16))
        return counts.totals()["kernels"] / rounds

    with on("gpu"):
        base = counted(shallow, (1, 3, 4))
        layer, each = (counted(deep, (1, 3, 4)) - base) / 6, (base - counted(shallow, (1,))) / 2
    return {"layer": layer, "exit": each, "round": base - HFDirectory(shallow).dims.num_layers * layer - 3 * each}


def reading(bench: Bench) -> Cost:
    """Prompts of one length, read together; per layer."""
    decoder = bench.decoder()
    tokens = torch.arange(32).view(4, 8).to(bench.device)
    with pretend_gpu.counting() as counts:
        decoder.prefill(tokens, torch.full((4,), 8))
    return counts, decoder.dims.num_layers


def loading(bench: Bench, spec: PolicySpec = LORA) -> Cost:
    """A policy from the host; per layer."""
    decoder, policy = bench.decoder(spec), start(bench.path, spec, seed=1)
    with pretend_gpu.counting() as counts:
        decoder.load_policy(policy)
    return counts, decoder.dims.num_layers


def everything(bench: Bench) -> Cost:
    """All rules and samplings together, which no index has all rows of; per token, prompts included."""
    decoder = bench.decoder()
    with pretend_gpu.counting() as counts:
        rollouts = mixed(bench, decoder, top_logprobs=2)
    return counts, sum(rollout.length for rollout in rollouts)


def reading_rollouts(bench: Bench) -> Cost:
    """Rollouts scored by the decoder; per layer."""
    decoder, policy, made = bench.decoder(), start(bench.path, LORA), rollouts(bench)
    with pretend_gpu.counting() as counts:
        score(decoder, policy, made)
    return counts, decoder.dims.num_layers


def exporting(bench: Bench) -> Cost:
    """The policy's weights to the host, on their way to the actors; per layer."""
    learner = bench.learner()
    with pretend_gpu.counting() as counts:
        learner.export_policy()
    return counts, LORA.num_layers


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
    "decode everything": everything,
    "read prompts": reading,
    "read rollouts": reading_rollouts,
    "export policy": exporting,
    "load policy": loading,
    "load policy, whole model": partial(loading, spec=FULL),
    "score": scoring,
    "score reference": partial(scoring, score=score_reference),
    "learn likelihood": updating,
    "learn likelihood, recompute": partial(updating, recompute=True),
    "learn likelihood, whole model": partial(updating, spec=FULL),
    "learn likelihood, bfloat16": partial(updating, dtype=torch.bfloat16),
    "learn distill": partial(updating, objective="distill"),
    "learn distill_full": partial(updating, objective="distill_full"),
    "learn exact_kl": partial(updating, objective="exact_kl"),
}


# ---- the device itself ----


def semantics() -> dict[str, Any]:
    """What single operations do: "refused", or (syncs, copies, pageable) that were counted."""
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
            "to_device": lambda: to_device([torch.arange(3), torch.arange(2)], there.device),
            "to_host": lambda: to_host(there, there[1:]),
            "pinned, of another dtype": lambda: torch.arange(3).pin_memory().to(there, non_blocking=True),
            "pinned, blocking": lambda: torch.arange(3).pin_memory().to(there.device),
            "nonzero": there.nonzero,
            "boolean index": lambda: there[there > 0],
        }  # fmt: skip
        found: dict[str, Any] = {name: _tried(operation) for name, operation in tries.items()}
        with pretend_gpu.counting() as counts:
            mean_weights(SimpleNamespace(loss_mask=there[None] > 0), there[None] > 0)
        found["site"] = counts.top("syncs")[0][0]
        with pretend_gpu.counting() as counts:
            places = torch.tensor([0, 1, 1, 1], device=there.device)
            there.index_put_((places,), torch.ones(4, device=there.device), accumulate=True)
        found["duplicates"] = counts.duplicates
        with pretend_gpu.counting() as counts:
            there.bfloat16().index_add_(0, places, torch.ones(4, dtype=torch.bfloat16, device=there.device))
            there.index_add_(0, places, torch.ones(4, device=there.device))
        found["unordered"] = counts.totals()["unordered"]
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
    return totals["syncs"], totals["copies"], totals["pageable"]


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
