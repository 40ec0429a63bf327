"""Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.2): per compute budget a curve of loss in ln N, its
minimum as N_opt, then the power law N_opt = k C^a through the minima. The curve is that of `isoflop_curve`, not their
parabola.

Shape suffixes: S resamples, R rows, B budgets, W rows of a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .intervals import BootstrapInterval, percentile_interval
from .isoflop_curve import CurveFits, Ladder, curve, fit_curves, misfit, parameters
from .refusal import Refused
from .solver import Array
from .table import Observations

# Budgets are planned as equal and come out a few per cent apart: rows within a tenth of the next are one budget.
BUDGET_GAP = np.log(1.1)
MAX_SPAN = 1.25
MIN_SIZES = 5
"""Three points fix a budget's curve; two more show the noise, without which there is no interval."""
MIN_BUDGETS = 3
"""Two fix a power law; the third shows whether it is one."""
MAX_FAILED = 0.05
WINDOWS = (np.inf, 10.0, 5.0, 3.0)
"""Factors of the minimum within which sizes are used: the widest one in which the curve fits."""
MISFIT = 0.01
"""A window whose residuals would be as crooked less often than this, if the form were right, is too wide."""


@dataclass(frozen=True)
class Budget:
    """One curve: `flops` is the geometric mean of its rows, `params` its N_opt, `loss` the loss there, `rows` those
    used. `centre`, `steepness` [2] and `coefficients` [3]: see `isoflop_curve.curve`."""

    flops: float
    params: float
    loss: float
    rows: Array
    centre: float
    steepness: Array
    coefficients: Array

    def at(self, params: Array) -> Array:
        """The curve's loss at sizes N."""
        return curve(self.steepness, self.coefficients, np.log(params) - self.centre)


@dataclass(frozen=True)
class IsoFlopFit:
    """N_opt = coefficient · C^exponent with the exponent's 95 % interval; `left_out` says why budgets are missing.

    steepness [2]: how the loss rises to the left and right of a minimum. window: sizes beyond this factor of their
    minimum were not used (inf: all were). draws [S, 2]: mean ln N_opt of the budgets, and the exponent.
    """

    budgets: list[Budget]
    exponent: float
    coefficient: float
    interval: BootstrapInterval
    left_out: list[str]
    steepness: tuple[float, float]
    window: float
    draws: Array = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "exponent_a": {"value": self.exponent, **self.interval._asdict()},
            "coefficient": self.coefficient,
            "budgets": [{"flops": b.flops, "params_opt": b.params, "loss": b.loss} for b in self.budgets],
            "budgets_left_out": self.left_out,
            "steepness": list(self.steepness),
            "window": self.window if np.isfinite(self.window) else None,
            "interval": f"bootstrap of runs' residuals, {len(self.draws)} resamples",
        }


def group_budgets(flops: Array, within: float | None = None) -> Array:
    """The budget 0..B-1 of each row [R], in ascending order of FLOPs: up to the next gap, or, if `within` is given, up
    to 1 + within times the budget's least FLOPs."""
    order = np.argsort(flops, kind="stable")
    if within is None:
        number = np.concatenate([[0], np.cumsum(np.diff(np.log(flops[order])) > BUDGET_GAP)])
    else:
        number = np.empty(len(flops), dtype=int)
        count, least = -1, 0.0
        for place, value in enumerate(flops[order]):
            if count < 0 or value > least * (1 + within):
                count, least = count + 1, value
            number[place] = count
    budget = np.empty(len(flops), dtype=int)
    budget[order] = number
    return budget


