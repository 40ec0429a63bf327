"""The price of depth in the course of an RL run: fixed, or led by an accuracy that is to be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.schema import RLConfig
from ..objectives.schedules import dual_price, price, price_rise


@dataclass
class Price:
    """lambda of the step to come. With `rl.accuracy_floor`, `reference` says by prompt id how often the reference is
    right, and what has been learned of the run so far goes into every checkpoint as `counters`.

    Policy and reference are compared on the prompts of the same steps where it has answered them, else with its mean: a
    step may have few, and how hard these are varies by far more than what depth costs. What the price rises over is
    left out: exits that were calibrated, not yet reinforced, lose answers when they are sampled, whatever they cost.
    """

    rl: RLConfig
    reference: Mapping[str, float] | None
    counters: dict[str, float]

    def at(self, step: int) -> float:
        """lambda at step `step` (from 0)."""
        if self.reference is None or step < price_rise(self.rl.steps, self.rl.lambda_warmup):
            return price(step, self.rl.steps, self.rl.lambda_exit, self.rl.lambda_warmup)
        return self.counters.get("lambda", self.rl.lambda_exit)

    def learn(self, step: int, accuracy: float, prompts: Sequence[str]) -> dict[str, float]:
        """Take in the accuracy of step `step`'s rollouts, as many to each of its prompts (ids); metrics."""
        rl = self.rl
        if self.reference is None or rl.accuracy_floor is None or step < price_rise(rl.steps, rl.lambda_warmup):
            return {}
        steps = min(self.counters.get("accuracy_steps", 0.0) + 1, rl.accuracy_window)
        running = self._running("accuracy_running", accuracy, steps)
        known = self.reference
        shares = [known[id] for id in prompts] if known.keys() >= set(prompts) else list(known.values())
        theirs = self._running("reference_running", float(np.mean(shares)), steps)
        goal, base = theirs - rl.accuracy_floor / 100, self.counters.get("lambda_base", rl.lambda_exit)
        # Of a window that is not full yet the steps to come count as kept: the first step's luck alone would lead.
        left = (running - goal) * steps / rl.accuracy_window
        base, value = dual_price(base, left, rl.lambda_rate)
        self.counters |= {"lambda": value, "lambda_base": base, "accuracy_steps": steps}
        return {"accuracy_running": running, "accuracy_goal": goal}

    def _running(self, name: str, value: float, steps: float) -> float:
        """The mean over so many steps with `value` in it."""
        before = self.counters.get(name, value)
        self.counters[name] = before + (value - before) / steps
        return self.counters[name]
