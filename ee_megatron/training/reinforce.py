"""Stage 2: reinforcement learning.

for each step:
    rollouts <- K free answers per prompt under the current weights     (pool; tokens, exits and both log-probabilities)
    r_task   <- verifier
    R = r_task - beta * mean(log pi - log pi_ref) - lambda * mean(depth / L)
    A <- leave-one-out within the prompt's group
    loss = - ratio * A * ( mean log pi(token) + mean log q(exit) )       (learner, under the SAME exits)
    update adapters and gates, once or in several epochs and minibatches; send them to the pool

Every objective here is linear in the log-probabilities once its ratios are known, so an update scores first and then
minimises a weighted likelihood with the same gradient (`weigh`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.schema import RLConfig, RunConfig
from ..learner.batch import ReplayBatch, mean_weights, pack, spread
from ..learner.learner import Learner, Scores, Update
from ..policy import WeightSet, load_policy
from ..types import Group
from .advantages import ADVANTAGES
from .losses import (
    clipped,
    depth_cost,
    k3_slope,
    learning_rate,
    mean_log_ratio,
    price,
    rollout_reward,
    token_depth_advantage,
    truncated_ratio,
)
from .rollout_source import make_source
from .session import Session


def reinforce(cfg: RunConfig, model_path: Path, start: Path) -> None:
    """Run or resume the stage from the policy checkpoint `start`; its last checkpoint is the reinforced policy."""
    rl = cfg.rl
    with Session(cfg, "rl", model_path, learner=True) as session:
        done, checkpoint = session.latest()
        spec, policy = load_policy(checkpoint or start)
        if spec != session.spec:
            raise ValueError(
                f"{start}: made with {spec}, the configuration says {session.spec}; give the same exits and adapter"
            )
        if checkpoint is None:
            policy = sharpened(policy, rl.gate_centre, rl.gate_sharpness)
        learner = session.make_learner(policy, temperature=rl.temperature)
        if checkpoint:
            session.resume(learner, checkpoint)
        source = make_source(session) if session.leads else None
        session.open_metrics(resume_step=done)
        with session.progress(rl.steps, done) as bar:
            for step in range(done, rl.steps):
                session.stop_if_asked(learner, step)
                begun = time.monotonic()
                weights = WeightSet(step + 1, learner.export_policy())
                groups = session.unless_stopped(source.act if source else None, weights, step, bar.detail)
                if groups is None:
                    session.stop(learner, step)
                rolled = time.monotonic()
                values, timings = learn(session, learner, groups, step)
                if source is not None:
                    values |= source.health()
                timings |= {
                    "seconds_rollout": rolled - begun,
                    "tokens_per_s": values["tokens"] / (time.monotonic() - begun),
                }
                session.log(step + 1, values, timings)
                bar.advance(1, reward=values["reward"], accuracy=values["accuracy"], depth=values["mean_depth"])
                if (step + 1) % rl.checkpoint_every == 0 or step + 1 == rl.steps:
                    session.save(learner, step + 1, value=values["reward"])
        session.finish()


def sharpened(policy: dict[str, Tensor], centre: float, sharpness: float) -> dict[str, Tensor]:
    """The policy with gate logits sharpness * (z - logit(centre)). Exits sampled from calibrated hazards are far worse
    than the same gates under a high threshold; so RL may start at that threshold, in a policy it can still explore."""
    shift = math.log(centre / (1 - centre))
    moved = {name: tensor * sharpness for name, tensor in policy.items() if name.endswith("fc2.weight")}
    moved |= {name: (tensor - shift) * sharpness for name, tensor in policy.items() if name.endswith("fc2.bias")}
    return {**policy, **moved}


def learn(
    session: Session, learner: Learner, groups: list[Group], step: int
) -> tuple[dict[str, float], dict[str, float]]:
    """All updates on one step's rollouts -> (metrics, seconds). Every rank calls it with the same groups."""
    rl, layers = session.cfg.rl, session.spec.num_layers
    clock = [time.monotonic()]
    batch = replay(groups, layers)
    first, reference = learner.score(batch), learner.score(batch, reference=True)
    clock.append(time.monotonic())
    signal, values = Signal.of(batch, groups, first, reference, rl, layers, step)
    kept = [i for i, group in enumerate(groups) if not rl.drop_equal_groups or np.ptp(group.rewards) > 0]
    updates: list[Update] = []
    clipped_share: list[float] = []
    kls: list[float] = []
    for epoch in range(rl.epochs):
        order = np.random.default_rng([rl.seed, step, epoch]).permutation(kept) if rl.minibatches > 1 else kept
        for chosen in np.array_split(order, min(rl.minibatches, len(kept))) if kept else ():
            rows = torch.tensor([g * rl.group_size + k for g in chosen for k in range(rl.group_size)])
            part = batch.select(rows)
            now = select(first, rows) if not updates else learner.score(part)
            clipped_share.append(weigh(part, signal.select(rows), now, rl))
            rate = learning_rate(
                step * rl.epochs * rl.minibatches + len(updates),
                rl.steps * rl.epochs * rl.minibatches,
                rl.warmup,
                rl.decay,
            )
            update = learner.step(
                part, adapter_lr=rl.adapter_lr * rate, gate_lr=rl.gate_lr * rate, objective="likelihood"
            )
            session.guard(update, part, step + 1)
            updates.append(update)
            if rl.kl == "exact":
                kls.append(float(update.scores.kl[part.counts].mean()))
    clock.append(time.monotonic())
    if kls:
        values["kl_exact"] = float(np.mean(kls))
    for name in ("body", "gates", "all"):
        values["grad_norm" if name == "all" else f"grad_norm/{name}"] = float(
            np.mean([u.norms[name] for u in updates]) if updates else 0.0
        )
    values |= {
        "updates": float(sum(u.applied for u in updates)),
        "updates_left_out": float(sum(not u.applied for u in updates)),
        "groups_dropped": float(len(groups) - len(kept)),
        "clipped": float(np.mean(clipped_share)) if clipped_share else 0.0,
    }
    return values, {"seconds_score": clock[1] - clock[0], "seconds_update": clock[2] - clock[1]}


