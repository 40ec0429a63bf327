"""Fits of the loss law with intervals and held-out errors, as records that print, plot and go into JSON.

Shape suffixes: S resamples, R rows, K quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import loss_law
from .intervals import BootstrapInterval, bca_interval, leave_one_run_out, resample_runs
from .isoflop_law import IsoFlopFit, fit_isoflop
from .loss_law import PARAMETERS, Design, Fits
from .refusal import Refused, check_bounds, check_design, enough_cells
from .solver import Array
from .table import Observations

METHODS = ("huber", "varpro", "isoflop")
DERIVED = ("exponent_a", "coefficient_G")
BOUNDS = (*["0"] * 3, *[f"{loss_law.EXPONENT_LOW:g} or {loss_law.EXPONENT_HIGH:g}"] * 2)
STARTS = 24
FOLDS = 5


@dataclass(frozen=True)
class HeldOut:
    """Root mean square of ln(predicted / measured loss) over rows that the fit had not seen; `constant` is that of the
    training rows' mean ln loss. `error` is None where nothing could be left out, and `how` says why."""

    how: str
    error: float | None
    constant: float | None


@dataclass(frozen=True)
class LawFit:
    """L(N, D) = E + A/N^alpha + B/D^beta by one method.

    values and intervals: PARAMETERS, then exponent_a and coefficient_G of N_opt = G (C/6)^a. draws [S, 5].
    """

    method: str
    values: dict[str, float]
    intervals: dict[str, BootstrapInterval]
    residual: float
    held_out: list[HeldOut]
    interval_kind: str
    draws: Array = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        return {
            "parameters": {
                name: {"value": value, **self.intervals[name]._asdict()} for name, value in self.values.items()
            },
            "residual_rms_log": self.residual,
            "held_out": [{"how": h.how, "rms_log": h.error, "constant_rms_log": h.constant} for h in self.held_out],
            "interval": self.interval_kind,
        }


def fit_law(obs: Observations, method: str, draws: int, seed: int) -> LawFit:
    """`method` huber or varpro, with 95 % intervals from `draws` resamples of whole runs.

    Least squares has the expanded BCa interval, Huber's loss the plain one: with delta far below the noise it is nearly
    the sum of absolute residuals, whose percentiles cover too much already (docs/scaling.md has the coverage of both).
    Raises Refused where the data do not determine a parameter.
    """
    check_design(obs.params, obs.tokens, obs.runs)
    design = Design.of(obs.params, obs.tokens, obs.loss)
    solve = _solver(design, method)
    everything = np.ones(len(obs.loss))
    point = best_of_grid(design, solve, everything)
    # Said before anything is resampled: the intervals would be around a bound.
    check_bounds(PARAMETERS, point.bound[0].astype(float), BOUNDS, "the fits to all runs")
    weights = resample_runs(obs.runs, draws, seed, lambda rows: enough_cells(obs.params, obs.tokens, rows))
    sampled = solve(weights, np.repeat(point.values, draws, axis=0))
    check_bounds(PARAMETERS, sampled.bound.mean(axis=0), BOUNDS, f"{draws} resamples")
    left_out = leave_one_run_out(obs.runs)
    jackknife = solve(left_out, np.repeat(point.values, len(left_out), axis=0))
    fitted = len(PARAMETERS) if method == "varpro" else 0
    value_K, draws_SK, jackknife_GK = (with_derived(v) for v in (point.values, sampled.values, jackknife.values))
    names = (*PARAMETERS, *DERIVED)
    intervals = {
        name: bca_interval(float(value_K[0, k]), draws_SK[:, k], jackknife_GK[:, k], fitted)
        for k, name in enumerate(names)
    }
    residual = np.log(loss_law.predict(point.values, obs.params, obs.tokens)[0] / obs.loss)
    kind = f"{'expanded ' if fitted else ''}BCa bootstrap over runs, {draws} resamples"
    return LawFit(
        method,
        {name: float(value_K[0, k]) for k, name in enumerate(names)},
        intervals,
        float(np.sqrt((residual**2).mean())),
        held_out_errors(obs, design, solve, seed),
        kind,
        sampled.values,
    )


Solver = Callable[[Array, Array], Fits]


def _solver(design: Design, method: str) -> Solver:
    if method == "huber":
        return lambda weights, start: loss_law.huber(design, weights, start)
    return lambda weights, start: loss_law.variable_projection(design, weights, start[:, 3:])


def best_of_grid(design: Design, solve: Solver, weights: Array) -> Fits:
    """The lowest minimum from the STARTS best points of the grid, for one weighting [R]: Fits of one problem."""
    start = loss_law.grid_starts(design, weights, STARTS)
    found = solve(np.broadcast_to(weights, (len(start), len(weights))), start)
    best = int(np.argmin(found.objective))
    return Fits(found.values[best : best + 1], found.objective[best : best + 1], found.bound[best : best + 1])


def with_derived(values: Array) -> Array:
    """PARAMETERS [S, 5] with DERIVED behind them [S, 7]: a = beta/(alpha + beta) and
    G = (alpha A / (beta B))^(1/(alpha + beta)) (Hoffmann et al. 2022, equation 4)."""
    _, a, b, alpha, beta = values.T
    share = beta / (alpha + beta)
    # In a few resamples (no more, see check_bounds) a term may be absent: an extreme G, not an undefined one.
    least = 1e-300
    ratio = np.log(np.maximum(alpha * a, least)) - np.log(np.maximum(beta * b, least))
    coefficient = np.exp(np.minimum(ratio / (alpha + beta), 700.0))
    return np.column_stack([values, share, coefficient])


def held_out_errors(obs: Observations, design: Design, solve: Solver, seed: int) -> list[HeldOut]:
    """Two errors: the largest size left out (extrapolation), and folds of whole runs (interpolation)."""
    largest = obs.params == obs.params.max()
    folds = np.random.default_rng(seed).permutation(np.arange(obs.run_count) % FOLDS)[obs.runs]
    return [
        _held_out(obs, design, solve, [largest], f"largest size ({obs.params.max():.3g} parameters) left out"),
        _held_out(obs, design, solve, [folds == k for k in range(FOLDS)], f"{FOLDS} folds over {obs.run_count} runs"),
    ]


def _held_out(obs: Observations, design: Design, solve: Solver, parts: list[Array], how: str) -> HeldOut:
    squares, constants = [], []
    for out in parts:
        if not out.any():
            continue
        if not enough_cells(obs.params, obs.tokens, ~out):
            return HeldOut(f"{how}: not measured, too few sizes or token counts are left to fit", None, None)
        values = best_of_grid(design, solve, (~out).astype(float)).values
        predicted = np.log(loss_law.predict(values, obs.params[out], obs.tokens[out])[0])
        squares.append((predicted - np.log(obs.loss[out])) ** 2)
        constants.append((np.log(obs.loss[~out]).mean() - np.log(obs.loss[out])) ** 2)
    error, constant = (float(np.sqrt(np.concatenate(part).mean())) for part in (squares, constants))
    return HeldOut(how, error, constant)


FitOrRefusal = LawFit | IsoFlopFit | Refused


def fit_all(obs: Observations, methods: tuple[str, ...], draws: int, seed: int) -> dict[str, FitOrRefusal]:
    """Each method's fit, or why it was refused."""
    outcomes: dict[str, FitOrRefusal] = {}
    for method in methods:
        try:
            isoflop = method == "isoflop"
            outcomes[method] = fit_isoflop(obs, draws, seed) if isoflop else fit_law(obs, method, draws, seed)
        except Refused as refusal:
            outcomes[method] = refusal
    return outcomes
