"""Decoding on the whole model: tokens/s against a roofline and against transformers' generate, memory, kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ee_megatron.exit_rules import Off, Prescribed
from ee_megatron.planning.roofline import Roofline
from ee_megatron.rollout import Decoder, Request, SamplingParams, Scheduler
from tools.workloads import answer_all, exits_with_mean, spread

from .findings import Findings
from .machine import device_of
from .profiling import profiled
from .resuming import GROWTH
from .shapes import Bench, ideal, tokenizer

PROFILED = 8
"""Tokens of every answer in flight."""


def decode(findings: Findings, bench: Bench) -> None:
    rows, prompt, answer = bench.size.decode
    device, _ = device_of(bench)
    bench.forget_peak()
    plan = bench.plan(bench.settings(False, prompts=rows), device, prompt, answer)
    findings.figure("answers in flight", rows)
    findings.figure("tokens of a prompt and of an answer", f"{prompt} + {answer}")
    decoder, words = bench.decoder(False, torch.bfloat16), tokenizer(bench.dims(False).vocab)
    kinds = {"full depth": 1.0, f"mean depth {bench.size.depth:g}": bench.size.depth}

    def answered(depth: float) -> Scheduler:
        return answer_all(decoder, words, requests(bench, decoder, depth, answer), rows)

    answered(1.0)
    if findings.only_on_cuda("memory against the plan"):
        planned, peak = plan.device_bytes(plan.actor.kinds), bench.peak_bytes()
        compare_memory(findings, "rollout actor", planned, peak)
    answered(bench.size.depth)
    hf = AutoModelForCausalLM.from_pretrained(bench.folder(False), dtype=torch.bfloat16).to(bench.device).eval()
    generate_hf(hf, bench, prompt, 2)
    tokens, live = rows * (answer - 1), []
    seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "transformers")}
    for _ in range(bench.size.repeats):
        for name, depth in kinds.items():
            seconds[name].append(bench.seconds(lambda d=depth: answered(d)))  # type: ignore[misc]
        seconds["transformers"].append(bench.seconds(lambda: generate_hf(hf, bench, prompt, answer)))
        live.append(bench.live_bytes())
    findings.check("live memory grows over repeats by", max(live) - live[0], at_most=GROWTH, unit="bytes")
    table = []
    for name, taken in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds["transformers"], taken, strict=True)]
        table.append((name, *(tokens / s for s in (spread(taken)[0], max(taken), min(taken))), *spread(ratios)))
    findings.table(
        "Tokens/s, prompts included; a repeat runs all of them in turn",
        ("what", "median", "least", "most", "of transformers' speed", "least", "most"), table,
    )  # fmt: skip
    for name, depth in kinds.items():
        at = plan if depth < 1 else bench.plan(bench.settings(False, prompts=rows), device, prompt, answer, depth)
        bound = Roofline(at.cfg, at.layout, at.load, ideal(device), at.item, rows, answer).phases()["rollouts"].best
        share = bound / spread(seconds[name])[0]
        findings.figure(f"{name}: roofline", tokens / bound, "tokens/s")
        findings.figure(f"{name}: what `plan` expects", tokens / at.phases["rollouts"].likely, "tokens/s")
        why = "nothing is faster than the device: else the clock or the count is wrong"
        findings.check(f"{name}: share of the roofline", share, at_least=0.0, at_most=1.05, why=why)
    profile_rounds(findings, bench, decoder, words)


def compare_memory(findings: Findings, what: str, planned: float, peak: float) -> None:
    """The plan has to hold: what it says fits has to fit, and what it refuses should not have."""
    findings.figure(f"{what}: planned", planned / 2**30, "GiB")
    findings.figure(f"{what}: torch's peak", peak / 2**30, "GiB")
    why = "the plan counts tensors, and lets a device keep 3 GiB for what lies between them"
    findings.check(f"{what}: peak of what was planned", peak / planned, at_least=0.7, at_most=1.1, why=why)


def requests(bench: Bench, decoder: Decoder, depth: float, answer: int) -> Iterator[Request]:
    """Random prompts whose tokens leave at exits of the given mean depth, as a share of the layers."""
    rows, prompt, _ = bench.size.decode
    outcomes, layers = decoder.layout.outcomes, decoder.dims.num_layers
    ids = torch.randint(decoder.dims.vocab, (rows, prompt), generator=torch.Generator().manual_seed(2)).tolist()
    drawn = {(f"p{i}", 0): [layers, *exits_with_mean(outcomes, depth * layers, answer - 1, i)] for i in range(rows)}
    exits = Prescribed(drawn) if depth < 1 else Off()
    for i, tokens in enumerate(ids):
        yield Request(tokens, SamplingParams(1.0, answer), exits, 0, f"p{i}")


def generate_hf(hf: PreTrainedModel, bench: Bench, prompt: int, answer: int) -> None:
    """The same number of tokens by transformers, sampled from the whole vocabulary."""
    ids = torch.randint(hf.config.vocab_size, (bench.size.decode[0], prompt)).to(bench.device)
    made = hf.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=answer, pad_token_id=0,
    )  # fmt: skip
    assert made.shape[1] == prompt + answer


def profile_rounds(findings: Findings, bench: Bench, decoder: Decoder, words: object) -> None:
    """Some tokens of every answer at full depth, prompts read before."""
    rows, _, answer = bench.size.decode
    scheduler = Scheduler(decoder, words, rows)  # type: ignore[arg-type]
    for request in requests(bench, decoder, 1.0, answer):
        scheduler.add(request)
    # The first gives every answer its first token.
    scheduler.advance()

    def rounds() -> None:
        made = 0
        for _ in itertools.count():
            made += len(scheduler.advance())
            if made >= PROFILED * rows:
                return

    profiled(findings, bench, "decoding", rounds, PROFILED, "round")
