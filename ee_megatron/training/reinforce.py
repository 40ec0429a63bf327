"""Stage 2: reinforcement learning.

for each step:
    rollouts <- K free answers per prompt under the current weights     (pool; tokens, exits and both log-probabilities)
    r_task   <- verifier
    R = r_task - beta * mean(log pi - log pi_ref) - lambda * mean(depth / L)
    A <- leave-one-out within the prompt's group
    loss = - ratio * A * ( mean log pi(token) + mean log q(exit) )       (learner, under the SAME exits)
    update adapters and gates, once or in several epochs and minibatches; send them to the pool

Every objective here is linear in the log-probabilities once its ratios are known, so an update scores first and then
minimises a weighted likelihood with the same gradient (objectives/policy_gradient.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.schema import RLConfig, RunConfig
from ..learner.batch import ReplayBatch, pack, spread
from ..learner.learner import Learner, Scores, Update
from ..objectives.advantages import ADVANTAGES, DEPTH_CREDITS, depth_cost, mean_log_ratio, rollout_reward
from ..objectives.policy_gradient import KL_TERMS, SURROGATES, Experience, PolicyGradient, truncated_ratio
from ..objectives.schedules import learning_rate, price
from ..tensors import LayeredTensors, drain
from ..types import Group
from .costs import counted, speeds
from .rollout_source import make_source
from .session import Session


def reinforce(cfg: RunConfig, model_path: Path, start: Path) -> None:
    """Run or resume the stage from the policy checkpoint `start`; its last checkpoint is the reinforced policy."""
    rl = cfg.rl
    with Session(cfg, "rl", model_path, learner=True) as session:
        done, checkpoint = session.latest()
        spec, policy = session.read_policy(checkpoint or start, checked=checkpoint is not None)
        if spec != session.spec:
            raise ValueError(
                f"{start}: made with {spec}, the configuration says {session.spec}; give the same exits and adapter"
            )
        if checkpoint is None:
            policy = sharpened(policy, rl.gate_centre, rl.gate_sharpness)
        learner = session.make_learner(policy, checkpoint, temperature=rl.temperature)
        source = make_source(session) if session.leads else None
        session.open_metrics(resume_step=done)
        with session.progress(rl.steps, done) as bar:
            learner.progress = bar.detail
            for step in range(done, rl.steps):
                session.stop_if_asked(learner, step)
                begun = time.monotonic()
                stream, weights = learner.stream_policy(session.meet), None
                if source is not None:
                    weights = source.take(step + 1, stream)
                else:
                    drain(stream)
                groups = session.unless_stopped(source.act if source else None, weights, step, bar.detail)
                if groups is None:
                    session.stop(learner, step)
                values, seconds = learn(session, learner, groups, step)
                if source is not None:
                    values |= source.health()
                    seconds |= source.seconds
                seconds["step"] = time.monotonic() - begun
                timings = {f"seconds_{phase}": value for phase, value in seconds.items()}
                timings |= {"tokens_per_s": values["tokens"] / seconds["step"], **speeds(session, values, seconds)}
                session.log(step + 1, values, timings)
                bar.advance(1, reward=values["reward"], accuracy=values["accuracy"], depth=values["mean_depth"])
                if (step + 1) % rl.checkpoint_every == 0 or step + 1 == rl.steps:
                    session.save(learner, step + 1, value=values["reward"])
        session.finish()


def sharpened(policy: Mapping[str, Tensor], centre: float, sharpness: float) -> Mapping[str, Tensor]:
    """The policy with gate logits sharpness * (z - logit(centre)). Exits sampled from calibrated hazards are far worse
    than the same gates under a high threshold; so RL may start at that threshold, in a policy it can still explore."""
    shift = math.log(centre / (1 - centre))
    moved = {name: policy[name] * sharpness for name in policy if name.endswith("fc2.weight")}
    moved |= {name: (policy[name] - shift) * sharpness for name in policy if name.endswith("fc2.bias")}
    return LayeredTensors(moved, policy)


def learn(
    session: Session, learner: Learner, groups: list[Group], step: int
) -> tuple[dict[str, float], dict[str, float]]:
    """All updates on one step's rollouts -> (metrics, seconds by phase). Every rank calls it with the same groups."""
    rl, layers = session.cfg.rl, session.spec.num_layers
    objective = objective_of(rl)
    clock = [time.monotonic()]
    batch = replay(groups, layers)
    first, reference = learner.score(batch), learner.score(batch, reference=True)
    clock.append(time.monotonic())
    experience, values = credit(batch, groups, first, reference, rl, layers, step)
    packed = learner.packed
    kept = [i for i, group in enumerate(groups) if not rl.drop_equal_groups or np.ptp(group.rewards) > 0]
    per_step = rl.epochs * rl.minibatches
    updates: list[Update] = []
    clipped_share: list[float] = []
    kls: list[float] = []
    for epoch in range(rl.epochs):
        order = np.random.default_rng([rl.seed, step, epoch]).permutation(kept) if rl.minibatches > 1 else kept
        for chosen in np.array_split(order, min(rl.minibatches, len(kept))) if kept else ():
            rows = torch.tensor([g * rl.group_size + k for g in chosen for k in range(rl.group_size)])
            part = batch.select(rows)
            now = learner.score(part) if updates else first.select(rows)
            weights, left_out = objective.weights(part, experience.select(rows), now.token_logprobs, now.exit_logprobs)
            clipped_share.append(left_out)
            rate = learning_rate(step * per_step + len(updates), rl.steps * per_step, rl.warmup, rl.decay)
            rates = {"adapter_lr": rl.adapter_lr * rate, "gate_lr": rl.gate_lr * rate}
            update = learner.step(part, weights, objective.kl.teacher, **rates)
            session.guard(update, part, weights, step + 1)
            updates.append(update)
            if objective.kl.teacher is not None:
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
    values |= counted(session, groups, kept, packed)
    return values, {"score": clock[1] - clock[0], "update": clock[2] - clock[1]}


