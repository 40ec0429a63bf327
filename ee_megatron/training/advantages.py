"""Computes an advantage for every token and exit from a step's rollouts, rewards and scores (method.md, stage 2).

Shapes: B answers, S positions, M exits. Answers of one prompt are neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config.derive import exits_read
from ..config.schema import RLConfig
from ..exits import ExitLayout
from ..learner.batch import ReplayBatch, pack, spread
from ..learner.learner import Scores
from ..learner.packing import PackingStats
from ..objectives.advantages import ADVANTAGES, CHARGES, length_cost, mean_log_ratio
from ..objectives.depth import DEPTH_COSTS, hazard_costs, token_advantage
from ..objectives.policy_gradient import IMPORTANCE, KL_TERMS, RATIOS, Experience
from ..types import ExitReading, Group, Rollout


@dataclass(frozen=True)
class StepScores:
    """Scores computed before a step's first update.

    policy: of the policy at the start of the step; None if the rollouts' own suffice. reference: the
    reference's log-probabilities of the tokens, float32 [B, S]; None if the objective doesn't need them. packing: of
    the pass that computed them; None if there was none.
    """

    policy: Scores | None = None
    reference: Tensor | None = None
    packing: PackingStats | None = None


@dataclass(frozen=True)
class Advantages:
    """Advantages of a step's rollouts, the same for all updates, and the quantities that they are computed from.

    experience: the loss's inputs. Per answer, [B]: task_reward and reward float32 (the latter less the penalties),
    depth_cost float32 (not yet multiplied by lambda), advantage float32 (of task and depth together), penalized bool
    (pays for depth and length), loss_included bool; kl float32, the k1 estimate of the divergence from the reference,
    None if that wasn't scored. log_importance float32 [B, S]: log ratio of learner to rollout, tokens plus exits.
    """

    experience: Experience
    task_reward: Tensor
    reward: Tensor
    depth_cost: Tensor
    advantage: Tensor
    penalized: Tensor
    loss_included: Tensor
    kl: Tensor | None
    log_importance: Tensor


def collate(groups: Sequence[Group], num_layers: int, first_token: bool = False, *, gates: bool = True) -> ReplayBatch:
    """Pad the rollouts of all groups into one batch, with their exits. Without `gates` the exits were prescribed, so no
    gate is trained. first_token as in `ExitLayout`."""
    rollouts = rollouts_of(groups)
    prompts, answers = [r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts]
    batch = pack(prompts, answers, [r.exit_depths for r in rollouts], num_layers, first_token)
    return batch if gates else replace(batch, gate_mask=batch.gate_mask & False)


def rollouts_of(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def loss_included(groups: Sequence[Group], rl: RLConfig) -> Tensor:
    """Which answers enter the loss, bool [B]: with rl.loss.overlong=filter those that were not cut off."""
    finished = torch.tensor([rollout.finished for rollout in rollouts_of(groups)])
    return finished if rl.loss.overlong == "filter" else finished | True


def filter_groups(groups: Sequence[Group], rl: RLConfig, lambda_depth: float) -> list[int]:
    """Indices of the groups that enter the loss. With rl.loss.drop_equal_groups those whose answers differ in reward,
    or with right answers that may still become shallower."""
    if not rl.loss.drop_equal_groups:
        return list(range(len(groups)))
    return [i for i, g in enumerate(groups) if np.ptp(g.rewards) > 0 or (lambda_depth > 0 and g.correct.any())]


def behavior_logprobs(batch: ReplayBatch, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and exits under the policy that sampled them, float32 [B, S] each. An exit that no
    gate decided has log-probability 0."""
    tokens = spread(batch, [rollout.token_logprobs for rollout in rollouts])
    exits = spread(batch, [rollout.exit_logprobs for rollout in rollouts])
    return tokens, exits.where(batch.gate_mask, 0.0)


def firing_costs(
    batch: ReplayBatch, rollouts: Sequence[Rollout], scores: StepScores, rl: RLConfig, layout: ExitLayout, price: Tensor
) -> Tensor:
    """Cost of exiting at each gate less that of continuing, in depth and divergence of its own decision, float32 [B, S,
    M] (objectives/depth.py). price: lambda for answers that pay for depth, 0 for others, float32 [B]."""
    credit, policy, penalty = rl.exit_credit, scores.policy, rl.depth_penalty
    assert credit is not None
    # The loss divides by an answer's tokens; costs are per answer.
    lengths = batch.loss_mask.sum(1).clamp(min=1)
    outcomes = DEPTH_COSTS[penalty.cost].of_outcomes(batch, layout, penalty.cost_tokens)
    divergences = hazards = None
    weight = rl.kl_penalty.weight * credit.kl_weight
    if weight and credit.divergence == "all":
        # Of all outcomes up to the one taken, [B, S, M + 1]; below only of the one taken, [B, S].
        divergences = weight * spread(batch, [_reading(rollout).divergences for rollout in rollouts])
    elif weight and policy is not None:
        divergences = weight * (policy.kl if scores.reference is None else policy.token_logprobs - scores.reference)
    if exits_read(rl):
        hazards = spread(batch, [_reading(rollout).hazards for rollout in rollouts])
    elif policy is not None:
        hazards = policy.hazards
    return hazard_costs(batch, layout, outcomes * (price * lengths)[:, None, None], divergences, hazards)