def fit_isoflop(obs: Observations, draws: int, seed: int) -> IsoFlopFit:
    """Fit with an interval from resampled runs. Raises Refused where fewer than three budgets have a minimum within
    their sizes, the curve fits them in no window, or more than a twentieth of the resamples have no minima."""
    named = obs.budgets is not None
    budget = obs.budgets if obs.budgets is not None else group_budgets(obs.flops)
    parts = [np.flatnonzero(budget == label) for label in np.unique(budget)]
    parts.sort(key=lambda rows: float(np.log(obs.flops[rows]).mean()))
    faults = [_unfit(obs, rows, named) for rows in parts]
    left_out = [fault for fault in faults if fault]
    rows = [part for part, fault in zip(parts, faults, strict=True) if not fault]
    _enough(rows, left_out)
    used, fits, window = _widest(obs, rows, left_out)
    ladder = _ladder(obs, used)
    budgets = _budgets(obs, used, ladder, fits)
    log_flops = np.log([b.flops for b in budgets])
    exponent, offset = np.polyfit(log_flops, np.log([b.params for b in budgets]), 1)
    sampled = _resampled(obs, used, ladder, fits, draws, seed)
    good = sampled[np.isfinite(sampled[:, 1])]
    if len(good) < (1 - MAX_FAILED) * draws:
        raise Refused(
            f"{1 - len(good) / draws:.0%} of the resamples have fewer than {MIN_BUDGETS} budgets with a minimum within "
            f"their sizes; expected at most {MAX_FAILED:.0%}; add sizes on both sides of each minimum"
        )
    runs, left = _freedom(obs, used)
    interval = percentile_interval(good[:, 1], max(1, round(runs * left)))
    alpha, beta = fits.steepness[0].tolist()
    return IsoFlopFit(
        budgets, float(exponent), float(np.exp(offset)), interval, left_out, (alpha, beta), float(window), good
    )


def _widest(obs: Observations, rows: list[Array], left_out: list[str]) -> tuple[list[Array], CurveFits, float]:
    """Rows, fits and width of the widest window in which the curve fits; adds to `left_out`."""
    fits, chance = None, 0.0
    for window in WINDOWS:
        near = rows if fits is None else _nearby(obs, rows, fits, window)
        rows, fits, lost = _with_minima(obs, near)
        left_out += lost
        _enough(rows, left_out)
        chance = misfit(_ladder(obs, rows), fits)
        if chance >= MISFIT:
            return rows, fits, window
    raise Refused(
        f"no curve with one minimum fits the budgets, not even within a factor of {WINDOWS[-1]:g} of their minima "
        f"(residuals as crooked come by chance with probability {chance:.2g}); expected losses smooth in size; "
        "look for runs with another learning rate, schedule or data and leave them out with --where"
    )


def _unfit(obs: Observations, rows: Array, named: bool) -> str:
    """Why these rows are no budget, or nothing. Budgets that the user named may be as wide as they are."""
    flops = _flops(obs, rows)
    span = float(obs.flops[rows].max() / obs.flops[rows].min())
    if (sizes := len(np.unique(obs.params[rows]))) < MIN_SIZES:
        return f"{flops:.3g} FLOPs: {sizes} distinct sizes, expected at least {MIN_SIZES}"
    if span > MAX_SPAN and not named:
        return (
            f"{flops:.3g} FLOPs: rows differ by a factor of {span:.2f} without a gap, so they are no budget; "
            "name budgets with --budget COLUMN or --budget-within SHARE"
        )
    return ""


def _flops(obs: Observations, rows: Array) -> float:
    return float(np.exp(np.log(obs.flops[rows]).mean()))


def _enough(rows: Sequence[Array], left_out: Sequence[str]) -> None:
    if len(rows) < MIN_BUDGETS:
        why = f" ({'; '.join(left_out[:3])}{'; …' if len(left_out) > 3 else ''})" if left_out else ""
        raise Refused(
            f"{len(rows)} compute budgets with a minimum; expected at least {MIN_BUDGETS}, since two always lie on "
            f"a power law{why}; train at least {MIN_SIZES} sizes at each of {MIN_BUDGETS} budgets"
        )


def _with_minima(obs: Observations, rows: list[Array]) -> tuple[list[Array], CurveFits, list[str]]:
    """The budgets that have a minimum within their sizes, fitted together, and why others are left out. Those that have
    none leave before the rest is fitted again: they would have had a say in the steepness."""
    lost: list[str] = []
    while True:
        ladder = _ladder(obs, rows)
        # Every loss times its weight is 1.
        fits = fit_curves(ladder, (ladder.weight > 0).astype(float)[None])
        minima = ladder.centre + fits.minima()[0]
        faults = [_lost(obs, part, at) for part, at in zip(rows, minima, strict=True)]
        lost += [fault for fault in faults if fault]
        kept = [part for part, fault in zip(rows, faults, strict=True) if not fault]
        if len(kept) == len(rows) or not kept:
            return kept, fits, lost
        rows = kept


