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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.derive import exits_read, scoring
from ..config.schema import RLConfig, RunConfig
from ..host_memory import return_freed
from ..learner.learner import Learner, PackedBatch
from ..objectives.depth import CREDITS
from ..objectives.divergences import Teacher
from ..objectives.schedules import dual_price, price, price_rise
from ..policy import sharpened
from ..tensors import drain
from ..types import Group
from .advantages import StepScores, collate, compute_advantages, filter_groups, rollouts_of
from .collect import Collector
from .context import StageContext
from .rl_metrics import TargetState, accuracy, cost_metrics, peak_flops, step_metrics, step_timings
from .serialization import keep_samples, sampled_steps
from .update import objective_of, update

logger = logging.getLogger(__name__)


def reinforce(cfg: RunConfig, model_path: Path, start: Path) -> None:
    """Run or resume the stage from the policy checkpoint `start`; its last checkpoint is the reinforced policy."""
    rl = cfg.rl
    with StageContext(cfg, "rl", model_path, learner=True) as context:
        done, checkpoint = context.checkpoints.latest()
        policy = context.checkpoints.read_policy(checkpoint or start, checked=checkpoint is not None)
        if checkpoint is None:
            policy = sharpened(policy, rl.gate_centre, rl.gate_sharpness)
        learner = context.make_learner(policy, checkpoint, temperature=rl.temperature)
        collector = Collector(context) if context.leads else None
        reference = context.unless_stopped(learner, done, collector.reference_accuracy if collector else None)
        controller = LambdaController(rl, reference, context.checkpoints.state)
        shown = sampled_steps(rl.steps)
        context.open_metrics(resume_step=done)
        with context.progress(rl.steps, done) as bar:
            learner.progress = bar.detail
            for step in range(done, rl.steps):
                context.stop_if_requested(learner, step)
                begun = time.monotonic()
                stream, weights = learner.stream_policy(context.ranks.meet), None
                if collector is not None:
                    weights = collector.sync_weights(step + 1, stream)
                else:
                    drain(stream)
                collected = context.unless_stopped(
                    learner, step, collector.collect if collector else None, weights, step, bar.detail
                )
                if context.directory is not None and step + 1 in shown:
                    keep_samples(context.directory, step + 1, collected.groups, context.decode)
                metrics, seconds = learn(context, learner, collected.groups, step, controller)
                if context.device_type == "cpu":
                    # The pool, on the same machine, works next.
                    return_freed()
                values = metrics | collected.health
                seconds |= collected.seconds | {"step": time.monotonic() - begun}
                peak = peak_flops(context.device_type, context.dtype)
                context.log(step + 1, values, step_timings(cfg, values, seconds, peak))
                bar.advance(1, reward=values["reward"], accuracy=values["accuracy"], depth=values["mean_depth"])
                if (step + 1) % rl.checkpoint_every == 0 or step + 1 == rl.steps:
                    context.checkpoints.save(learner, step + 1)
        context.finish()


def learn(
    context: StageContext, learner: Learner, groups: list[Group], step: int, controller: LambdaController
) -> tuple[dict[str, float], dict[str, float]]:
    """Score a step's rollouts and update the policy on them; returns metrics and seconds by phase. Every rank calls it
    with the same groups."""
    cfg, rl, layout = context.cfg, context.cfg.rl, context.spec.layout
    begun = time.monotonic()
    batch = collate(groups, layout.num_layers, layout.first_token, gates=not rl.fixed_depth)
    packed = learner.pack(batch)
    scores = score(learner, packed, rl)
    scored = time.monotonic()
    lambda_depth = controller.at(step)
    advantages = compute_advantages(batch, groups, scores, rl, layout, lambda_depth=lambda_depth)
    target = controller.update(step, accuracy(groups), [group.prompt.id for group in groups])
    if not advantages.loss_included.any():
        logger.warning(
            "step %d: every answer was cut at rollout.max_new_tokens=%d, so rl.loss.overlong=filter leaves nothing to "
            "learn from; raise it, or set rl.loss.overlong=verdict", step + 1, cfg.rollout.max_new_tokens,
        )  # fmt: skip
    result = update(
        learner, packed, rollouts_of(groups), advantages, filter_groups(groups, rl, lambda_depth),
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
    return metrics, seconds


def score(learner: Learner, packed: PackedBatch, rl: RLConfig) -> StepScores:
    """Compute the scores that the objective needs before the first update: of the policy and of the reference."""
    wanted = scoring(rl)
    policy = reference = None
    if wanted.policy:
        teacher = Teacher.REFERENCE if wanted.divergence else None
        policy = learner.score(packed, teacher=teacher, hazards=CREDITS[rl.credit].local and not exits_read(rl))
    if wanted.reference:
        reference = learner.score(packed, reference=True).token_logprobs
    return StepScores(policy, reference, packed.stats if wanted.policy or wanted.reference else None)


@dataclass
class LambdaController:
    """Sets lambda of each step. With `rl.depth_penalty.target.margin` it follows the accuracy above the target.

    `reference`: by prompt id, the share of the reference's answers that are right; None without a target. `state` is
    saved in every checkpoint, so that a resumed run continues with the same lambda.

    Policy and reference are compared on the prompts of the same steps if the reference has answered them, else with its
    mean: a step may have few prompts, whose difficulty varies far more than the effect of depth. Warm-up steps are
    not compared: exits that are calibrated but not yet reinforced lose accuracy when they are sampled, whatever lambda.
    """

    rl: RLConfig
    reference: Mapping[str, float] | None
    state: dict[str, float]

    def at(self, step: int) -> float:
        """lambda at step `step` (from 0)."""
        if self.reference is None or step < price_rise(self.rl.steps, self.rl.depth_penalty.warmup):
            return price(step, self.rl.steps, self.rl.depth_penalty.weight, self.rl.depth_penalty.warmup)
        return self.state.get("lambda", self.rl.depth_penalty.weight)

    def update(self, step: int, accuracy: float, prompts: Sequence[str]) -> TargetState | None:
        """Update lambda from the accuracy of step `step`'s rollouts, equally many for each of its prompts (ids)."""
        penalty, target = self.rl.depth_penalty, self.rl.depth_penalty.target
        if self.reference is None or target is None or step < price_rise(self.rl.steps, penalty.warmup):
            return None
        steps = min(self.state.get("accuracy_steps", 0.0) + 1, target.window)
        running = self._running("accuracy_running", accuracy, steps)
        known = self.reference
        shares = [known[id] for id in prompts] if known.keys() >= set(prompts) else list(known.values())
        theirs = self._running("reference_running", float(np.mean(shares)), steps)
        goal, base = theirs - target.margin / 100, self.state.get("lambda_base", penalty.weight)
        # Missing steps of the window count as exactly on target; otherwise one lucky step sets lambda.
        surplus = (running - goal) * steps / target.window
        base, value = dual_price(base, surplus, target.rate)
        self.state |= {"lambda": value, "lambda_base": base, "accuracy_steps": steps}
        return TargetState(running, goal)

    def _running(self, name: str, value: float, steps: float) -> float:
        """The mean over that many steps, `value` included."""
        before = self.state.get(name, value)
        self.state[name] = before + (value - before) / steps
        return self.state[name]
