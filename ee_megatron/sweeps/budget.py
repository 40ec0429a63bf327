"""What a budget of FLOPs buys of a model: RL steps, epochs of calibration, or updates from random weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import RunConfig
from ..families import ModelDims
from ..planning.flops import calibration_flops, phase_flops, pretrain_flops, rollouts_per_step
from ..planning.layout import Layout
from ..planning.workload import Workload
from .grid import IsoFlop


@dataclass(frozen=True)
class Purchase:
    """`text`: the setting's value; `tokens` and `flops`: what the run then trains on and costs, by arithmetic."""

    text: str
    tokens: int
    flops: float


def buy(cfg: RunConfig, dims: ModelDims, budget: float, how: IsoFlop) -> Purchase:
    """The setting nearest to `budget` FLOPs. rl.steps counts rollouts, scoring and updates; calibrate.epochs counts
    updates with the scores that they ask for; pretrain.steps updates at full depth.

    Raises ValueError if the budget is less than half of the least that can be had."""
    layout = Layout.of(cfg, dims)
    answer = how.answer_tokens or cfg.rollout.max_new_tokens
    exits = layout.spec.layout
    load = Workload.of(how.prompt_tokens, answer, exits.outcomes, how.mean_depth, exits.first_token)
    if how.set == "rl.steps":
        count, flops = _whole(budget, sum(phase_flops(layout, load, cfg).values()), "RL step")
        return Purchase(str(count), count * rollouts_per_step(cfg) * answer, flops)
    if how.set == "pretrain.steps":
        length, batch = how.prompt_tokens + answer, cfg.pretrain.batch_size
        count, flops = _whole(budget, pretrain_flops(cfg, dims, length, batch), "update")
        return Purchase(str(count), count * batch * (length - 1), flops)
    batch = cfg.calibrate.batch_size
    update = calibration_flops(layout, load, cfg)
    sequences = cfg.traces.problems * cfg.traces.samples * cfg.calibrate.patterns
    count, _ = _whole(budget, update, "update")
    # calibrate.py rounds epochs to sequences and fills batches from them.
    epochs = float(f"{count * batch / sequences:.9g}")
    seen = round(epochs * sequences)
    return Purchase(repr(epochs), seen * answer, math.ceil(seen / batch) * update)


def _whole(budget: float, each: float, name: str) -> tuple[int, float]:
    """The number of steps of `each` FLOPs that comes nearest to the budget, and their FLOPs."""
    count = round(budget / each)
    if count < 1:
        raise ValueError(f"budget={budget:g}: less than half of one {name} of {each:.3g} FLOPs; raise it")
    return count, count * each
