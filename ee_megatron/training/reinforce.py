"""Stage 2: reinforcement learning.

for each step:
    rollouts <- K free answers per prompt under the current weights     (pool; tokens, exits and both log-probabilities)
    r_task   <- verifier
    R = r_task - beta * mean(log pi - log pi_ref) - lambda * mean(depth / L)
    A <- leave-one-out within the prompt's group
    loss = - ratio * A * ( mean log pi(token) + mean log q(exit) )       (learner, under the SAME exits)
    update adapters and gates; send them to the pool
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..config.schema import RLConfig, RunConfig
from ..learner.batch import ReplayBatch, mean_weights, pack, spread
from ..learner.learner import Scores
from ..policy import WeightSet, load_policy
from ..rollout.pool import RolloutPool
from ..rollout.sampling import ExitPolicy, SamplingParams
from ..tasks import VerifierPool
from ..types import Group, Prompt
from .advantages import ADVANTAGES
from .losses import depth_cost, mean_log_ratio, rollout_reward, truncated_ratio
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
        learner = session.make_learner(policy, temperature=rl.temperature)
        if checkpoint:
            learner.load(checkpoint)
        actor = Actor(session) if session.leads else None
        session.open_metrics(resume_step=done)
        with session.progress(rl.steps, done) as bar:
            for step in range(done, rl.steps):
                clock = [time.monotonic()]
                weights = WeightSet(step + 1, learner.export_policy())
                groups = session.from_leader(actor.act if actor else None, weights, step, bar.detail)
                clock.append(time.monotonic())
                batch = replay(groups, spec.num_layers)
                now, reference = learner.score(batch), learner.score(batch, reference=True)
                clock.append(time.monotonic())
                values = weigh(batch, groups, now, reference, rl, spec.num_layers)
                _, norm = learner.step(batch, adapter_lr=rl.adapter_lr, gate_lr=rl.gate_lr, objective="likelihood")
                clock.append(time.monotonic())
                values |= {"grad_norm": norm} | _timing(clock, batch)
                if actor is not None:
                    values |= actor.health()
                session.log(step + 1, values)
                bar.advance(1, reward=values["reward"], accuracy=values["accuracy"], depth=values["mean_depth"])
                if (step + 1) % rl.checkpoint_every == 0 or step + 1 == rl.steps:
                    session.save(learner, step + 1)
        session.finish()


class Actor:
    """The leader's side of a step: prompts in, verified groups out."""

    def __init__(self, session: Session):
        self.cfg = session.cfg
        task = session.make_task()
        self.verifier: VerifierPool = session.make_verifier(task)
        self.prompts = task.prompts("train")
        self.pool: RolloutPool = session.make_pool(session.spec)

    def act(self, weights: WeightSet, step: int, detail: Callable[[str, int, int], None]) -> list[Group]:
        """Roll out step `step`'s prompts under `weights`. The prompts depend on seed and step alone, so that a resumed
        run goes on where it was: no prompt twice, none lost, until all have been used."""
        rl, r = self.cfg.rl, self.cfg.rollout
        self.pool.load(weights)
        prompts = step_prompts(self.prompts, step, rl)
        answers = self.pool.generate(
            prompts,
            rl.group_size,
            SamplingParams(rl.temperature, r.max_new_tokens, tuple(r.stop)),
            ExitPolicy("sample"),
            rl.seed * 1_000_003 + step,
            lambda done, total: detail("rollouts", done, total),
        )
        stale = {a.weight_version for group in answers for a in group} - {weights.version}
        if stale:
            raise RuntimeError(f"rollouts under weight versions {sorted(stale)}, expected {weights.version}")
        verdicts = iter(
            self.verifier.verify_many([(p, a.text) for p, g in zip(prompts, answers, strict=True) for a in g])
        )
        groups = []
        for prompt, group in zip(prompts, answers, strict=True):
            found = [next(verdicts) for _ in group]
            rewards = np.array([v.reward for v in found], dtype=np.float32)
            groups.append(Group(prompt, group, rewards, np.array([v.correct for v in found])))
        return groups

    def health(self) -> dict[str, float]:
        return {
            "verifier_timeouts": float(self.verifier.timeouts),
            "actor_restarts": float(self.pool.health()["restarts"]),
        }


