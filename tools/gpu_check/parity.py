"""Decoder, learner and export against float32 on the CPU, from the same weights, tokens and exits.

One measure for all of them: the error's norm over the norm of the values' deviation from their mean. Its limits:

- float32: 1e-4, which is what the three bodies of the model promise each other (docs/method.md).
- a narrower dtype, TF32 too: 2 u √(10L/3) for L layers, u its unit roundoff. From one state of the residual stream to
  the next about ten tensors are rounded (norms, projections, rotation, attention, SwiGLU, sums), each by u/√3 in the
  mean square, and independent roundings add up like a random walk; the 2 is for other orders of summation. bfloat16 on
  a CPU comes to .6 of it at the width of 1.5B models, to .3 at small ones, where the stream outweighs what is added.
- gradients of the tokens' term: twice that, since the backward pass rounds as often as the forward pass it follows.
- gradients of the exits' term: 2 √(2ε/π), ε half of the limit for values: noise of relative size ε turns the sign of a
  share ε/π of the units that a gate's ReLU asks, and the whole gradient of these comes or goes.

What is computed wrongly shows in float32; the narrower dtypes show that nothing is rounded more often than need be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.config.schema import DeepspeedConfig
from ee_megatron.exit_rules import Prescribed, Sample
from ee_megatron.families import dims_from_config
from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.model.attention import Spans, attend_packed, flexible
from ee_megatron.model.layer import normed, swiglu, turned
from ee_megatron.model.packed import Active, PackedSequences, Segment
from ee_megatron.objectives.weights import Weights
from ee_megatron.policy import PolicySpec
from ee_megatron.rollout import Decoder, Request, SamplingParams, Score
from ee_megatron.rollout.engine.scoring import replay_depths, score
from ee_megatron.tensors import to_device
from ee_megatron.types import Rollout
from tools.workloads import answer_all, make_weights

from .bench import Bench, Findings, tokenizer

ROWS, PROMPT, ANSWER = 4, 20, 24
PREDICTING = slice(PROMPT - 1, PROMPT - 1 + ANSWER)
"""Positions that predict the answer's tokens."""
PRECISIONS = {
    "float32": (torch.float32, "highest"),
    "float32 with TF32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
}


@dataclass
class Reference:
    """Answers with exits of every depth, and what float32 on the CPU makes of them: logits [R, T, V] of the decoder,
    its scores; what `learn` says."""

    rollouts: list[Rollout]
    logits: Tensor
    scores: list[Score]
    learned: dict[str, Tensor]