def _lost(obs: Observations, rows: Array, minimum: float) -> str:
    """Why a budget whose curve has its minimum at this ln N is left out, or nothing."""
    x, flops = np.log(obs.params[rows]), _flops(obs, rows)
    if np.isnan(minimum):
        return f"{flops:.3g} FLOPs: the curve opens downwards, so it has no minimum"
    if not x.min() < minimum < x.max():
        side = "above" if minimum >= x.max() else "below"
        return f"{flops:.3g} FLOPs: the minimum lies {side} the sizes that were trained"
    return ""


def _nearby(obs: Observations, rows: list[Array], fits: CurveFits, window: float) -> list[Array]:
    """Of each budget the rows within a factor of its minimum, but at least those of the MIN_SIZES nearest sizes."""
    ladder, near = _ladder(obs, rows), []
    for part, centre, minimum in zip(rows, ladder.centre, fits.minima()[0], strict=True):
        distance = np.abs(np.log(obs.params[part]) - centre - minimum)
        # Of sizes, not of distances: two sizes may lie equally far on either side.
        _, first = np.unique(obs.params[part], return_index=True)
        reach = np.sort(distance[first])[MIN_SIZES - 1]
        near.append(part[distance <= max(np.log(window), reach)])
    return near


def _ladder(obs: Observations, rows: Sequence[Array]) -> Ladder:
    """Budgets padded to the longest, each centred on its lowest loss, losses weighted to be relative."""
    width = max((len(part) for part in rows), default=0)
    offset, weight = np.zeros((2, len(rows), width))
    centre = np.empty(len(rows))
    for index, part in enumerate(rows):
        x = np.log(obs.params[part])
        centre[index] = x[np.argmin(obs.loss[part])]
        offset[index, : len(part)], weight[index, : len(part)] = x - centre[index], 1 / obs.loss[part]
    return Ladder(offset, weight, centre)


def _budgets(obs: Observations, rows: Sequence[Array], ladder: Ladder, fits: CurveFits) -> list[Budget]:
    found = []
    for index, (part, offset) in enumerate(zip(rows, fits.minima()[0], strict=True)):
        steepness, coefficients = fits.steepness[0], fits.coefficients[0, index]
        centre = float(ladder.centre[index])
        loss = float(curve(steepness, coefficients, np.array([offset]))[0])
        found.append(
            Budget(_flops(obs, part), float(np.exp(centre + offset)), loss, part, centre, steepness, coefficients)
        )
    return found


def _freedom(obs: Observations, rows: Sequence[Array]) -> tuple[int, float]:
    """Independent runs, and the share of them that is left once the curves are fitted, as far as budgets don't share
    their runs."""
    runs = len(np.unique(np.concatenate([obs.runs[part] for part in rows])))
    in_budgets = sum(len(np.unique(obs.runs[part])) for part in rows)
    return runs, max(1 - parameters(len(rows)) / in_budgets, 1 / runs)


def _resampled(obs: Observations, rows: list[Array], ladder: Ladder, fits: CurveFits, draws: int, seed: int) -> Array:
    """Mean ln N_opt and exponent [S, 2] of tables with the fitted losses and, for each run, the relative residuals of a
    run drawn from all; NaN where fewer than three budgets have a minimum within their sizes.

    Drawing runs with their sizes would leave many resamples of five to nine sizes without a curve. Residuals are drawn
    from all budgets together: a budget's own ends, which decide its minimum, have too few to show their spread (a wild
    bootstrap, which keeps each run its own, covered 89 to 92 %; docs/scaling.md). They are enlarged by what the curves
    took from them, √(m/(m - p)) for p numbers fitted to m runs.
    """
    there = ladder.weight > 0
    # Weighted losses are 1: what the residuals leave of it is the fitted loss, as a share of the measured one.
    fitted = 1 - fits.residuals[0][there]
    residual = (1 / fitted - 1) / np.sqrt(_freedom(obs, rows)[1])
    noise = _drawn_residuals(obs.runs[np.concatenate(rows)], residual - residual.mean(), draws, seed)
    losses = np.zeros((draws, *there.shape))
    losses[:, there] = fitted * (1 + noise)
    at = fit_curves(ladder, losses).minima()
    low = np.where(there, ladder.offset, np.inf).min(axis=1)
    high = np.where(there, ladder.offset, -np.inf).max(axis=1)
    minima = np.where((at > low) & (at < high), at + ladder.centre, np.nan)
    return _exponents(minima, np.log([_flops(obs, part) for part in rows]))


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
