"""What a step's rollouts teach: from verdicts, depths and scores to an advantage for every token and exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..config.derive import exits_read
from ..config.schema import RLConfig
from ..exits import ExitLayout
from ..learner.batch import ReplayBatch, pack, spread
from ..learner.learner import Scores
from ..objectives.advantages import ADVANTAGES, CHARGES, length_cost, mean_log_ratio
from ..objectives.depth import CREDITS, DEPTH_COSTS, token_advantage
from ..objectives.exit_credit import hazard_costs
from ..objectives.policy_gradient import IMPORTANCE, KL_TERMS, RATIOS, Clip, Experience, PolicyGradient
from ..types import ExitReading, Group, Rollout


def objective_of(rl: RLConfig, longest: int) -> PolicyGradient:
    """`longest`: generated tokens that an answer may have."""
    clip = Clip(rl.loss.clip, rl.loss.clip_high or rl.loss.clip)
    kl, loss = rl.kl_penalty, rl.loss
    return PolicyGradient(KL_TERMS[kl.kind], clip, kl.weight, loss.ratios, loss.average, longest)


def replay(groups: Sequence[Group], num_layers: int, first_token: bool = False, *, gates: bool = True) -> ReplayBatch:
    """The rollouts of all groups, under the exits that they took; without `gates` they were told where to leave.
    first_token as in `ExitLayout`."""
    rollouts = [r for g in groups for r in g.rollouts]
    prompts, answers = [r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts]
    batch = pack(prompts, answers, [r.exit_depths for r in rollouts], num_layers, first_token)
    return batch if gates else replace(batch, asked=batch.asked & False)


def taught(groups: Sequence[Group], rl: RLConfig) -> Tensor:
    """Which answers count, bool [B]: with rl.loss.overlong=filter those that ended by themselves."""
    finished = torch.tensor([r.finished for g in groups for r in g.rollouts])
    return finished if rl.loss.overlong == "filter" else finished | True


def credit(
    batch: ReplayBatch,
    groups: Sequence[Group],
    first: Scores | None,
    reference: Tensor | None,
    rl: RLConfig,
    layout: ExitLayout,
    *,
    price: float,
    longest: int,
) -> tuple[Experience, dict[str, float]]:
    """What the rollouts teach at a price of depth `price`, and metrics of it.

    `first`: scores of the policy at the start of the step, where an exit answers for itself with the divergences and
    hazards that the pool has not read; None: those that the rollouts brought along hold. `reference`: its
    log-probabilities of the tokens, where the objective asks for them.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    counts, counted = batch.counts, taught(groups, rl)
    old = list(_made(batch, rollouts))
    start = old if first is None else [first.token_logprobs, first.exit_logprobs]

    def among(values: Tensor, which: Tensor) -> Tensor:
        """Advantages within the groups, float32 [B]."""
        grouped = [x.numpy().reshape(len(groups), -1) for x in (values, which)]
        return torch.from_numpy(ADVANTAGES[rl.loss.advantage](*grouped)).float().reshape(-1)

    charged = (
        CHARGES[rl.depth_penalty.penalize](torch.from_numpy(np.concatenate([g.correct for g in groups]))) & counted
    )
    task = torch.from_numpy(np.concatenate([g.rewards for g in groups])).float()
    worth = task - rl.depth_penalty.length_weight * length_cost(batch, rl.depth_penalty.cost_tokens) * charged
    log_ratio = None if reference is None else mean_log_ratio(batch, start[0], reference)
    if KL_TERMS[rl.kl_penalty.kind].in_reward and log_ratio is not None:
        worth = worth - rl.kl_penalty.weight * log_ratio * (counts.sum(1) if rl.kl_penalty.sum else 1)
    kind, how = DEPTH_COSTS[rl.depth_penalty.cost], CREDITS[rl.credit]
    cost = kind.of_answers(batch, layout.num_layers, rl.depth_penalty.cost_tokens)
    by_task, by_depth = among(worth, counted), price * among(-cost, charged)

    of_tokens, of_exits, hazard = by_task + by_depth, by_task + by_depth, None
    if how.to_go:
        to_go = kind.to_go(batch, layout.num_layers, rl.depth_penalty.cost_tokens)
        from_there = price * token_advantage(batch, to_go, charged, rl.group_size)
        of_tokens = of_exits = by_task.unsqueeze(1) + from_there
    elif rl.exit_credit is not None:
        of_tokens, of_exits = by_task + by_depth, rl.exit_credit.task_weight * by_task
        divergence = _divergences(batch, rollouts, first, reference, rl)
        costs = _depth_costs(batch, layout, rl, price * charged.float())
        hazard = hazard_costs(batch, layout, costs, divergence, _hazards(batch, rollouts, first, rl))
    of_tokens, of_exits = ((a if a.dim() == 2 else a.unsqueeze(1)) * counts for a in (of_tokens, of_exits))

    moved = [now - then for now, then in zip(start, old, strict=True)]
    raw = [ratio.exp() for ratio in RATIOS[rl.loss.ratios](*moved)]
    if weighed := rl.loss.importance:
        importance = [IMPORTANCE[weighed.kind](ratio, weighed.low, weighed.high) for ratio in raw]
    else:
        importance = [ratio * 0 + 1 for ratio in raw]
    experience = Experience(of_tokens, of_exits, importance[0], importance[1], start[0], start[1], reference, hazard)
    together = (moved[0] + moved[1]).exp()[counts]
    values = {
        "reward": float((worth - price * cost * charged).mean()),
        "task_reward": float(task.mean()),
        "depth_cost": float(cost.mean()),
        "lambda": price,
        "advantage_spread": float((by_task + by_depth).std(unbiased=False)),
        "charged": float(charged.float().mean()),
        "filtered": float((~counted).float().mean()),
        "importance_ratio_mean": float(together.mean()),
        "importance_ratio_max": float(together.max()),
        "importance_left_out": float(((importance[0] == 0) | (importance[1] == 0))[counts].float().mean()),
    }
    if log_ratio is not None:
        values["kl_to_reference"] = float(log_ratio.mean())
    return experience, values