def error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected - its mean‖."""
    found, expected = found.double().flatten().cpu(), expected.double().flatten()
    return float((found - expected).norm() / (expected - expected.mean()).norm())


def tolerance(precision: str, layers: int) -> tuple[float, str]:
    """The limit of `error` and where it comes from."""
    if precision == "float32":
        return 1e-4, "the three bodies of the model agree this far in float32 (docs/method.md)"
    # TF32 has 10 bits behind the point of its significand, bfloat16 7; rounding is off by half of the last one.
    roundoff = 2.0 ** (-11 if "TF32" in precision else -8)
    why = f"2 u √(10L/3): u = {roundoff:.1e}, the unit roundoff; L = {layers} layers"
    return 2 * roundoff * (10 * layers / 3) ** 0.5, why


def reference(findings: Findings, bench: Bench) -> None:
    """Made without a visible GPU: megatron-core asks for CUDA wherever it finds it."""
    if not bench.small:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    bench.join()
    decoder, size = bench.decoder(True, torch.float32), bench.size
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(decoder.dims.vocab, (ROWS, PROMPT), generator=generator).tolist()
    requests = [Request(p, SamplingParams(1.0, ANSWER), Sample(), 0, f"p{i}") for i, p in enumerate(prompts)]
    scheduler = answer_all(decoder, tokenizer(decoder.dims.vocab), requests, ROWS)
    rollouts = [scheduler.take(i, 0) for i in range(ROWS)]
    made = Reference(
        rollouts, parallel_logits(decoder, rollouts), score(decoder, bench.policy(True), rollouts),
        learn(bench, rollouts, torch.float32),
    )  # fmt: skip
    torch.save(made, bench.scratch / "reference.pt")
    taken = torch.cat([torch.as_tensor(r.exit_depths) for r in rollouts])
    missing = set((*size.exits, size.shallow)) - set(taken.tolist())
    findings.check("exits that no token took", len(missing), at_most=0, why="else the comparison would miss a path")
    findings.figure("tokens", len(taken))
    findings.figure("mean depth", float(taken.float().mean()) / size.shallow)
    told, again = columns(rollouts, "token_logprobs"), columns(made.scores, "policy_logprobs")
    findings.check("decoded and read again in parallel", error(told, again), at_most=1e-4)
    findings.check("learner against decoder", error(made.learned["token_logprobs"], again), at_most=1e-4)


def stored(path: Path) -> Reference:
    return torch.load(path / "reference.pt", weights_only=False)


def parallel_logits(decoder: Decoder, rollouts: Sequence[Rollout]) -> Tensor:
    """Logits [R, T, V] of the tokens, all of one length, at their exits, in one forward pass."""
    tokens = sequences(rollouts).to(decoder.device)
    depths = replay_depths(rollouts, tokens.shape[1], decoder)
    hidden = decoder.forward_parallel(tokens, torch.full((len(rollouts),), tokens.shape[1]), depths)
    return decoder.readout(hidden[:, PREDICTING]).cpu()


def sequences(rollouts: Sequence[Rollout]) -> Tensor:
    """int64 [R, P + T]"""
    return torch.tensor([[*r.prompt_tokens.tolist(), *r.tokens.tolist()] for r in rollouts])


def batch_of(rollouts: Sequence[Rollout], spec: PolicySpec) -> ReplayBatch:
    return pack(
        [r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts], [r.exit_depths for r in rollouts],
        spec.num_layers, spec.first_token,
    )  # fmt: skip


def learn(bench: Bench, rollouts: Sequence[Rollout], dtype: torch.dtype) -> dict[str, Tensor]:
    """The learner's log-probabilities of tokens and exits where they count, and the gradients of both terms of a loss.

    AdamW's first step is lr · g / (|g| + eps): with an eps far above every gradient and lr = eps it moves by -g.
    """
    cfg, policy = bench.settings(True, tokens=96), bench.policy(True)
    found: dict[str, Tensor] = {}
    for term in ("tokens", "exits"):
        learner = bench.learner(cfg, dtype, policy, DeepspeedConfig(gradient_clipping=0.0, eps=1e3))
        batch = batch_of(rollouts, learner.spec)
        if not found:
            scores = learner.score(batch)
            found = {
                "token_logprobs": scores.token_logprobs[batch.loss_mask].view(len(rollouts), -1),
                "exit_logprobs": scores.exit_logprobs[batch.gate_mask],
            }
        both = make_weights(batch)
        weights = Weights(token=both.token) if term == "tokens" else Weights(exit=both.exit)
        if not learner.step(batch, weights, adapter_lr=1e3, gate_lr=1e3).applied:
            raise RuntimeError(f"gradients of the {term}' term in {dtype} are not finite")
        moved = {name: after - policy[name] for name, after in learner.export_policy().items()}
        for group, mark in (("adapters", ".lora_"), ("gates", "gates.")):
            if (term, group) != ("tokens", "gates"):
                parts = [change.flatten() for name, change in moved.items() if mark in name]
                found[f"gradient of {term}, {group}"] = torch.cat(parts)
    return found


def decoder(findings: Findings, bench: Bench) -> None:
    ref, spec = stored(bench.scratch), bench.spec(True)
    for precision, (dtype, products) in PRECISIONS.items():
        if "TF32" in precision and not findings.only_on_cuda(precision):
            continue
        torch.set_float32_matmul_precision(products)
        limit, why = tolerance(precision, spec.num_layers)
        model = bench.decoder(True, dtype)
        findings.check(
            f"{precision}: logits, all positions at once", error(parallel_logits(model, ref.rollouts), ref.logits),
            at_most=limit, why=why,
        )  # fmt: skip
        for name, found in decoded(model, ref.rollouts).items():
            expected = columns(ref.rollouts, name)[:, : ANSWER - 1]
            findings.check(f"{precision}: decoded, {name}", error(found, expected), at_most=limit, why=why)
        scores = score(model, bench.policy(True), ref.rollouts)
        for name in ("policy_logprobs", "exit_logprobs", "teacher_logprobs", "divergence"):
            found, expected = (columns(a, name) for a in (scores, ref.scores))
            findings.check(f"{precision}: scored, {name}", error(found, expected), at_most=limit, why=why)
        del model
    torch.set_float32_matmul_precision("highest")


def decoded(model: Decoder, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Log-probabilities [R, T - 1] of the same tokens under the same exits, one position at a time with the cache."""
    exits = Prescribed({(f"p{i}", 0): r.exit_depths.tolist() for i, r in enumerate(rollouts)})
    requests = [
        Request(
            r.prompt_tokens.tolist(), SamplingParams(1.0, ANSWER), exits, 0, f"p{i}", prefill=r.tokens[:-1].tolist()
        )
        for i, r in enumerate(rollouts)
    ]
    scheduler = answer_all(model, tokenizer(model.dims.vocab), requests, ROWS)
    again = [scheduler.take(i, 0) for i in range(ROWS)]
    return {name: columns(again, name)[:, : ANSWER - 1] for name in ("token_logprobs", "exit_logprobs")}