def replay(groups: list[Group], num_layers: int) -> ReplayBatch:
    rollouts = [r for g in groups for r in g.rollouts]
    return pack(
        [r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts], [r.exit_depths for r in rollouts], num_layers
    )


@dataclass
class Signal:
    """What a step's rollouts teach, the same for all updates on them; fp32 [B, S] each.

    advantage; trust: truncated importance ratio of the policy at the start of the step to the one that sampled;
    start: its log-probability of token and exit; reference: the reference's of the token.
    """

    advantage: Tensor
    trust: Tensor
    start: Tensor
    reference: Tensor

    def select(self, rows: Tensor) -> Signal:
        return Signal(self.advantage[rows], self.trust[rows], self.start[rows], self.reference[rows])

    @staticmethod
    def of(
        batch: ReplayBatch,
        groups: list[Group],
        first: Scores,
        reference: Scores,
        rl: RLConfig,
        num_layers: int,
        step: int,
    ) -> tuple[Signal, dict[str, float]]:
        """The signal, and what was seen on the way."""
        rollouts = [r for g in groups for r in g.rollouts]
        task = torch.from_numpy(np.concatenate([g.rewards for g in groups]))
        log_ratio = mean_log_ratio(batch, first.token_logprobs, reference.token_logprobs)
        cost = depth_cost(batch, num_layers, rl.depth_cost, rl.cost_length)
        lambda_now = price(step, rl.steps, rl.lambda_exit, rl.lambda_warmup)
        reward = rollout_reward(task, log_ratio, cost, rl.beta if rl.kl == "reward" else 0.0, lambda_now)
        credited = reward if rl.depth_credit == "sequence" else reward + lambda_now * cost
        per_answer = ADVANTAGES[rl.advantage](credited.numpy().reshape(len(groups), -1)).reshape(-1)
        advantage = torch.from_numpy(per_answer).float().unsqueeze(1) * batch.counts
        if rl.depth_credit == "token":
            advantage = advantage + lambda_now * token_depth_advantage(
                batch, rl.group_size, num_layers, rl.depth_cost, rl.cost_length
            )
        old_tokens = spread(batch, [r.token_logprobs for r in rollouts])
        old_exits = spread(batch, [r.exit_logprobs for r in rollouts])
        start = first.token_logprobs + first.exit_logprobs
        raw, trust = truncated_ratio(start, old_tokens + old_exits, rl.importance_cap)
        counts = batch.counts
        values = {
            "reward": float(reward.mean()),
            "task_reward": float(task.mean()),
            "depth_cost": float(cost.mean()),
            "lambda": lambda_now,
            "kl_to_reference": float(log_ratio.mean()),
            "advantage_spread": float(per_answer.std()),
            "token_mismatch": float((first.token_logprobs - old_tokens)[counts].abs().mean()),
            "exit_mismatch": float((first.exit_logprobs - old_exits)[counts].abs().mean()),
            "importance_ratio_mean": float(raw[counts].mean()),
            "importance_ratio_max": float(raw[counts].max()),
            "token_entropy": float(first.token_entropy[counts].mean()),
            "exit_entropy": float(first.exit_entropy[counts].mean()),
        }
        return Signal(advantage, trust, start, reference.token_logprobs), values | seen(batch, groups, num_layers)


