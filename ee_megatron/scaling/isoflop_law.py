"""Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2): per compute budget a parabola of loss in ln N,
its minimum as N_opt, then the power law N_opt = k C^a through the minima.

Shape suffixes: S resamples, R rows of a budget, B budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .intervals import BootstrapInterval, percentile_interval
from .refusal import Refused
from .solver import Array
from .table import Observations

# Budgets are planned as equal and come out a few per cent apart: rows within a tenth of the next are one budget.
BUDGET_GAP = np.log(1.1)
MAX_SPAN = 1.25
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
    interval: BootstrapInterval
    left_out: list[str]
    draws: Array = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "exponent_a": {"value": self.exponent, **self.interval._asdict()},
            "coefficient": self.coefficient,
            "budgets": [{"flops": b.flops, "params_opt": b.params, "loss": b.loss} for b in self.budgets],
            "budgets_left_out": self.left_out,
            "interval": f"bootstrap of runs' residuals, {len(self.draws)} resamples",
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
    fitted = [_parabola(obs, np.flatnonzero(budget == index)) for index in range(int(budget.max()) + 1)]
    kept = [one for one in fitted if isinstance(one, Budget)]
    left_out = [one for one in fitted if isinstance(one, str)]
    if len(kept) < MIN_BUDGETS:
        why = f" ({'; '.join(left_out[:3])}{'; …' if len(left_out) > 3 else ''})" if left_out else ""
        raise Refused(
            f"{len(kept)} compute budgets with a minimum; expected at least {MIN_BUDGETS}, since two always lie on "
            f"a power law{why}; train at least {MIN_SIZES} sizes at each of {MIN_BUDGETS} budgets"
        )
    coefficient, exponent = _power_law(kept)
    sampled = _resampled(obs, kept, draws, seed)
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


def _parabola(obs: Observations, rows: Array) -> Budget | str:
    """The budget of these rows [R], or why it is left out."""
    flops = float(np.exp(np.log(obs.flops[rows]).mean()))
    span = float(obs.flops[rows].max() / obs.flops[rows].min())
    x, y = np.log(obs.params[rows]), obs.loss[rows]
    if (sizes := len(np.unique(x))) < MIN_SIZES:
        return f"{flops:.3g} FLOPs: {sizes} distinct sizes, expected at least {MIN_SIZES}"
    if span > MAX_SPAN:
        return f"{flops:.3g} FLOPs: rows differ by a factor of {span:.2f} without a gap, so they are no budget"
    centre = x.mean()
    c2, c1, c0 = np.polyfit(x - centre, y, 2)
    if c2 <= 0:
        return f"{flops:.3g} FLOPs: the parabola opens downwards, so it has no minimum"
    at = -c1 / (2 * c2) + centre
    if not x.min() < at < x.max():
        side = "above" if at >= x.max() else "below"
        return f"{flops:.3g} FLOPs: the minimum lies {side} the sizes that were trained"
    whole = (float(c0 - c1 * centre + c2 * centre**2), float(c1 - 2 * c2 * centre), float(c2))
    return Budget(flops, whole, float(np.exp(at)), float(c0 - c1**2 / (4 * c2)), rows)


def _power_law(budgets: list[Budget]) -> tuple[float, float]:
    slope, offset = np.polyfit(np.log([b.flops for b in budgets]), np.log([b.params for b in budgets]), 1)
    return float(np.exp(offset)), float(slope)


def _resampled(obs: Observations, budgets: list[Budget], draws: int, seed: int) -> Array:
    """Mean ln N_opt and exponent [S, 2] of tables with the fitted losses and, for each run, the relative residuals of a
    run drawn from all; NaN where fewer than three budgets have a minimum within their sizes.

    Drawing runs with their sizes would leave many resamples of five to nine sizes without a parabola. Residuals are
    drawn from all budgets together: a budget's own ends, which decide its minimum, have too few to show their spread
    (a wild bootstrap, which keeps each run its own, covered 89 to 92 %; docs/scaling.md). They are enlarged by what
    the parabola took from them, √(m/(m - 3)) for m runs.
    """
    fits, residuals = [], []
    for budget in budgets:
        x, loss, runs = np.log(obs.params[budget.rows]), obs.loss[budget.rows], len(np.unique(obs.runs[budget.rows]))
        powers = np.vander(x - x.mean(), 3, increasing=True)
        inverse = np.linalg.pinv(powers)
        fitted = powers @ (inverse @ loss)
        fits.append((x, inverse, fitted))
        residuals.append((loss / fitted - 1) * np.sqrt(runs / max(1, runs - 3)))
    residual = np.concatenate(residuals)
    rows = np.concatenate([budget.rows for budget in budgets])
    noise = _drawn_residuals(obs.runs[rows], residual - residual.mean(), draws, seed)
    minima = np.full((draws, len(budgets)), np.nan)
    start = 0
    for index, (x, inverse, fitted) in enumerate(fits):
        losses = fitted * (1 + noise[:, start : start + len(x)])
        start += len(x)
        _, c1, c2 = inverse @ losses.T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = -c1 / (2 * c2) + x.mean()
        minima[:, index] = np.where((c2 > 0) & (at > x.min()) & (at < x.max()), at, np.nan)
    return _exponents(minima, np.log([b.flops for b in budgets]))


def _drawn_residuals(runs: Array, residual: Array, draws: int, seed: int) -> Array:
    """[S, R]: the rows of each run take, in their order, the residuals of one drawn run, from the first again where it
    has fewer. So rows that share a run go on sharing its noise."""
    _, run, length = np.unique(runs, return_inverse=True, return_counts=True)
    order = np.argsort(run, kind="stable")
    first = np.concatenate([[0], np.cumsum(length)[:-1]])
    place = np.empty(len(runs), dtype=int)
    place[order] = np.arange(len(runs)) - first[run[order]]
    donor = np.random.default_rng(seed).integers(len(length), size=(draws, len(length)))[:, run]
    return np.asarray(residual[order][first[donor] + place % length[donor]])


def _exponents(minima: Array, log_flops: Array) -> Array:
    """Line through the known of minima [S, B]: its height at the mean of log_flops [B], and its slope [S, 2]."""
    lines, known = np.full((len(minima), 2), np.nan), np.isfinite(minima)
    for have in np.unique(known, axis=0):
        if have.sum() >= MIN_BUDGETS:
            alike = (known == have).all(axis=1)
            lines[alike] = np.polyfit(log_flops[have] - log_flops.mean(), minima[alike][:, have].T, 1)[::-1].T
    return lines
