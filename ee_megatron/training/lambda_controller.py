"""lambda, the weight of the depth penalty, over an RL run: scheduled, or controlled by an accuracy target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..config.schema import RLConfig
from ..objectives.schedules import dual_price, price, price_rise


class TargetState(NamedTuple):
    """Running mean of the policy's accuracy, and what it should be at least; shares of 1."""

    running: float
    goal: float


@dataclass
class LambdaController:
    """lambda of each step. With `rl.depth_penalty.target.margin` it follows the accuracy that is left above the target.

    `reference`: by prompt id, the share of the reference's answers that are right; None without a target. `state` is
    saved in every checkpoint, so that a resumed run continues with the same lambda.

    Policy and reference are compared on the prompts of the same steps if the reference has answered them, else with its
    mean: a step may have few prompts, and their difficulty varies by far more than what depth costs. Warm-up steps are
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
        """Take in the accuracy of step `step`'s rollouts, equally many for each of its prompts (ids)."""
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
