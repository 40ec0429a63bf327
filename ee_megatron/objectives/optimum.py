"""RL's optimum in closed form if only the choice among a few styles changes, and the depth penalty that switches it.

RL maximises E[right - price] - beta KL(policy || reference). Over the styles i alone that is

    F(share) = sum_i share_i v_i - beta sum_i share_i log(share_i / reference_i),   v_i = right_i - price_i,

whose maximiser is share_i ∝ reference_i exp(v_i / beta): the Boltzmann distribution of KL-regularised control (Todorov,
PNAS 106, 2009, equation 6; as RL's optimal policy: Rafailov et al. 2023, arXiv 2305.18290, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Shares = Mapping[str, float]
"""Style -> share of the answers."""
TOLERANCE = 1e-12
"""Of a reward: by so little a style may fall short of the requested share."""


def answer_costs(figures: Mapping[str, float], cost_length: int) -> dict[str, float]:
    """Costs by name in `depth.DEPTH_COSTS` from mean `figures` of answers: mean_depth, total_depth, max_depth and
    square, depths as shares of L. A cost is linear in these, so the result is the mean cost. NaN where one is missing.
    """
    of = {"mean": "mean_depth", "total": "total_depth", "max": "max_depth", "square": "square"}
    costs = {cost: figures.get(figure, math.nan) for cost, figure in of.items()}
    return costs | {"total": costs["total"] / cost_length}


def closed_form(reference: Shares, value: Shares, beta: float) -> dict[str, float]:
    """The distribution p over styles that maximises sum p v - beta KL(p || reference); styles that the reference never
    writes stay at 0. beta 0: all on the best, equal ones by the reference's shares."""
    possible = {style: share for style, share in reference.items() if share > 0}
    best = max(value[style] for style in possible)
    odds = {
        style: share * (math.exp((value[style] - best) / beta) if beta > 0 else float(value[style] == best))
        for style, share in possible.items()
    }
    total = sum(odds.values())
    return {style: odds.get(style, 0.0) / total for style in reference}


def takeover_price(
    reference: Shares, value: Shares, cost: Shares, beta: float, style: str, level: float = 0.5
) -> float | None:
    """The least lambda >= 0 at which the closed form gives `style` that share of the answers, 0 < level < 1; None if
    there is none, or if a figure isn't finite. `value`: what an answer is worth without the price, `cost`: what lambda
    is charged for. beta 0: the least at which no other is better.

    Against the others j the style has the level s where g(lambda) <= 0,

        g(lambda) = beta log sum_j exp(a_j(lambda) / beta) + beta log(s / (1 - s)),
        a_j(lambda) = beta log(reference_j / reference_style) + value_j - value_style - lambda (cost_j - cost_style),

    and odds = exp(-g / beta) s / (1 - s). The share need not rise with lambda: against a deeper style it does,
    against a shallower one it falls. But g, a log-sum-exp of lines (for beta 0 their maximum), is convex (Boyd and
    Vandenberghe, Convex Optimization, 2004, 3.1.5), so that the prices at which the style has its level are one
    interval. Where g(0) > 0 Newton's iteration from 0 runs up to its lower end and never past it, each tangent lying
    below g; where g rises, or is level, above 0, no higher price helps.
    """
    others = [name for name, share in reference.items() if share > 0 and name != style]
    used = [v for name in (*others, style) for v in (reference.get(name, 0.0), value[name], cost[name])]
    if not all(map(math.isfinite, (*used, beta))) or not reference.get(style, 0.0) > 0:
        return None
    more = beta * math.log(level / (1 - level))
    lines = [
        (beta * math.log(reference[j] / reference[style]) + value[j] - value[style] + more, cost[style] - cost[j])
        for j in others
    ]
    price = 0.0
    while lines:
        height, slope = _soft_maximum(lines, price, beta)
        if height <= TOLERANCE:
            break
        if not slope < 0 or not math.isfinite(further := price - height / slope):
            return None
        if further == price:
            break
        price = further
    return price


def _soft_maximum(lines: Sequence[tuple[float, float]], x: float, beta: float) -> tuple[float, float]:
    """beta log sum exp((a + b x) / beta) over lines (a, b), and its slope; beta 0: their maximum, the slope to its
    right."""
    heights = [a + b * x for a, b in lines]
    top = max(heights)
    if beta == 0:
        return top, max(b for height, (_, b) in zip(heights, lines, strict=True) if height == top)
    weights = [math.exp((height - top) / beta) for height in heights]
    total = sum(weights)
    return top + beta * math.log(total), sum(w * b for w, (_, b) in zip(weights, lines, strict=True)) / total
