"""Stage 2: reinforcement learning with a penalty on depth.

for each step:
    collect             K free answers per prompt under the current weights, verified        (collect.py)
    score               their log-probabilities under policy and reference, as the objective needs them
    compute_advantages  within the prompt's group, of task reward and depth penalty          (advantages.py)
    update              loss = - ratio * A_token * mean log pi(token) - ratio * A_exit * mean log q(exit)
                               + mean expected cost at the gates, if each exit answers for itself
                               + beta * mean KL(pi || pi_ref), if it is in the loss          (update.py)
                        under the exits that the rollouts took; adapters and gates change
    log                 metrics, once, from the records of the four                          (rl_metrics.py)

Every objective here is linear in the log-probabilities once its ratios are known, so an update scores first and then
minimises a weighted likelihood with the same gradient (objectives/policy_gradient.py).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from ..config.derive import exits_read, scoring
from ..config.schema import RLConfig, RunConfig
from ..host_memory import return_freed
from ..learner.learner import Learner, PackedBatch
from ..objectives.depth import CREDITS
from ..objectives.divergences import Teacher
from ..policy import sharpened
from ..tensors import drain
from ..types import Group
from .advantages import StepScores, collate, compute_advantages, kept_groups, rollouts_of
from .collect import make_collector
from .context import StageContext
from .lambda_controller import LambdaController
from .rl_metrics import accuracy, cost_metrics, peak_flops, step_metrics, step_timings
from .serialization import keep_samples, sampled_steps
from .update import objective_of, update

logger = logging.getLogger(__name__)


def reinforce(cfg: RunConfig, model_path: Path, start: Path) -> None:
    """Run or resume the stage from the policy checkpoint `start`; its last checkpoint is the reinforced policy."""
    rl = cfg.rl
    with StageContext(cfg, "rl", model_path, learner=True) as context:
        done, checkpoint = context.checkpoints.latest()
        spec, policy = context.checkpoints.read_policy(checkpoint or start, checked=checkpoint is not None)
        if spec != context.spec:
            raise ValueError(
                f"{start}: made with {spec}, the configuration says {context.spec}; give the same exits and adapter"
            )
        if checkpoint is None:
            policy = sharpened(policy, rl.gate_centre, rl.gate_sharpness)
        learner = context.make_learner(policy, checkpoint, temperature=rl.temperature)
        collector = make_collector(context) if context.leads else None
        # In a list: None means that the leader was told to stop.
        reference = context.ranks.unless_stopped(lambda: [collector.reference_accuracy()] if collector else None)
        if reference is None:
            context.stop(learner, done)
        controller = LambdaController(rl, reference[0], context.checkpoints.state)
        shown = sampled_steps(rl.steps)
        context.open_metrics(resume_step=done)
        with context.progress(rl.steps, done) as bar:
            learner.progress = bar.detail
            for step in range(done, rl.steps):
                context.stop_if_told(learner, step)
                begun = time.monotonic()
                stream, weights = learner.stream_policy(context.ranks.meet), None
                if collector is not None:
                    weights = collector.sync_weights(step + 1, stream)
                else:
                    drain(stream)
                collected = context.ranks.unless_stopped(
                    collector.collect if collector else None, weights, step, bar.detail
                )
                if collected is None:
                    context.stop(learner, step)
                if context.directory is not None and step + 1 in shown:
                    keep_samples(context.directory, step + 1, collected.groups, context.decode)
                learned = learn(context, learner, collected.groups, step, controller)
                if context.device_type == "cpu":
                    # The pool works next, here too.
                    return_freed()
                values, seconds = learned.metrics | collected.health, learned.seconds | collected.seconds
                seconds["step"] = time.monotonic() - begun
                peak = peak_flops(context.device_type, context.dtype)
                context.log(step + 1, values, step_timings(cfg, values, seconds, peak))
                bar.advance(1, reward=learned.reward, accuracy=learned.accuracy, depth=values["mean_depth"])
                if (step + 1) % rl.checkpoint_every == 0 or step + 1 == rl.steps:
                    context.checkpoints.save(learner, step + 1, value=learned.reward)
        context.finish()


@dataclass(frozen=True)
class Learned:
    """A step's mean reward and accuracy, its metrics, and the seconds of scoring and updating."""

    reward: float
    accuracy: float
    metrics: dict[str, float]
    seconds: dict[str, float]


def learn(
    context: StageContext, learner: Learner, groups: list[Group], step: int, controller: LambdaController
) -> Learned:
    """Score a step's rollouts and update the policy on them. Every rank calls it with the same groups."""
    cfg, rl, layout = context.cfg, context.cfg.rl, context.spec.layout
    begun = time.monotonic()
    batch = collate(groups, layout.num_layers, layout.first_token, gates=not rl.fixed_depth)
    packed = learner.pack(batch)
    scores = score(learner, packed, rl)
    scored = time.monotonic()
    lambda_depth, right = controller.at(step), accuracy(groups)
    advantages = compute_advantages(batch, groups, scores, rl, layout, lambda_depth=lambda_depth)
    target = controller.update(step, right, [group.prompt.id for group in groups])
    if not advantages.loss_included.any():
        logger.warning(
            "step %d: every answer was cut at rollout.max_new_tokens=%d, so rl.loss.overlong=filter leaves nothing to "
            "learn from; raise it, or set rl.loss.overlong=verdict", step + 1, cfg.rollout.max_new_tokens,
        )  # fmt: skip
    result = update(
        learner, packed, rollouts_of(groups), advantages, kept_groups(groups, rl, lambda_depth),
        objective_of(rl, cfg.rollout.max_new_tokens), rl, step,
        scored=scores.policy is not None, check_finite=context.check_finite,
    )  # fmt: skip
    seconds = {"score": scored - begun, "update": time.monotonic() - scored}
    metrics = step_metrics(
        batch, groups, scores, advantages, result,
        num_layers=layout.num_layers, lambda_depth=lambda_depth, target=target,
    )  # fmt: skip
    # If nothing was scored the update, if there was one, is the only pass.
    passed = None if scores.packing else result.rows if result.updates else []
    metrics |= cost_metrics(cfg, context.source.dims, groups, result.rows, scores.packing or result.packing, passed)
    return Learned(float(advantages.reward.mean()), right, metrics, seconds)


def score(learner: Learner, packed: PackedBatch, rl: RLConfig) -> StepScores:
    """What the objective needs before the first update: the policy's scores, the reference's log-probabilities."""
    wanted = scoring(rl)
    policy = reference = None
    if wanted.policy:
        teacher = Teacher.REFERENCE if wanted.divergence else None
        policy = learner.score(packed, teacher=teacher, hazards=CREDITS[rl.credit].local and not exits_read(rl))
    if wanted.reference:
        reference = learner.score(packed, reference=True).token_logprobs
    return StepScores(policy, reference, packed.stats if wanted.policy or wanted.reference else None)