def columns(records: Sequence[Rollout] | Sequence[Score], name: str) -> Tensor:
    """A field [T] of records of one length, [R, T]."""
    return torch.stack([torch.as_tensor(getattr(record, name)) for record in records])


def learner(findings: Findings, bench: Bench) -> None:
    bench.join()
    ref, layers = stored(bench.scratch), bench.size.shallow
    for precision in ("float32", "bfloat16"):
        limit, why = tolerance(precision, layers)
        limits = {
            "tokens": (2 * limit, f"twice {why}"),
            "exits": (2 * (limit / pi) ** 0.5, "2 √(2ε/π), ε half of the limit for values (parity.py)"),
        }
        for name, found in learn(bench, ref.rollouts, PRECISIONS[precision][0]).items():
            most, because = limits[name.split()[2].strip(",")] if name.startswith("gradient") else (limit, why)
            findings.check(f"{precision}: {name}", error(found, ref.learned[name]), at_most=most, why=because)


def attention(findings: Findings, bench: Bench) -> None:
    """FlexAttention as an RL update calls it, prompts shared by their answers and half of the positions gone, against
    blocks of queries in float32. Reads no model."""
    prompts, answers, prompt, answer, _ = bench.size.step
    shared = [prompt if row % answers else 0 for row in range(prompts * answers)]
    packed = to_device(PackedSequences.of([prompt + answer] * len(shared), shared), bench.device)
    asking = torch.rand(packed.length, generator=torch.Generator().manual_seed(2)) < 0.5
    half = Active(to_device(Segment.of(asking, asking), bench.device), packed).spans
    _flex_against_blocks(findings, bench, "float32", half)
    # Each kind of inputs is compiled anew on a CPU, in half a minute.
    if findings.only_on_cuda("bfloat16, all positions, gradients, memory"):
        asking = torch.ones(packed.length, dtype=torch.bool)
        for spans in (half, Active(to_device(Segment.of(asking, asking), bench.device), packed).spans):
            _flex_against_blocks(findings, bench, "bfloat16", spans)