def _reading(rollout: Rollout) -> ExitReading:
    if rollout.exits is None:
        raise ValueError(f"{rollout.prompt_id}: its exits are not scored; call `read_exits` of the pool first")
    return rollout.exits


def compute_advantages(
    batch: ReplayBatch,
    groups: Sequence[Group],
    scores: StepScores,
    rl: RLConfig,
    layout: ExitLayout,
    *,
    lambda_depth: float,
) -> Advantages:
    """Compute advantages of the rollouts in `batch` (`collate` of `groups`) under a depth penalty `lambda_depth`."""
    rollouts, counts = rollouts_of(groups), batch.loss_mask
    behavior = behavior_logprobs(batch, rollouts)
    # Log-probabilities under the policy at the start of the step.
    proximal = behavior
    if scores.policy is not None:
        proximal = scores.policy.token_logprobs, scores.policy.exit_logprobs

    def within_groups(values: Tensor, included: Tensor) -> Tensor:
        grouped = [x.numpy().reshape(len(groups), -1) for x in (values, included)]
        return torch.from_numpy(ADVANTAGES[rl.loss.advantage](*grouped)).float().reshape(-1)

    included, penalty = loss_included(groups, rl), rl.depth_penalty
    penalized = CHARGES[penalty.penalize](torch.from_numpy(np.concatenate([g.correct for g in groups]))) & included
    task_reward = torch.from_numpy(np.concatenate([g.rewards for g in groups])).float()
    worth = task_reward - penalty.length_weight * length_cost(batch, penalty.cost_tokens) * penalized
    kl = None if scores.reference is None else mean_log_ratio(batch, proximal[0], scores.reference)
    if KL_TERMS[rl.kl_penalty.kind].in_reward and kl is not None:
        worth = worth - rl.kl_penalty.weight * kl * (counts.sum(1) if rl.kl_penalty.kind == "reward_sum" else 1)
    depth_cost = DEPTH_COSTS[penalty.cost].of_answers(batch, layout.num_layers, penalty.cost_tokens)
    task, depth = within_groups(worth, included), lambda_depth * within_groups(-depth_cost, penalized)

    # Tokens and exits share their answer's advantage, as in the paper, unless rl.credit says otherwise.
    per_token = per_exit = (task + depth).unsqueeze(1)
    firing = None
    if rl.credit == "token":
        # Each pays for its own depth and that of later tokens.
        to_go = DEPTH_COSTS[penalty.cost].to_go(batch, layout.num_layers, penalty.cost_tokens)
        per_token = per_exit = task.unsqueeze(1) + lambda_depth * token_advantage(
            batch, to_go, penalized, rl.group_size
        )
    elif rl.credit == "exit":
        assert rl.exit_credit is not None
        per_exit = (rl.exit_credit.task_weight * task).unsqueeze(1)
        firing = firing_costs(batch, rollouts, scores, rl, layout, lambda_depth * penalized.float())
    moved = [start - sampled for start, sampled in zip(proximal, behavior, strict=True)]
    ratios = [log_ratio.exp() for log_ratio in RATIOS[rl.loss.ratios](*moved)]
    if weighted := rl.loss.importance:
        importance = [IMPORTANCE[weighted.kind](ratio, weighted.low, weighted.high) for ratio in ratios]
    else:
        importance = [ratio * 0 + 1 for ratio in ratios]
    return Advantages(
        experience=Experience(
            token_advantage=per_token * counts,
            exit_advantage=per_exit * counts,
            token_importance=importance[0],
            exit_importance=importance[1],
            old_tokens=proximal[0],
            old_exits=proximal[1],
            reference_logprobs=scores.reference,
            firing_cost=firing,
        ),
        task_reward=task_reward,
        reward=worth - lambda_depth * depth_cost * penalized,
        depth_cost=depth_cost,
        advantage=task + depth,
        penalized=penalized,
        loss_included=included,
        kl=kl,
        log_importance=moved[0] + moved[1],
    )
