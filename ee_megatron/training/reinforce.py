"""Stage 2: reinforcement learning.

for each step:
    rollouts <- K free answers per prompt under the current weights     (pool; tokens, exits and both log-probabilities)
    r_task   <- verifier
    lambda   <- fixed, or by the accuracy that is to be kept            (pricing.py)
    A        <- within the prompt's group, of r_task and of the price of depth, for tokens and exits  (experience.py)
    loss = - ratio * A_token * mean log pi(token) - ratio * A_exit * mean log q(exit)    (learner, under the SAME exits)
           + mean expected cost at the gates, where an exit answers for itself
           + beta * mean KL(pi || pi_ref), where it is in the loss
    update adapters and gates, once or in several epochs and minibatches; send them to the pool

Every objective here is linear in the log-probabilities once its ratios are known, so an update scores first and then
minimises a weighted likelihood with the same gradient (objectives/policy_gradient.py).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.derive import exits_read, scoring
from ..config.schema import RLConfig, RunConfig
from ..host_memory import return_freed
from ..learner.batch import ReplayBatch
from ..learner.learner import Learner, Packed, Scores, Update
from ..objectives.depth import CREDITS
from ..objectives.divergences import Teacher
from ..objectives.schedules import learning_rate
from ..tensors import drain
from ..types import Group
from .costs import counted, speeds
from .experience import credit, entropies, mismatch, objective_of, replay, rollout_metrics, taught
from .pricing import Price
from .rollout_source import make_source
from .samples import keep_samples, sampled_steps
from .session import Session

logger = logging.getLogger(__name__)


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
            policy = session.rl_start(policy)
        learner = session.make_learner(policy, checkpoint, temperature=rl.temperature)
        source = make_source(session) if session.leads else None
        reference = session.unless_stopped(lambda: [source.reference_accuracy()] if source else None)
        if reference is None:
            session.stop(learner, done)
        cost = Price(rl, reference[0], session.counters)
        shown = sampled_steps(rl.steps)
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
                if session.directory is not None and step + 1 in shown:
                    keep_samples(session.directory, step + 1, groups, session.decode)
                values, seconds = learn(session, learner, groups, step, cost)
                if session.device_type == "cpu":
                    # The pool works next, here too.
                    return_freed()
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


def learn(
    session: Session, learner: Learner, groups: list[Group], step: int, cost: Price
) -> tuple[dict[str, float], dict[str, float]]:
    """All updates on one step's rollouts -> (metrics, seconds by phase). Every rank calls it with the same groups."""
    rl, layout = session.cfg.rl, session.spec.layout
    objective = objective_of(rl, session.cfg.rollout.max_new_tokens)
    clock = [time.monotonic()]
    batch = replay(groups, layout.num_layers, layout.first_token, gates=not rl.fixed_depth)
    first, reference = scored(learner, batch, rl)
    clock.append(time.monotonic())
    packed = learner.packed
    experience, values = credit(
        batch, groups, first, reference, rl, layout, price=cost.at(step), longest=session.cfg.rollout.max_new_tokens
    )
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if first is not None:
        values |= mismatch(batch, rollouts, first) | entropies(batch, first)
    values |= rollout_metrics(batch, groups, layout.num_layers)
    values |= cost.learn(step, values["accuracy"], [group.prompt.id for group in groups])
    counting, kept = taught(groups, rl), kept_groups(groups, rl, values["lambda"])
    if not counting.any():
        logger.warning(
            "step %d: every answer was cut at rollout.max_new_tokens=%d, so rl.loss.overlong=filter leaves nothing to "
            "learn from; raise it, or set rl.loss.overlong=verdict", step + 1, session.cfg.rollout.max_new_tokens,
        )  # fmt: skip
    per_step = rl.epochs * rl.minibatches
    updates: list[Update] = []
    clipped_share: list[float] = []
    kls: list[float] = []
    for epoch in range(rl.epochs):
        order = np.random.default_rng([rl.seed, step, epoch]).permutation(kept) if rl.minibatches > 1 else kept
        for chosen in np.array_split(order, min(rl.minibatches, len(kept))) if kept else ():
            rows = torch.tensor([g * rl.group_size + k for g in chosen for k in range(rl.group_size)])
            rows = rows[counting[rows]]
            if not len(rows):
                continue
            part, known = batch.select(rows), experience.select(rows)
            if updates:
                now = learner.score(part)
                tokens, exits = now.token_logprobs, now.exit_logprobs
            else:
                tokens, exits = known.old_tokens, known.old_exits
            weights, left_out = objective.weights(part, known, tokens, exits)
            clipped_share.append(left_out)
            rate = learning_rate(step * per_step + len(updates), rl.steps * per_step, 0, rl.decay)
            rates = {"adapter_lr": rl.adapter_lr * rate, "gate_lr": rl.gate_lr * rate}
            update = learner.step(part, weights, objective.kl.teacher, **rates)
            session.guard(update, part, weights, step + 1)
            updates.append(update)
            if first is None:
                # The only update saw the policy that made the rollouts.
                values |= mismatch(part, [rollouts[row] for row in rows], update.scores)
            if objective.kl.teacher is not None:
                kls.append(float(update.scores.kl[part.counts].mean()))
    clock.append(time.monotonic())
    if kls:
        values["kl_exact"] = float(np.mean(kls))
        values.setdefault("kl_to_reference", kls[0])
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
    learned = [row for g in kept for row in range(g * rl.group_size, (g + 1) * rl.group_size) if counting[row]]
    passed = None
    if first is None and reference is None:
        # Nothing was scored: the update, if there was one, is the only pass.
        packed, passed = (learner.packed, learned) if updates else (Packed(0, 0, 0, 0), [])
    values |= counted(session, groups, learned, packed, passed)
    return values, {"score": clock[1] - clock[0], "update": clock[2] - clock[1]}


def scored(learner: Learner, batch: ReplayBatch, rl: RLConfig) -> tuple[Scores | None, Tensor | None]:
    """What the objective has to know before the first update: the policy's scores, the reference's log-probabilities of
    the tokens."""
    wanted = scoring(rl)
    first = reference = None
    if wanted.policy:
        teacher = Teacher.REFERENCE if wanted.divergence else None
        first = learner.score(batch, teacher=teacher, hazards=CREDITS[rl.credit].local and not exits_read(rl))
    if wanted.reference:
        reference = learner.score(batch, reference=True).token_logprobs
    return first, reference


def kept_groups(groups: list[Group], rl: RLConfig, price: float) -> list[int]:
    """With rl.loss.drop_equal_groups those that teach: their answers differ in reward, or right ones may still become
    shallower."""
    if not rl.loss.drop_equal_groups:
        return list(range(len(groups)))
    return [i for i, g in enumerate(groups) if np.ptp(g.rewards) > 0 or (price > 0 and g.correct.any())]
