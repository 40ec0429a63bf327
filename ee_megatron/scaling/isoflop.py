"""Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2): per compute budget a parabola of loss in ln N,
its minimum as N_opt, then the power law N_opt = k C^a through the minima.

Shape suffixes: S resamples, R rows of a budget, B budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .intervals import Interval, percentile_interval, wild_weights
from .refusal import Refused
from .solver import Array
from .table import Observations

# Budgets are planned as equal and come out a few per cent apart: rows within a tenth of the next are one budget.
BUDGET_GAP = np.log(1.1)
MIN_SIZES = 5
"""Three points fix a parabola; two more show the noise, without which there is no interval."""
MIN_BUDGETS = 3
"""Two fix a power law; the third shows whether it is one."""
MAX_FAILED = 0.05


@dataclass(frozen=True)
class Budget:
    """One parabola c0 + c1 x + c2 x², x = ln N; `flops` is the geometric mean of its rows, `params` its N_opt."""

    flops: float
    coefficients: tuple[float, float, float]
    params: float
    loss: float
    rows: Array


@dataclass(frozen=True)
class IsoFlopFit:
    """N_opt = coefficient · C^exponent with the exponent's 95 % interval; `left_out` says why budgets are missing.

    draws [S, 2]: mean ln N_opt of the budgets, and the exponent.
    """

    budgets: list[Budget]
    exponent: float
    coefficient: float
    interval: Interval
    left_out: list[str]
    draws: Array = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "exponent_a": {"value": self.exponent, "low": self.interval.low, "high": self.interval.high},
            "coefficient": self.coefficient,
            "budgets": [{"flops": b.flops, "params_opt": b.params, "loss": b.loss} for b in self.budgets],
            "budgets_left_out": self.left_out,
            "interval": f"wild bootstrap over runs, {len(self.draws)} resamples",
        }


def group_budgets(flops: Array) -> Array:
    """The budget 0..B-1 of each row [R], in ascending order of FLOPs."""
    order = np.argsort(flops, kind="stable")
    number = np.concatenate([[0], np.cumsum(np.diff(np.log(flops[order])) > BUDGET_GAP)])
    budget = np.empty(len(flops), dtype=int)
    budget[order] = number
    return budget


def fit_isoflop(obs: Observations, draws: int, seed: int) -> IsoFlopFit:
    """Fit with an interval from resampled runs. Raises Refused where fewer than three budgets have a minimum within
    their sizes, or more than a twentieth of the resamples have none."""
    budget = group_budgets(obs.flops)
    kept, left_out = [], []
    for index in range(int(budget.max()) + 1):
        rows = np.flatnonzero(budget == index)
        flops = float(np.exp(np.log(obs.flops[rows]).mean()))
        span = float(obs.flops[rows].max() / obs.flops[rows].min())
        sizes = len(np.unique(obs.params[rows]))
        if sizes < MIN_SIZES:
            left_out.append(f"{flops:.3g} FLOPs: {sizes} distinct sizes, expected at least {MIN_SIZES}")
        elif span > 1.25:
            left_out.append(
                f"{flops:.3g} FLOPs: rows differ by a factor of {span:.2f} without a gap, so they are no budget"
            )
        else:
            fitted = _parabola(obs, rows, flops)
            if isinstance(fitted, str):
                left_out.append(f"{flops:.3g} FLOPs: {fitted}")
            else:
                kept.append(fitted)
    if len(kept) < MIN_BUDGETS:
        why = f" ({'; '.join(left_out[:3])}{'; …' if len(left_out) > 3 else ''})" if left_out else ""
        raise Refused(
            f"{len(kept)} compute budgets with a minimum; expected at least {MIN_BUDGETS}, since two always lie on "
            f"a power law{why}; train at least {MIN_SIZES} sizes at each of {MIN_BUDGETS} budgets"
        )
    coefficient, exponent = _power_law(kept)
    sampled = _resampled(obs, kept, wild_weights(obs.run_count, draws, seed)[:, obs.runs])
    good = sampled[np.isfinite(sampled[:, 1])]
    if len(good) < (1 - MAX_FAILED) * draws:
        raise Refused(
            f"{1 - len(good) / draws:.0%} of the resamples have fewer than {MIN_BUDGETS} budgets with a minimum within "
            f"their sizes; expected at most {MAX_FAILED:.0%}; add sizes on both sides of each minimum"
        )
    interval = percentile_interval(good[:, 1], _freedom(obs, kept))
    return IsoFlopFit(kept, exponent, coefficient, interval, left_out, good)


def _freedom(obs: Observations, budgets: list[Budget]) -> int:
    """Independent runs less three coefficients per parabola, as far as budgets don't share their runs."""
    runs = len(np.unique(np.concatenate([obs.runs[b.rows] for b in budgets])))
    per_budget = np.mean([len(np.unique(obs.runs[b.rows])) for b in budgets])
    return max(1, round(runs * (1 - 3 / float(per_budget))))


