"""The price of depth in the course of an RL run: fixed, or led by an accuracy that is to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.schema import RLConfig
from ..objectives.schedules import dual_price, price, price_rise


@dataclass
class Price:
    """lambda of the step to come. With `rl.depth_penalty.target`, `reference` says by prompt id how often the
    reference is right, and what has been learned of the run so far goes into every checkpoint as `counters`.

    Policy and reference are compared on the prompts of the same steps where it has answered them, else with its mean: a
    step may have few, and how hard these are varies by far more than what depth costs. What the price rises over is
    left out: exits that were calibrated, not yet reinforced, lose answers when they are sampled, whatever they cost.
    """

    rl: RLConfig
    reference: Mapping[str, float] | None
    counters: dict[str, float]

    def at(self, step: int) -> float:
        """lambda at step `step` (from 0)."""
        if self.reference is None or step < price_rise(self.rl.steps, self.rl.depth_penalty.warmup):
            return price(step, self.rl.steps, self.rl.depth_penalty.weight, self.rl.depth_penalty.warmup)
        return self.counters.get("lambda", self.rl.depth_penalty.weight)

    def learn(self, step: int, accuracy: float, prompts: Sequence[str]) -> dict[str, float]:
        """Take in the accuracy of step `step`'s rollouts, as many to each of its prompts (ids); metrics."""
        rl = self.rl
        penalty, target = rl.depth_penalty, rl.depth_penalty.target
        if self.reference is None or target is None or step < price_rise(rl.steps, penalty.warmup):
            return {}
        steps = min(self.counters.get("accuracy_steps", 0.0) + 1, target.window)
        running = self._running("accuracy_running", accuracy, steps)
        known = self.reference
        shares = [known[id] for id in prompts] if known.keys() >= set(prompts) else list(known.values())
        theirs = self._running("reference_running", float(np.mean(shares)), steps)
        goal, base = theirs - target.margin / 100, self.counters.get("lambda_base", penalty.weight)
        # Of a window that is not full yet the steps to come count as kept: the first step's luck alone would lead.
        left = (running - goal) * steps / target.window
        base, value = dual_price(base, left, target.rate)
        self.counters |= {"lambda": value, "lambda_base": base, "accuracy_steps": steps}
        return {"accuracy_running": running, "accuracy_goal": goal}

    def _running(self, name: str, value: float, steps: float) -> float:
        """The mean over so many steps with `value` in it."""
        before = self.counters.get(name, value)
        self.counters[name] = before + (value - before) / steps
        return self.counters[name]
