"""The policy updates on one step's rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config.schema import RLConfig
from ..learner.batch import ReplayBatch
from ..learner.learner import Learner, PackedBatch, Scores, Update
from ..learner.packing import NOTHING_PACKED, PackingStats
from ..objectives.policy_gradient import KL_TERMS, Clip, PolicyGradient
from ..objectives.schedules import learning_rate
from ..objectives.weights import Weights
from ..types import Rollout
from .advantages import Advantages, behavior_logprobs


@dataclass
class UpdateResult:
    """Results of a step's updates. groups: those that entered the loss, by number; rows: their answers. clip_fraction,
    kl: of each update, the latter the exact divergence from the reference if the loss has one. logprob_diff: of the
    last update if the rollouts weren't scored before. packing: of the last update."""

    groups: list[int]
    rows: list[int]
    updates: list[Update] = field(default_factory=list)
    clip_fraction: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    logprob_diff: LogprobDiff | None = None
    packing: PackingStats = NOTHING_PACKED


@dataclass(frozen=True)
class LogprobDiff:
    """Mean absolute difference between the learner's log-probabilities and the rollouts', nats per generated token."""

    token: float
    exit: float

    @staticmethod
    def of(batch: ReplayBatch, rollouts: Sequence[Rollout], scores: Scores) -> LogprobDiff:
        tokens, exits = behavior_logprobs(batch, rollouts)
        differences = scores.token_logprobs - tokens, scores.exit_logprobs - exits
        return LogprobDiff(*(float(difference[batch.loss_mask].abs().mean()) for difference in differences))


def objective_of(rl: RLConfig, max_new_tokens: int) -> PolicyGradient:
    kl, loss = rl.kl_penalty, rl.loss
    clip = Clip(loss.clip, loss.clip_high or loss.clip)
    return PolicyGradient(KL_TERMS[kl.kind], clip, kl.weight, loss.ratios, loss.average, max_new_tokens)


def minibatches(rl: RLConfig, step: int, groups: Sequence[int], included: Tensor) -> Iterator[Tensor]:
    """Rows of the batch for each update of step `step`, int64 [n]: the answers of `groups` that enter the loss
    (`included`, bool [B]), shuffled by group if there are several minibatches."""
    order = np.array(groups)
    if rl.minibatches > 1:
        order = np.random.default_rng([rl.seed, step, 0]).permutation(groups)
    for part in np.array_split(order, min(rl.minibatches, len(groups))) if groups else ():
        rows = torch.tensor([g * rl.group_size + k for g in part for k in range(rl.group_size)])
        rows = rows[included[rows]]
        if len(rows):
            yield rows


def update(
    learner: Learner,
    packed: PackedBatch,
    rollouts: Sequence[Rollout],
    advantages: Advantages,
    groups: Sequence[int],
    objective: PolicyGradient,
    rl: RLConfig,
    step: int,
    *,
    scored: bool,
    check_finite: Callable[[Update, ReplayBatch, Weights, int], None],
) -> UpdateResult:
    """Update the policy on the answers of `groups`: rl.minibatches updates. Every rank calls it with the same
    arguments; `packed` holds the batch that the advantages belong to.

    `scored`: the rollouts were scored before. `check_finite` is called after every update; its exceptions end the step.
    """
    batch, included = packed.batch, advantages.loss_included
    rows_of = [row for g in groups for row in range(g * rl.group_size, (g + 1) * rl.group_size) if included[row]]
    result = UpdateResult(list(groups), rows_of)
    per_step = rl.minibatches
    for rows in minibatches(rl, step, groups, included):
        whole = rows.equal(torch.arange(batch.rows))
        part, experience = batch.select(rows), advantages.experience.select(rows)
        part_packed = packed if whole else learner.pack(part)
        tokens, exits = experience.old_tokens, experience.old_exits
        if result.updates:
            now = learner.score(part_packed)
            tokens, exits = now.token_logprobs, now.exit_logprobs
        weights, clip_fraction = objective.weights(part, experience, tokens, exits)
        rate = learning_rate(step * per_step + len(result.updates), rl.steps * per_step, 0, rl.decay)
        rates = {"adapter_lr": rl.adapter_lr * rate, "gate_lr": rl.gate_lr * rate}
        done = learner.step(part_packed, weights, objective.kl.teacher, **rates)
        check_finite(done, part, weights, step + 1)
        result.updates.append(done)
        result.clip_fraction.append(clip_fraction)
        result.packing = part_packed.stats
        if not scored:
            # The only update saw the policy that sampled the rollouts.
            result.logprob_diff = LogprobDiff.of(part, [rollouts[row] for row in rows], done.scores)
        if objective.kl.teacher is not None:
            result.kl.append(float(done.scores.kl[part.loss_mask].mean()))
    return result
