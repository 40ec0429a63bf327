"""Schedules of the learning rate and of the depth penalty lambda over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 0.0,
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 * (1 - math.cos(math.pi * done)),
}
"""Share of the way from the full learning rate to its floor, after a share `done` of the updates."""


def price_rise(steps: int, warmup: float) -> int:
    """Number of steps over which lambda rises, a share `warmup` of all."""
    return round(steps * warmup)


def price(step: int, steps: int, lambda_exit: float, warmup: float) -> float:
    """lambda at step `step` (0-based): rises linearly over the first `warmup` share of the steps, then stays."""
    rise = price_rise(steps, warmup)
    return lambda_exit if step >= rise else lambda_exit * (step + 1) / (rise + 1)


LAMBDA_GAIN, LAMBDA_MAX = 10.0, 4.0
"""Of `dual_price`: what lambda is above or below its base, per unit of accuracy; how far it may rise."""


def dual_price(base: float, surplus: float, rate: float) -> tuple[float, float]:
    """(base, lambda) of the next step, both from 0 to LAMBDA_MAX, from the accuracy above the target.

    The base adds up `rate` times the surplus, as in dual ascent on "least depth such that accuracy >= goal" (Boyd et
    al. 2011, "Distributed optimization and statistical learning via ADMM", 2.1), but of the price of depth: the inverse
    of that constraint's multiplier. Alone it overshoots, since accuracy answers to a price after some steps only, so
    LAMBDA_GAIN times the surplus comes on top (Stooke et al. 2020, "Responsive safety in reinforcement learning by PID
    Lagrangian methods", arXiv 2007.03964).
    """
    base = min(max(base + rate * surplus, 0.0), LAMBDA_MAX)
    return base, min(max(base + LAMBDA_GAIN * surplus, 0.0), LAMBDA_MAX)


def learning_rate(update: int, total: int, warmup: int, decay: str, floor: float = 0.1) -> float:
    """Factor of update `update` (0-based): linear rise over `warmup` updates, then one of DECAYS, with `floor` at the
    last update where it falls."""
    if update < warmup:
        return (update + 1) / warmup
    done = (update - warmup) / max(1, total - 1 - warmup)
    return 1.0 - (1.0 - floor) * DECAYS[decay](done)


def schedule(step: int, total: int, warmup: float = 0.05) -> float:
    """`learning_rate` with `warmup` as a share of the updates (at least one) and a linear fall."""
    return learning_rate(step, total, max(1, round(total * warmup)), "linear")
