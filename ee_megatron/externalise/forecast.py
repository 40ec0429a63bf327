"""What the closed form forecasts before RL: how a policy that weighs styles under a KL would share its answers.

objectives/optimum.py has the formula and its sources. right_i and the costs are those of the policy that RL starts from
when the style is given to it, so nothing is fitted. That they stay is the forecast's assumption: styles that RL hardly
writes any more get worse.

reference_i are the teacher's own shares, sampled: it is the reference of RL's KL. The corpus' weights, which a teacher
only approaches, stand in where nobody measured it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..objectives.optimum import answer_costs, closed_form
from . import styles
from .choice import STYLES, Figures
from .study import CAP, NO_EXITS, Objective, Record, Study


def price(objective: Objective, figures: Figures) -> float:
    """What an answer in a style costs on average."""
    cost = answer_costs(vars(figures), objective.cost_length)[objective.depth_cost]
    return objective.lambda_exit * cost + objective.lambda_length * figures.length / objective.cost_length


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
    reference = reference_shares(study, record, family)
    if any(math.isnan(value) for value in (*values.values(), *reference.values())):
        return None
    return closed_form(reference, values, objective.beta)


def steps_price(study: Study, record: Record, family: str, cost: str, level: float) -> float | None:
    """The price of depth, of a run like this one that pays for `cost`, from which on the closed form has the share
    `level` of the answers in steps; None where it never has, or where nobody measured what it needs."""
    forced = {style: vars(figures) for style, figures in before_rl(study, record, family).items()}
    return styles.steps_price(forced, reference_shares(study, record, family), record.objective, cost, level)


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
    return styles.shares_of(teacher.share if teacher else record.weights, STYLES)
