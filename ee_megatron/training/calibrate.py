"""Stage 1b: calibrate adapters and gates by self-distillation.

for each update:
    traces <- teacher's answers with the divergence of every exit
    target hazards s* = 1 - tanh(c d / 2); exits <- drawn by stick-breaking, later by the student's own gates
    loss = mean KL(student at these exits, teacher)  +  mean -log q(exits)
    update adapters and gates
scale the adapters' change by `wise_ft_alpha`; some more updates of the gates alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.schema import CalibrateConfig, RunConfig
from ..exits import ExitLayout, exit_distribution, sample_exits, target_hazards
from ..learner.batch import ReplayBatch, pack, spread
from ..learner.learner import Learner
from ..objectives.distillation import GATE_TARGETS, Distillation
from ..objectives.divergences import TEACHERS
from ..objectives.schedules import schedule
from ..objectives.weights import Weights, mean_weights
from ..policy import change_share
from ..tensors import Block, ChangedStream, Stream, part_of
from ..types import Trace
from .context import StageContext
from .serialization import load_traces


@dataclass(frozen=True)
class Item:
    """One sequence of one update: a trace, and the number of its exit pattern (which seeds the draw)."""

    trace: int
    pattern: int


@dataclass(frozen=True)
class UpdatePlan:
    """The items of every update. From update `student_from` on the student's gates draw the exit patterns; from
    `settle_from` on only gates are trained."""

    updates: list[list[Item]]
    student_from: int
    settle_from: int


def plan(count: int, c: CalibrateConfig) -> UpdatePlan:
    """Assign traces and exit patterns to updates: every trace S times per epoch, shuffled per epoch."""
    generator = np.random.default_rng(c.seed)
    total = round(c.epochs * count * c.exit_samples)
    items: list[Item] = []
    epoch = 0
    while len(items) < total:
        order = generator.permutation(count * c.exit_samples)
        items += [Item(int(i) % count, epoch * c.exit_samples + int(i) // count) for i in order]
        epoch += 1
    trained = total - round(c.gate_only_fraction * total)
    parts = items[:trained], items[trained:total]
    updates = [part[start : start + c.batch_size] for part in parts for start in range(0, len(part), c.batch_size)]
    return UpdatePlan(updates, len(updates) - round(c.student_patterns * len(updates)), -(-trained // c.batch_size))


def draw_exits(
    trace: Trace, item: Item, layout: ExitLayout, c: CalibrateConfig, hazards: torch.Tensor | None = None
) -> np.ndarray:
    """Exit depths [T] of one pattern: from the target distribution or, given the student's hazards [T, M], at the first
    that exceeds a threshold drawn from [0.5, 1); for the configured shares of patterns, uniform over all outcomes or
    without an exit. Token 0 exits only where it may. The same item and hazards always give the same pattern."""
    seed = np.random.SeedSequence([c.seed, item.trace, item.pattern]).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
    kind = float(torch.rand((), generator=generator))
    length, exits = trace.divergences.shape
    if kind < c.uniform_patterns:
        index = torch.randint(exits + 1, (length,), generator=generator)
    elif kind >= 1 - c.full_patterns:
        index = torch.full((length,), exits)
    elif hazards is not None:
        fires = hazards > 0.5 + 0.5 * torch.rand((), generator=generator)
        index = torch.where(fires.any(-1), fires.int().argmax(-1), exits)
    else:
        index = sample_exits(target_hazards(torch.from_numpy(trace.divergences), c.kl_factor), generator)
    depths = np.array(layout.outcomes, dtype=np.int32)[index.numpy()]
    if not layout.first_token:
        depths[:1] = layout.num_layers
    return depths


def make_batch(
    traces: list[Trace],
    items: list[Item],
    layout: ExitLayout,
    c: CalibrateConfig,
    hazards: Sequence[torch.Tensor | None] = (),
) -> ReplayBatch:
    """Pad the items of one update into a batch. `hazards` [T, M] per item: as in `draw_exits`."""
    chosen = [traces[item.trace] for item in items]
    known = hazards or [None] * len(items)
    depths = [draw_exits(t, item, layout, c, own) for t, item, own in zip(chosen, items, known, strict=True)]
    batch = _pack(chosen, depths, layout)
    return replace(
        batch,
        teacher_ids=spread(batch, [t.topk_ids.astype(np.int64) for t in chosen]),
        teacher_logprobs=spread(batch, [t.topk_logprobs for t in chosen]),
    )


def _pack(traces: Sequence[Trace], depths: Sequence[np.ndarray] | None, layout: ExitLayout) -> ReplayBatch:
    prompts, answers = [t.prompt_tokens for t in traces], [t.tokens for t in traces]
    return pack(prompts, answers, depths, layout.num_layers, layout.first_token)


def objective_of(c: CalibrateConfig) -> Distillation:
    return Distillation(TEACHERS[c.teacher], GATE_TARGETS[c.gate_targets], c.gate_weight, c.depth_power, c.kl_scale)


def make_weights(
    learner: Learner, objective: Distillation, batch: ReplayBatch, traces: list[Trace], kl_factor: float
) -> Weights:
    """Compute the objective's weights for a batch of `traces`; an objective that needs the student's divergences scores
    the batch first."""

    def target(divergence: torch.Tensor) -> torch.Tensor:
        return target_hazards(divergence, kl_factor)

    traced = spread(batch, [target(torch.from_numpy(t.divergences)).numpy() for t in traces])
    return objective.weights(
        batch, learner.spec.layout, traced, lambda: learner.score(batch, teacher=objective.teacher).kl, target
    )


def own_hazards(learner: Learner, traces: list[Trace], items: list[Item], layout: ExitLayout) -> list[torch.Tensor]:
    """The student's hazards [T, M] at every gate for each item, at full depth."""
    batch = _pack([traces[item.trace] for item in items], None, layout)
    hazards = learner.hazards(batch)
    return [hazards[row][batch.loss_mask[row]] for row in range(batch.rows)]