def _depth_costs(batch: ReplayBatch, layout: ExitLayout, rl: RLConfig, price: Tensor) -> Tensor:
    """What the depth of each outcome costs at a price [B], [B, S, M + 1]. Weights of the loss divide by an answer's
    tokens; a cost is an answer's."""
    lengths = batch.counts.sum(1).clamp(min=1)
    return (
        DEPTH_COSTS[rl.depth_penalty.cost].of_outcomes(batch, layout, rl.depth_penalty.cost_tokens)
        * (price * lengths)[:, None, None]
    )


def _divergences(
    batch: ReplayBatch, rollouts: Sequence[Rollout], first: Scores | None, reference: Tensor | None, rl: RLConfig
) -> Tensor | None:
    """The KL penalty's weight and rl.exit_credit.kl_weight times the divergence, of the outcome taken [B, S] or, where
    every exit was read, of all up to it [B, S, M + 1]; None where it costs nothing or nobody knows it."""
    if rl.exit_credit is None:
        return None
    weight = rl.kl_penalty.weight * rl.exit_credit.kl_weight
    if weight and rl.exit_credit.divergence == "all":
        return weight * spread(batch, [_exits(r).divergences for r in rollouts])
    if weight and first is not None:
        return weight * (first.kl if reference is None else first.token_logprobs - reference)
    return None


def _hazards(batch: ReplayBatch, rollouts: Sequence[Rollout], first: Scores | None, rl: RLConfig) -> Tensor | None:
    """Of the gates that positions came by, [B, S, M]; None where nobody knows them."""
    if exits_read(rl):
        return spread(batch, [_exits(r).hazards for r in rollouts])
    return None if first is None else first.hazards


def _exits(rollout: Rollout) -> ExitReading:
    if rollout.exits is None:
        raise ValueError(f"{rollout.prompt_id}: a rollout whose exits the pool has not read; read them first")
    return rollout.exits


def entropies(batch: ReplayBatch, seen: Scores) -> dict[str, float]:
    """Means over generated tokens, nats: of the next token's distribution and of the gates."""
    return {
        "token_entropy": float(seen.token_entropy[batch.counts].mean()),
        "exit_entropy": float(seen.exit_entropy[batch.counts].mean()),
    }


def mismatch(batch: ReplayBatch, rollouts: Sequence[Rollout], seen: Scores) -> dict[str, float]:
    """How far the learner's log-probabilities of tokens and exits are from the rollouts', nats, mean of absolutes."""
    tokens, exits = _made(batch, rollouts)
    pairs = {"token": (seen.token_logprobs, tokens), "exit": (seen.exit_logprobs, exits)}
    return {
        f"{what}_mismatch": float((scored - made)[batch.counts].abs().mean()) for what, (scored, made) in pairs.items()
    }


def _made(batch: ReplayBatch, rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and exits under which the rollouts were made, [B, S]. An exit that no gate was asked
    for was certain, whatever the gates say of it."""
    tokens, exits = (
        spread(batch, [getattr(r, name) for r in rollouts]) for name in ("token_logprobs", "exit_logprobs")
    )
    return tokens, exits.where(batch.asked, 0.0)


def rollout_metrics(batch: ReplayBatch, groups: Sequence[Group], num_layers: int) -> dict[str, float]:
    """Metrics of the rollouts as they are."""
    counts, lengths = batch.counts, batch.counts.sum(1).float()
    fraction = batch.exit_depths.float()[counts] / num_layers
    depths, hits = torch.unique(batch.exit_depths[counts], return_counts=True)
    low, middle, high = torch.quantile(fraction, torch.tensor([0.1, 0.5, 0.9])).tolist()
    largest = DEPTH_COSTS["max"].of_answers(batch, num_layers, 1)
    return {
        "accuracy": float(np.mean(np.concatenate([g.correct for g in groups]))),
        "well_formed": float(np.mean(np.concatenate([g.well_formed for g in groups]))),
        "finished": float(np.mean([r.finished for g in groups for r in g.rollouts])),
        "mean_depth": float(fraction.mean()),
        "depth_q10": low,
        "depth_q50": middle,
        "depth_q90": high,
        "max_depth": float(largest.mean()),
        "total_depth": float((batch.exit_depths * counts).sum(1).float().mean()),
        "length": float(lengths.mean()),
        "prompt_length": float(np.mean([len(r.prompt_tokens) for g in groups for r in g.rollouts])),
        "tokens": float(lengths.sum()),
    } | {f"exit_share/{int(d)}": float(h) / int(counts.sum()) for d, h in zip(depths, hits, strict=True)}
