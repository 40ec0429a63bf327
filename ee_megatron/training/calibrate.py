"""Stage 1, second half: calibration by self-distillation.

for each update:
    traces <- teacher's answers with the divergence of every exit
    target hazards s* = 1 - tanh(c d / 2); exits <- drawn by stick-breaking
    loss = mean KL(student at these exits, teacher)  +  mean -log q(exits)
    update adapters and gates
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config.schema import CalibrateConfig, RunConfig
from ..exits import ExitLayout, exit_distribution, sample_exits, target_hazards
from ..learner.batch import ReplayBatch, mean_weights, pack, spread
from ..policy import initial_policy, load_policy
from ..types import Trace
from .losses import schedule
from .session import Session
from .trace_store import load_traces


@dataclass(frozen=True)
class Item:
    """One sequence of one update: a trace, and the number of its pattern (which seeds the draw)."""

    trace: int
    pattern: int


def plan(count: int, c: CalibrateConfig) -> list[list[Item]]:
    """Which traces with which patterns make up each update: every trace S times per epoch, shuffled per epoch."""
    generator = np.random.default_rng(c.seed)
    items: list[Item] = []
    epoch = 0
    while len(items) < round(c.epochs * count * c.patterns):
        order = generator.permutation(count * c.patterns)
        items += [Item(int(i) % count, epoch * c.patterns + int(i) // count) for i in order]
        epoch += 1
    items = items[: round(c.epochs * count * c.patterns)]
    return [items[start : start + c.batch_size] for start in range(0, len(items), c.batch_size)]


def draw_exits(trace: Trace, item: Item, layout: ExitLayout, c: CalibrateConfig) -> np.ndarray:
    """Exit depths [T] of one pattern: from the target distribution, or, for the configured share of patterns, uniform
    over all outcomes. Token 0 never exits. The same item always draws the same pattern."""
    seed = np.random.SeedSequence([c.seed, item.trace, item.pattern]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    uniform = float(torch.rand((), generator=generator)) < c.uniform_patterns
    length, exits = trace.divergences.shape
    if uniform:
        index = torch.randint(exits + 1, (length,), generator=generator)
    else:
        index = sample_exits(target_hazards(torch.from_numpy(trace.divergences), c.kl_factor), generator)
    depths = np.array(layout.outcomes, dtype=np.int32)[index.numpy()]
    depths[:1] = layout.num_layers
    return depths


def make_batch(traces: list[Trace], items: list[Item], layout: ExitLayout, c: CalibrateConfig) -> ReplayBatch:
    chosen = [traces[item.trace] for item in items]
    depths = [draw_exits(trace, item, layout, c) for trace, item in zip(chosen, items, strict=True)]
    batch = pack([t.prompt_tokens for t in chosen], [t.tokens for t in chosen], depths, layout.num_layers)
    share = batch.depths.clamp(min=1).float() / layout.num_layers
    batch.token_weight = mean_weights(batch, batch.counts) * share**c.depth_power
    batch.exit_weight = c.gate_weight * mean_weights(batch, batch.asked)
    batch.teacher_ids = spread(batch, [t.topk_ids.astype(np.int64) for t in chosen])
    batch.teacher_logprobs = spread(batch, [t.topk_logprobs for t in chosen])
    if c.gate_targets == "soft":
        hazards = [target_hazards(torch.from_numpy(t.divergences), c.kl_factor).numpy() for t in chosen]
        batch.soft_targets = spread(batch, hazards)
    return batch


def current_targets(batch: ReplayBatch, kl: torch.Tensor, layout: ExitLayout, kl_factor: float) -> torch.Tensor:
    """Soft targets [B, S, M] from the student's own divergence kl [B, S] at the exits it was made to take: the target
    hazard at that exit's gate, -1 (no target) at all others."""
    hazard = target_hazards(kl, kl_factor).unsqueeze(-1)
    taken = batch.depths.unsqueeze(-1) == torch.tensor(layout.depths)
    return torch.where(taken & batch.asked.unsqueeze(-1), hazard, torch.tensor(-1.0))


def target_depth(traces: list[Trace], layout: ExitLayout, kl_factor: float) -> float:
    """Expected depth / L under the target distribution, mean over tokens (the first of each answer at full depth)."""
    depths = torch.tensor(layout.outcomes, dtype=torch.float32)
    total, tokens = 0.0, 0
    for trace in traces:
        q = exit_distribution(target_hazards(torch.from_numpy(trace.divergences), kl_factor))
        total += float((q[1:] @ depths).sum()) + layout.num_layers
        tokens += len(trace.tokens)
    return total / tokens / layout.num_layers


def calibrate(cfg: RunConfig, model_path: Path, traces_path: Path) -> None:
    """Run or resume the stage; its last checkpoint is the calibrated policy."""
    c = cfg.calibrate
    traces = load_traces(traces_path)
    updates = plan(len(traces), c)
    with Session(cfg, "calibrate", model_path, learner=True) as session:
        done, checkpoint = session.latest()
        start = initial_policy(session.source.dims, session.spec, c.seed, session.source.tensor)
        policy = load_policy(checkpoint)[1] if checkpoint else start
        learner = session.make_learner(policy, adapter_dropout=cfg.adapter.dropout, kl_direction=c.kl_direction)
        if checkpoint:
            session.resume(learner, checkpoint)
        layout = session.spec.layout
        objective = "distill" if c.teacher == "topk" else "distill_full"
        session.open_metrics(resume_step=done)
        target = target_depth(traces, layout, c.kl_factor)
        with session.progress(len(updates), done) as bar:
            for step in range(done, len(updates)):
                session.stop_if_asked(learner, step)
                batch = make_batch(traces, updates[step], layout, c)
                rate = schedule(step, len(updates), c.warmup)
                if c.gate_targets == "current":
                    seen = learner.score(batch, objective=objective)
                    batch.soft_targets = current_targets(batch, seen.kl, layout, c.kl_factor)
                update = learner.step(
                    batch, adapter_lr=c.adapter_lr * rate, gate_lr=c.gate_lr * rate, objective=objective
                )
                session.guard(update, batch, step + 1)
                scores = update.scores
                kl = float((scores.kl * mean_weights(batch, batch.counts)).sum())
                nll = -float((scores.exit_logprobs * mean_weights(batch, batch.asked)).sum())
                depth = float((batch.depths * batch.counts).sum() / batch.counts.sum()) / layout.num_layers
                values = {"kl": kl, "gate_nll": nll, "pattern_depth": depth, "target_depth": target}
                values |= {"grad_norm": update.norms["all"], "learning_rate": c.adapter_lr * rate}
                session.log(step + 1, values)
                bar.advance(1, kl=kl, gate_nll=nll, depth=depth)
                if (step + 1) % c.checkpoint_every == 0 or step + 1 == len(updates):
                    session.save(learner, step + 1)
        session.finish()