def target_depth(traces: list[Trace], layout: ExitLayout, kl_factor: float) -> float:
    """Expected depth / L under the target distribution, mean over tokens (the first of each answer at full depth,
    where it can't exit)."""
    depths = torch.tensor(layout.outcomes, dtype=torch.float32)
    total, tokens = 0.0, 0
    for trace in traces:
        expected = exit_distribution(target_hazards(torch.from_numpy(trace.divergences), kl_factor)) @ depths
        if not layout.first_token:
            expected[:1] = layout.num_layers
        total += float(expected.sum())
        tokens += len(trace.tokens)
    return total / tokens / layout.num_layers


def interpolated(policy: Stream, start: Mapping[str, torch.Tensor], alpha: float) -> Stream:
    """The policy with a share `alpha` of its body's change since `start`; gates are unchanged (WiSE-FT: Wortsman et al.
    2022, "Robust fine-tuning of zero-shot models", arXiv 2109.01903)."""

    def change(block: Block) -> torch.Tensor:
        share = change_share(block.name, alpha)
        if share == 1:
            return block.data
        begun = part_of(start, block.name, slice(block.first, block.first + len(block.data)))
        return torch.lerp(begun, block.data, share)

    return ChangedStream(policy, change)


def calibrate(cfg: RunConfig, model_path: Path, traces_path: Path) -> None:
    """Run or resume the stage; its last checkpoint is the calibrated policy."""
    c = cfg.calibrate
    traces = load_traces(traces_path)
    planned = plan(len(traces), c)
    updates = planned.updates
    with StageContext(cfg, "calibrate", model_path, learner=True) as context:
        done, checkpoint = context.checkpoints.latest()
        start = context.start(c.seed)
        begun = context.checkpoints.read_policy(checkpoint) if checkpoint else start
        options: dict[str, Any] = {"adapter_dropout": cfg.adapter.dropout, "kl_direction": c.kl_direction}
        learner = context.make_learner(begun, checkpoint, **options)
        layout = context.spec.layout
        objective = objective_of(c)
        context.open_metrics(resume_step=done)
        target = target_depth(traces, layout, c.kl_factor)
        with context.progress(len(updates), done) as bar:
            for step in range(done, len(updates)):
                context.stop_if_requested(learner, step)
                settled = step >= planned.settle_from
                if step == planned.settle_from and c.wise_ft_alpha < 1:
                    policy = learner.stream_policy(context.ranks.meet)
                    moved = interpolated(policy, start, c.wise_ft_alpha)
                    with context.checkpoints.on_disk(moved) as tensors:
                        # Two learners at once would not fit where one just does.
                        del learner
                        learner = context.make_learner(tensors, **options)
                students = step >= planned.student_from
                own = own_hazards(learner, traces, updates[step], layout) if students else ()
                batch = make_batch(traces, updates[step], layout, c, own)
                chosen = [traces[item.trace] for item in updates[step]]
                weights = make_weights(learner, objective, batch, chosen, c.kl_factor)
                adapter_lr = 0.0 if settled else c.adapter_lr * schedule(step, planned.settle_from)
                gate_lr = c.gate_lr * schedule(step, len(updates))
                update = learner.step(batch, weights, objective.teacher, adapter_lr=adapter_lr, gate_lr=gate_lr)
                context.check_finite(update, batch, weights, step + 1)
                scores = update.scores
                kl = float((scores.kl * mean_weights(batch, batch.loss_mask)).sum())
                nll = -float((scores.exit_logprobs * mean_weights(batch, batch.gate_mask)).sum())
                depth = float((batch.exit_depths * batch.loss_mask).sum() / batch.loss_mask.sum()) / layout.num_layers
                values = {"kl": kl, "gate_nll": nll, "pattern_depth": depth, "target_depth": target}
                values |= {"grad_norm": update.norms["all"], "learning_rate": adapter_lr}
                context.log(step + 1, values)
                bar.advance(1, kl=kl, gate_nll=nll, depth=depth)
                if (step + 1) % c.checkpoint_every == 0 or step + 1 == len(updates):
                    context.checkpoints.save(learner, step + 1)
        context.finish()
