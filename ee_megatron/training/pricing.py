"""The price of depth in the course of an RL run: fixed, or led by an accuracy that is to be kept."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import RLConfig
from ..objectives.schedules import dual_price, price


@dataclass
class Price:
    """lambda of the step to come. With `rl.accuracy_floor`, `reference` is the accuracy that it is counted from, and
    what has been learned of the run so far goes into every checkpoint as `counters`."""

    rl: RLConfig
    reference: float | None
    counters: dict[str, float]

    def at(self, step: int) -> float:
        """lambda at step `step` (from 0)."""
        if self.reference is None:
            return price(step, self.rl.steps, self.rl.lambda_exit, self.rl.lambda_warmup)
        return self.counters.get("lambda", self.rl.lambda_exit)

    def learn(self, accuracy: float) -> dict[str, float]:
        """Take in the accuracy of a step's rollouts; metrics."""
        if self.reference is None or self.rl.accuracy_floor is None:
            return {}
        steps = min(self.counters.get("accuracy_steps", 0.0) + 1, self.rl.accuracy_window)
        before = self.counters.get("accuracy_running", accuracy)
        running = before + (accuracy - before) / steps
        goal = self.reference - self.rl.accuracy_floor / 100
        rl, base = self.rl, self.counters.get("lambda_base", self.rl.lambda_exit)
        base, value = dual_price(base, running - goal, rl.lambda_rate, rl.lambda_gain, rl.lambda_max)
        self.counters.update(
            {"lambda": value, "lambda_base": base, "accuracy_running": running, "accuracy_steps": steps}
        )
        return {"accuracy_running": running, "accuracy_goal": goal}