def seen(batch: ReplayBatch, groups: list[Group], num_layers: int) -> dict[str, float]:
    """Metrics of the rollouts as they are."""
    counts, lengths = batch.counts, batch.counts.sum(1).float()
    fraction = batch.depths.float()[counts] / num_layers
    depths, hits = torch.unique(batch.depths[counts], return_counts=True)
    low, middle, high = torch.quantile(fraction, torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {
        "accuracy": float(np.mean(np.concatenate([g.correct for g in groups]))),
        "well_formed": float(np.mean(np.concatenate([g.well_formed for g in groups]))),
        "finished": float(np.mean([r.finished for g in groups for r in g.rollouts])),
        "mean_depth": float(fraction.mean()),
        "depth_q10": low,
        "depth_q50": middle,
        "depth_q90": high,
        "total_depth": float((batch.depths * counts).sum(1).float().mean()),
        "length": float(lengths.mean()),
        "prompt_length": float(np.mean([len(r.prompt_tokens) for g in groups for r in g.rollouts])),
        "tokens": float(lengths.sum()),
    } | {f"exit_share/{int(d)}": float(h) / int(counts.sum()) for d, h in zip(depths, hits, strict=True)}


def weigh(batch: ReplayBatch, signal: Signal, now: Scores, rl: RLConfig) -> float:
    """Set the batch's weights so that the linear loss has the objective's gradient at the current policy; returns the
    share of positions that PPO's clipping leaves out."""
    ratio = (now.token_logprobs + now.exit_logprobs - signal.start).exp()
    kept = clipped(ratio, signal.advantage, rl.clip)
    scale = signal.advantage * signal.trust * kept
    per_token = mean_weights(batch, batch.counts)
    batch.token_weight = scale * per_token
    if rl.kl == "loss":
        batch.token_weight = batch.token_weight - rl.beta * per_token * k3_slope(now.token_logprobs, signal.reference)
    if rl.kl == "exact":
        batch.kl_weight = rl.beta * per_token
    batch.exit_weight = scale * mean_weights(batch, batch.asked)
    batch.entropy_weight = rl.entropy_bonus * mean_weights(batch, batch.asked) if rl.entropy_bonus else None
    return float((kept == 0)[batch.counts].float().mean())


def select(scores: Scores, rows: Tensor) -> Scores:
    return Scores(**{field.name: getattr(scores, field.name)[rows] for field in fields(scores)})