def step_prompts(prompts: list[Prompt], step: int, rl: RLConfig) -> list[Prompt]:
    """Step's share of an endless sequence of shuffled passes over the prompts."""
    first, chosen = step * rl.prompts_per_step, []
    for position in range(first, first + rl.prompts_per_step):
        epoch, place = divmod(position, len(prompts))
        order = np.random.default_rng([rl.seed, epoch]).permutation(len(prompts))
        chosen.append(prompts[order[place]])
    return chosen


def replay(groups: list[Group], num_layers: int) -> ReplayBatch:
    rollouts = [r for g in groups for r in g.rollouts]
    return pack(
        [r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts], [r.exit_depths for r in rollouts], num_layers
    )


def weigh(
    batch: ReplayBatch, groups: list[Group], now: Scores, reference: Scores, rl: RLConfig, num_layers: int
) -> dict[str, float]:
    """Turn rewards into the batch's weights, and say what was seen. Modifies `batch`."""
    rollouts = [r for g in groups for r in g.rollouts]
    task = torch.from_numpy(np.concatenate([g.rewards for g in groups]))
    log_ratio = mean_log_ratio(batch, now.token_logprobs, reference.token_logprobs)
    cost = depth_cost(batch, num_layers, rl.depth_cost, rl.cost_length)
    reward = rollout_reward(task, log_ratio, cost, rl.beta, rl.lambda_exit)
    advantage = ADVANTAGES[rl.advantage](reward.numpy().reshape(len(groups), -1)).reshape(-1)
    old_tokens = spread(batch, [r.token_logprobs for r in rollouts])
    old_exits = spread(batch, [r.exit_logprobs for r in rollouts])
    raw, ratio = truncated_ratio(now.token_logprobs + now.exit_logprobs, old_tokens + old_exits, rl.importance_cap)
    scale = torch.from_numpy(advantage).float().unsqueeze(1) * ratio
    batch.token_weight = scale * mean_weights(batch, batch.counts)
    batch.exit_weight = scale * mean_weights(batch, batch.asked)
    counts, lengths = batch.counts, batch.counts.sum(1).float()
    fraction = batch.depths.float() / num_layers
    values = {
        "reward": float(reward.mean()),
        "task_reward": float(task.mean()),
        "accuracy": float(np.mean(np.concatenate([g.correct for g in groups]))),
        "finished": float(np.mean([r.finished for r in rollouts])),
        "mean_depth": float(fraction[counts].mean()),
        "total_depth": float((batch.depths * counts).sum(1).float().mean()),
        "length": float(lengths.mean()),
        "kl_to_reference": float(log_ratio.mean()),
        "advantage_spread": float(advantage.std()),
        "token_mismatch": float((now.token_logprobs - old_tokens)[counts].abs().mean()),
        "exit_mismatch": float((now.exit_logprobs - old_exits)[counts].abs().mean()),
        "importance_ratio_mean": float(raw[counts].mean()),
        "importance_ratio_max": float(raw[counts].max()),
    }
    depths, hits = torch.unique(batch.depths[counts], return_counts=True)
    shares = {f"exit_share/{int(d)}": float(h) / int(counts.sum()) for d, h in zip(depths, hits, strict=True)}
    return values | shares


def _timing(clock: list[float], batch: ReplayBatch) -> dict[str, float]:
    rollout, score, update = np.diff(clock)
    return {
        "seconds_rollout": float(rollout),
        "seconds_score": float(score),
        "seconds_update": float(update),
        "tokens_per_s": float(batch.counts.sum()) / float(clock[-1] - clock[0]),
    }