def _flex_against_blocks(findings: Findings, bench: Bench, precision: str, spans: Spans) -> None:
    dims, rows, length = dims_from_config(bench.size.whole), len(spans.host_positions), spans.slots.shape[1]
    generator, dtype = torch.Generator(bench.device).manual_seed(3), PRECISIONS[precision][0]
    query, key, value, slope = (
        torch.randn(count, heads, dims.head_dim, generator=generator, device=bench.device, dtype=dtype)
        for count, heads in ((rows, dims.heads), (length, dims.kv_heads), (length, dims.kv_heads), (rows, dims.heads))
    )
    given, what = [x.requires_grad_() for x in (query, key, value)], f"{precision}, {rows} of {length} positions"
    # One layer's worth: the inputs are the same, so only what happens inside is rounded.
    limit, why = tolerance(precision, 1)
    right = attend_packed(query, key, value, spans, flex=False)
    if bench.kind == "cpu":
        # Inductor has no backward pass for a CPU, nor sizes that vary.
        fused = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        found = flexible(query.detach(), key.detach(), value.detach(), spans, fused)
        findings.check(f"{what}: values", error(found, right.detach()), at_most=limit, why=why)
        return

    def flex() -> tuple[Tensor, ...]:
        out = attend_packed(query, key, value, spans, flex=True)
        return out.detach(), *torch.autograd.grad(out, given, slope)

    findings.figure(f"{what}: first call, compiled in", bench.seconds(flex), "s")
    bench.forget_peak()
    before = bench.live_bytes()
    out, *gradients = flex()
    findings.check(
        f"{what}: memory over that of all scores", (bench.peak_bytes() - before) / (4 * dims.heads * rows * length),
        at_most=0.5, why="unfused attention holds the scores of all queries with all keys",
    )  # fmt: skip
    findings.check(f"{what}: values", error(out, right.detach().cpu()), at_most=limit, why=why)
    expected = torch.autograd.grad(right, given, slope)
    for part, mine, theirs in zip(("queries", "keys", "values"), gradients, expected, strict=True):
        name, most = f"{what}: gradient of {part}", 2 * limit
        findings.check(name, error(mine, theirs.cpu()), at_most=most, why=f"twice {why}")
    changed = sum(not torch.equal(a, b) for a, b in zip((out, *gradients), flex(), strict=True))
    findings.check(f"{what}: results that a second run changes", changed, at_most=0)


def fused(findings: Findings, bench: Bench) -> None:
    """What the learner's layers compute in one kernel on a GPU against the same in several. Reads no model."""
    if not findings.only_on_cuda("values and gradients"):
        return
    dims = dims_from_config(bench.size.whole)
    shapes = {"norm": [(4096, dims.hidden), (dims.hidden,)], "SwiGLU": [(4096, 2 * dims.intermediate)],
              "rotation": [(4096, dims.heads, dims.head_dim), *[(4096, 1, dims.head_dim)] * 2]}  # fmt: skip
    functions: dict[str, Callable[..., Tensor]] = {
        "norm": lambda fused, x, gain: normed(x, gain, dims.rms_eps, fused),
        "SwiGLU": lambda fused, x: swiglu(x, fused),
        "rotation": lambda fused, x, cos, sin: turned(x, (cos, sin), fused),
    }
    for precision in ("float32", "bfloat16"):
        (limit, why), dtype = tolerance(precision, 1), PRECISIONS[precision][0]
        for name, function in functions.items():
            generator = torch.Generator(bench.device).manual_seed(4)
            given = [torch.randn(s, generator=generator, device=bench.device, dtype=dtype) for s in shapes[name]]
            results = []
            for fuse in (True, False):
                out = function(fuse, given[0].requires_grad_(), *given[1:])
                results.append((out.detach(), *torch.autograd.grad(out, given[0], out.detach().cos())))
            for part, mine, theirs in zip(("values", "gradient"), *results, strict=True):
                findings.check(f"{precision}: {name}: {part}", error(mine, theirs.cpu()), at_most=limit, why=why)


def export(findings: Findings, bench: Bench) -> None:
    ref, spec, out = stored(bench.scratch), bench.spec(True), bench.scratch / "export"
    seconds = bench.seconds(
        lambda: export_hf(bench.folder(True), (spec, bench.policy(True)), out, gates="embed", dtype="float32")
    )
    findings.figure("written in", seconds, "s")
    tokens = sequences(ref.rollouts)
    depths = torch.full_like(tokens, spec.num_layers)
    for row, rollout in enumerate(ref.rollouts):
        depths[row, PREDICTING] = torch.as_tensor(rollout.exit_depths)
    for precision in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=PRECISIONS[precision][0])
        model = model.to(bench.device).eval()
        with torch.inference_mode():
            logits = model(tokens.to(bench.device), exit_depths=depths.to(bench.device)).logits
        limit, why = tolerance(precision, spec.num_layers)
        found = logits[:, PREDICTING].float()
        findings.check(f"{precision}: logits", error(found, ref.logits), at_most=limit, why=why)
    prompt = tokens[:, :PROMPT].to(bench.device)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, exit_policy={"kind": "sample"}, pad_token_id=0
    )
    assert model.last_exit_depths is not None
    strange = set(model.last_exit_depths.flatten().tolist()) - {*spec.exit_depths, spec.num_layers}
    findings.check("generate: depths that are no exits", len(strange), at_most=0)
