"""A learner's step on the whole model: seconds against a roofline, memory against the plan, kernels."""

from __future__ import annotations

import torch

from ee_megatron.planning.roofline import Roofline
from tools.workloads import make_batch, spread

from .decoding import compare_memory
from .findings import Findings
from .machine import device_of
from .profiling import profiled
from .resuming import GROWTH
from .shapes import Bench, ideal


def step(findings: Findings, bench: Bench) -> None:
    prompts, group, prompt, answer, tokens = bench.size.step
    device, _ = device_of(bench)
    bench.forget_peak()
    bench.join()
    cfg = bench.settings(False, prompts, group, tokens)
    plan = bench.plan(cfg, device, prompt, answer)
    learner = bench.learner(cfg, torch.bfloat16, bench.policy(False))
    batch, weights = make_batch(
        learner.spec, learner.dims.vocab, prompts * group, prompt, answer, plan.load.shares, group
    )  # fmt: skip
    deepest = batch.at_full_depth(learner.spec.num_layers)
    findings.figure("sequences", f"{prompts} prompts x {group} answers, {prompt} + {answer} tokens")
    findings.figure("positions of a micro-batch", tokens)
    for _ in range(2):
        # The second has AdamW's moments from the start.
        learner.step(deepest, weights, adapter_lr=1e-4, gate_lr=1e-4)
    if findings.only_on_cuda("memory against the plan"):
        compare_memory(findings, "learner rank", plan.device_bytes(plan.learner[0]), bench.peak_bytes())

    def update() -> None:
        learner.step(batch, weights, adapter_lr=1e-4, gate_lr=1e-4)

    update()
    seconds: dict[str, list[float]] = {"update": [], "scoring": []}
    live = []
    for _ in range(bench.size.repeats):
        seconds["update"].append(bench.seconds(update))
        seconds["scoring"].append(
            bench.seconds(lambda: (learner.score(batch), learner.score(batch, reference=True)))  # type: ignore[func-returns-value]
        )
        live.append(bench.live_bytes())
    findings.check("live memory grows over steps by", max(live) - live[0], at_most=GROWTH, unit="bytes")
    findings.table("Seconds", ("what", "median", "least", "most"), [(n, *spread(t)) for n, t in seconds.items()])
    bounds = Roofline(cfg, plan.layout, plan.load, ideal(device), plan.item, plan.actor.rows, answer).phases()
    for name, taken in seconds.items():
        median = spread(taken)[0]
        findings.figure(f"{name}: roofline", bounds[name].best, "s")
        findings.figure(f"{name}: what `plan` expects", plan.phases[name].likely, "s")
        findings.figure(f"{name}: reached", plan.flops[name] / median / 1e12, "TFLOP/s")
        why = "nothing is faster than the device: else the clock or the count is wrong"
        findings.check(
            f"{name}: share of the roofline", bounds[name].best / median, at_least=0.0, at_most=1.05, why=why
        )
    profiled(findings, bench, "step", update, 1, "step")
