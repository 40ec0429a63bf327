"""What the closed form forecasts before RL: how a policy that weighs styles under a KL would share its answers.

RL maximises E[right - price] - beta KL(policy || reference). Over the styles i alone that is

    F(share) = sum_i share_i v_i - beta sum_i share_i log(share_i / reference_i),   v_i = right_i - price_i,

whose maximiser is share_i ∝ reference_i exp(v_i / beta): the Boltzmann distribution of KL-regularised control (Todorov,
PNAS 106, 2009, equation 6; as RL's optimal policy: Rafailov et al. 2023, arXiv 2305.18290, equation 4).

right_i and the costs are those of the policy that RL starts from when the style is given to it, so nothing is fitted.
That they stay is the forecast's assumption: styles that RL hardly writes any more get worse.

reference_i are the teacher's own shares, sampled: it is the reference of RL's KL. The corpus' weights, which a teacher
only approaches, stand in where nobody measured it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from .choice import STYLES, Figures
from .study import CAP, NO_EXITS, Objective, Record, Study

Shares = Mapping[str, float]


def price(objective: Objective, figures: Figures) -> float:
    """What an answer in a style costs on average: `objectives.depth.DEPTH_COSTS`, of means over answers."""
    cost = {
        "mean": figures.mean_depth,
        "total": figures.total_depth / objective.cost_length,
        "max": figures.max_depth,
        "square": figures.square,
    }
    length = figures.length / objective.cost_length
    return objective.lambda_exit * cost[objective.depth_cost] + objective.lambda_length * length


def closed_form(reference: Shares, value: Shares, beta: float) -> dict[str, float]:
    """argmax of sum p v - beta KL(p || reference) over distributions p; styles that the reference never writes stay
    at 0. beta 0: all on the best, equal ones by the reference's shares."""
    possible = {style: share for style, share in reference.items() if share > 0}
    best = max(value[style] for style in possible)
    odds = {
        style: share * (math.exp((value[style] - best) / beta) if beta > 0 else float(value[style] == best))
        for style, share in possible.items()
    }
    total = sum(odds.values())
    return {style: odds.get(style, 0.0) / total for style in reference}


def forecast(study: Study, record: Record, family: str, lambda_exit: float | None = None) -> dict[str, float] | None:
    """Shares of the styles after RL, by what was known before it; None where no run measured that. `lambda_exit`: at
    another price of depth than the run's."""
    objective = record.objective
    if lambda_exit is not None:
        objective = replace(objective, lambda_exit=lambda_exit)
    before = before_rl(study, record, family)
    if not before:
        return None
    values = {style: figures.correct - price(objective, figures) for style, figures in before.items()}
    if any(math.isnan(value) for value in values.values()):
        return None
    return closed_form(reference_shares(study, record, family), values, objective.beta)


def before_rl(study: Study, record: Record, family: str) -> Mapping[str, Figures]:
    """Figures of every style under the exits that RL was to sample with; {} if they were not measured."""
    kind, depth = record.condition.kind, record.objective.fixed_depth
    start = study.start_anywhere(record, family) if kind in (CAP, NO_EXITS) else study.start(record, family)
    if start is None:
        return {}
    found = {CAP: start.fixed.get(depth, {}), NO_EXITS: start.forced_full}.get(kind, start.forced)
    return found if set(found) == set(STYLES) else {}


def reference_shares(study: Study, record: Record, family: str) -> dict[str, float]:
    """The teacher's shares of the styles, answers in none of them left out."""
    teacher = study.teacher(record, family)
    shares = {style: (teacher.share if teacher else record.weights)[style] for style in STYLES}
    total = sum(shares.values())
    return {style: share / total for style, share in shares.items()}