def _parabola(obs: Observations, rows: Array, flops: float) -> Budget | str:
    x, y = np.log(obs.params[rows]), obs.loss[rows]
    centre = x.mean()
    c2, c1, c0 = np.polyfit(x - centre, y, 2)
    if c2 <= 0:
        return "the parabola opens downwards, so it has no minimum"
    at = -c1 / (2 * c2) + centre
    if not x.min() < at < x.max():
        side = "above" if at >= x.max() else "below"
        return f"the minimum lies {side} the sizes that were trained"
    whole = (float(c0 - c1 * centre + c2 * centre**2), float(c1 - 2 * c2 * centre), float(c2))
    return Budget(flops, whole, float(np.exp(at)), float(c0 - c1**2 / (4 * c2)), rows)


def _power_law(budgets: list[Budget]) -> tuple[float, float]:
    slope, offset = np.polyfit(np.log([b.flops for b in budgets]), np.log([b.params for b in budgets]), 1)
    return float(np.exp(offset)), float(slope)


def _resampled(obs: Observations, budgets: list[Budget], signs: Array) -> Array:
    """Mean ln N_opt and exponent [S, 2] with each run's residuals times its factor in `signs` [S, rows of the table];
    NaN where fewer than three budgets have a minimum within their sizes.

    Drawing runs anew would leave many resamples of five to nine sizes without a parabola. Their residuals, over
    √(1 - leverage) to undo what the fit took from them, keep the sizes and change the noise.
    """
    minima = np.full((len(signs), len(budgets)), np.nan)
    for index, budget in enumerate(budgets):
        x, y = np.log(obs.params[budget.rows]), obs.loss[budget.rows]
        powers = np.vander(x - x.mean(), 3, increasing=True)
        inverse = np.linalg.pinv(powers)
        leverage = np.einsum("ri,ir->r", powers, inverse)
        residual = (y - powers @ (inverse @ y)) / np.sqrt(np.maximum(1 - leverage, 1e-6))
        _, c1, c2 = (inverse @ y)[:, None] + inverse @ (signs[:, budget.rows] * residual).T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = -c1 / (2 * c2) + x.mean()
        minima[:, index] = np.where((c2 > 0) & (at > x.min()) & (at < x.max()), at, np.nan)
    have = np.isfinite(minima)
    log_flops = np.log([b.flops for b in budgets])
    count = np.maximum(have.sum(axis=1), 1)
    known = np.where(have, minima, 0.0)
    centred = np.where(have, log_flops - (np.where(have, log_flops, 0.0).sum(axis=1) / count)[:, None], 0.0)
    spread = (centred**2).sum(axis=1)
    slope = (centred * known).sum(axis=1) / np.where(spread > 0, spread, 1.0)
    # Where budgets dropped out the mean is of other budgets: moved along the slope to that of all.
    level = known.sum(axis=1) / count + slope * (log_flops.mean() - np.where(have, log_flops, 0.0).sum(axis=1) / count)
    fitted = np.column_stack([level, slope])
    fitted[have.sum(axis=1) < MIN_BUDGETS] = np.nan
    return fitted