def replay(groups: list[Group], num_layers: int) -> ReplayBatch:
    rollouts = [r for g in groups for r in g.rollouts]
    return pack(
        [r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts], [r.exit_depths for r in rollouts], num_layers
    )


def objective_of(rl: RLConfig) -> PolicyGradient:
    return PolicyGradient(SURROGATES[rl.surrogate], KL_TERMS[rl.kl], rl.clip, rl.beta, rl.entropy_bonus)


def credit(
    batch: ReplayBatch, groups: list[Group], first: Scores, reference: Scores, rl: RLConfig, num_layers: int, step: int
) -> tuple[Experience, dict[str, float]]:
    """What the rollouts of step `step` teach, from the scores of the policy at its start and of the reference, and
    metrics."""
    rollouts = [r for g in groups for r in g.rollouts]
    task = torch.from_numpy(np.concatenate([g.rewards for g in groups]))
    log_ratio = mean_log_ratio(batch, first.token_logprobs, reference.token_logprobs)
    cost = depth_cost(batch, num_layers, rl.depth_cost, rl.cost_length)
    lambda_now = price(step, rl.steps, rl.lambda_exit, rl.lambda_warmup)
    reward = rollout_reward(task, log_ratio, cost, rl.beta if KL_TERMS[rl.kl].in_reward else 0.0, lambda_now)
    per_token = DEPTH_CREDITS[rl.depth_credit]
    credited = reward if per_token is None else reward + lambda_now * cost
    per_answer = ADVANTAGES[rl.advantage](credited.numpy().reshape(len(groups), -1)).reshape(-1)
    advantage = torch.from_numpy(per_answer).float().unsqueeze(1) * batch.counts
    if per_token is not None:
        advantage = advantage + lambda_now * per_token(batch, rl.group_size, num_layers, rl.depth_cost, rl.cost_length)
    old_tokens = spread(batch, [r.token_logprobs for r in rollouts])
    old_exits = spread(batch, [r.exit_logprobs for r in rollouts])
    start = first.token_logprobs + first.exit_logprobs
    raw, importance = truncated_ratio(start, old_tokens + old_exits, rl.importance_cap)
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
    experience = Experience(advantage, importance, start, reference.token_logprobs)
    return experience, values | rollout_metrics(batch, groups, num_layers)


def rollout_metrics(batch: ReplayBatch, groups: list[Group], num_layers: int) -> dict[str, float]:
    """Metrics of the rollouts as they are."""
    counts, lengths = batch.counts, batch.counts.sum(1).float()
    fraction = batch.exit_depths.float()[counts] / num_layers
    depths, hits = torch.unique(batch.exit_depths[counts], return_counts=True)
    low, middle, high = torch.quantile(fraction, torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {
        "accuracy": float(np.mean(np.concatenate([g.correct for g in groups]))),
        "well_formed": float(np.mean(np.concatenate([g.well_formed for g in groups]))),
        "finished": float(np.mean([r.finished for g in groups for r in g.rollouts])),
        "mean_depth": float(fraction.mean()),
        "depth_q10": low,
        "depth_q50": middle,
        "depth_q90": high,
        "total_depth": float((batch.exit_depths * counts).sum(1).float().mean()),
        "length": float(lengths.mean()),
        "prompt_length": float(np.mean([len(r.prompt_tokens) for g in groups for r in g.rollouts])),
        "tokens": float(lengths.sum()),
    } | {f"exit_share/{int(d)}": float(h) / int(counts.sum()) for d, h in zip(depths, hits, strict=True)}
