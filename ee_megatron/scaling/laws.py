"""Laws of the loss: L(N, D) = E + A/N^alpha + B/D^beta, and the best size of isoFLOP budgets, N_opt = k C^a.

Approaches 3 and 2 of Hoffmann et al. 2022 (arXiv 2203.15556). Shape suffixes: S resamples, R rows, B budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import Akima1DInterpolator
from scipy.optimize import OptimizeResult, least_squares

from .bootstrap import Refused, are_collinear, interval_table, resample
from .table import FLOPS_PER_PARAMETER_AND_TOKEN, Array

PARAMETERS = ("E", "A", "B", "alpha", "beta")
HUBER_DELTA = 1e-3
"""Hoffmann et al. 2022, section D.2."""
MIN_DISTINCT = 3
"""Along one axis the law is c + A/x^alpha: three unknowns, so three values of x."""
MIN_RUNS = 12
# Published exponents of loss lie between 0.05 and 0.6; what runs to these bounds is not an exponent of the data.
EXPONENT_LOW, EXPONENT_HIGH = 1e-3, 2.0
# ln of the least E, A/N^alpha or B/D^beta that counts, as a share of the least loss; below it a term is absent.
ABSENT = np.log(1e-4)
NEAR_BOUND = np.array([1e-2, 1e-2, 1e-2, 1e-4, 1e-4])
MAX_AT_BOUND = 0.025
"""Share of resamples on a parameter's bound from which a two-sided 95 % interval reaches it."""

MIN_SIZES = 5
"""Fourth differences, from which the noise of a budget is estimated, take five sizes."""
MIN_BUDGETS = 3
"""Two fix a power law; the third shows whether it is one."""
MAX_LOST = 0.05
STEPS = 50
"""Points between two sizes at which a budget's curve is evaluated."""


@dataclass(frozen=True)
class ScalingFit:
    """A fitted law. table: columns value, low and high (95 %), a row per parameter; freedom: runs less parameters.

    lines [1 + S, 2]: ln k and a of N_opt = k C^a, of the fit and then of its resamples. details: what else goes into
    the output. Of the loss law theta [1 + S, 5] (PARAMETERS) and residuals [R] of ln loss; of isoFLOP `budgets` with
    columns flops (geometric mean), params_opt and the loss there.
    """

    table: pd.DataFrame
    freedom: int
    lines: Array = field(repr=False)
    details: dict[str, Any]
    theta: Array = field(repr=False, default_factory=lambda: np.empty((0, 5)))
    residuals: Array = field(repr=False, default_factory=lambda: np.empty(0))
    budgets: pd.DataFrame = field(default_factory=pd.DataFrame)

    def optima(self, flops: float) -> Array:
        """N_opt at a budget of C FLOPs, by the fit and then by its resamples: [1 + S]."""
        return np.asarray(np.exp(self.lines[:, 0] + self.lines[:, 1] * np.log(flops)))


def predict(theta: Array, params: Array, tokens: Array) -> Array:
    """Predict loss [S, R] of laws [S, 5] (PARAMETERS) at N [R] and D [R]."""
    e, a, b, alpha, beta = (column[:, None] for column in theta.T)
    return np.asarray(e + a * params**-alpha + b * tokens**-beta)


def fit_loss_law(obs: pd.DataFrame, draws: int, seed: int) -> ScalingFit:
    """Fit the loss law by Huber's loss of ln L(N, D) - ln loss, with intervals from `draws` resamples of whole runs.

    obs: see `table.observations`. Raises Refused if the data do not determine a parameter.
    """
    _check_design(obs)
    x, z, y = (np.log(obs[name].to_numpy()) for name in ("params", "tokens", "loss"))
    # Less their means: there the terms' sizes and exponents are nearly independent.
    shift = np.array([0.0, x.mean(), z.mean()])
    x, z = x - shift[1], z - shift[2]
    starts = [np.array([*[y.mean() - np.log(3)] * 3, *pair]) for pair in product((0.1, 0.25, 0.5, 1.0), repeat=2)]
    best = min((_solve(x, z, y, start) for start in starts), key=lambda fit: float(fit.cost))
    _check_bounds(best.at_bound, "the fit to all runs")
    samples = resample(y + best.residual, -best.residual, obs["run"].to_numpy(), len(PARAMETERS), draws, seed)
    refits, at_bound = [], np.zeros(len(PARAMETERS))
    for sample in samples:
        refits.append(_solve(x, z, sample, best.x))
        at_bound += refits[-1].at_bound / draws
        # Checked as they come: fits to data that determine nothing take long.
        _check_bounds(at_bound, f"{draws} resamples")
    centred = np.array([one.x for one in (best, *refits)])
    alpha, beta = centred.T[3:]
    exponents = np.column_stack([0 * alpha, alpha, beta])
    theta = np.column_stack([np.exp(centred[:, :3] + exponents * shift), alpha, beta])
    # Hoffmann et al. 2022, equation 4.
    share, log_g = beta / (alpha + beta), np.log(alpha * theta[:, 1] / (beta * theta[:, 2])) / (alpha + beta)
    columns = dict(zip(PARAMETERS, theta.T, strict=True)) | {"exponent_a": share, "coefficient_G": np.exp(log_g)}
    freedom = obs["run"].nunique() - len(PARAMETERS)
    lines = np.column_stack([log_g - share * np.log(FLOPS_PER_PARAMETER_AND_TOKEN), share])
    details = {"law": "L(N, D) = E + A/N^alpha + B/D^beta; N_opt = G (C/6)^a", "residual_rms_log": _rms(best.residual)}
    return ScalingFit(interval_table(columns, freedom), freedom, lines, details, theta, -best.residual)


def _rms(values: Array) -> float:
    return float(np.sqrt((values**2).mean()))


def _check_design(obs: pd.DataFrame) -> None:
    for name, column in (("parameter counts N", "params"), ("token counts D", "tokens")):
        if (count := obs[column].nunique()) < MIN_DISTINCT:
            raise Refused(f"{count} distinct {name}; expected at least {MIN_DISTINCT}; add runs at other values")
    if (runs := obs["run"].nunique()) < MIN_RUNS:
        raise Refused(f"{runs} runs; expected at least {MIN_RUNS} for five parameters and their intervals; add runs")
    if are_collinear(np.log(obs["params"]), np.log(obs["tokens"])):
        raise Refused(
            "ln N and ln D are collinear (squared correlation above 0.99), so their power laws cannot be "
            "distinguished; expected some sizes on several token counts; add runs"
        )


def _check_bounds(share: Array, fits: str) -> None:
    """Raises Refused if a parameter lies on its bound in too large a share [5] of the fits."""
    worst = int(np.argmax(share))
    if share[worst] > MAX_AT_BOUND:
        raise Refused(
            f"{PARAMETERS[worst]} is not identified: it is on its bound in more than {MAX_AT_BOUND:.1%} of {fits}, so "
            f"its 95 % interval has no end; expected at most that; widen the range of sizes or tokens, or add runs"
        )


def _solve(x: Array, z: Array, y: Array, start: Array) -> OptimizeResult:
    """ln E, ln A, ln B, alpha, beta of least Huber loss for centred ln N, ln D and ln loss [R], from a start [5].

    Besides scipy's fields: residual [R], of ln L - ln loss, and at_bound [5].
    """
    low = np.array([*[y.min() + ABSENT] * 3, EXPONENT_LOW, EXPONENT_LOW])
    high = np.array([*[y.max() + 1.0] * 3, EXPONENT_HIGH, EXPONENT_HIGH])

    def terms(theta: Array) -> Array:
        return np.exp([np.full_like(x, theta[0]), theta[1] - theta[3] * x, theta[2] - theta[4] * z])

    def residual(theta: Array) -> Array:
        return np.asarray(np.log(terms(theta).sum(axis=0)) - y)

    def jacobian(theta: Array) -> Array:
        share = terms(theta)
        share /= share.sum(axis=0)
        return np.column_stack([*share, -share[1] * x, -share[2] * z])

    begin, options = np.clip(start, low + NEAR_BOUND / 2, high - NEAR_BOUND / 2), {"f_scale": HUBER_DELTA}
    fit = least_squares(residual, begin, jacobian, (low, high), x_scale="jac", loss="huber", max_nfev=200, **options)
    fit.residual = residual(fit.x)
    fit.at_bound = (fit.x - low < NEAR_BOUND) | (high - fit.x < NEAR_BOUND)
    return fit


def fit_isoflop(obs: pd.DataFrame, draws: int, seed: int) -> ScalingFit:
    """Fit the exponent of N_opt with an interval from resampled losses.

    Minima are those of Akima curves through ln loss in ln N (Porian et al. 2024, arXiv 2406.19146), not of parabolas.
    obs: see `table.observations`. Raises Refused if fewer than three budgets have a minimum within their sizes, in the
    data or in more than a twentieth of the resamples.
    """
    log_flops = np.log(obs["flops"]).groupby(obs["budget"]).transform("mean")
    usable, best, left_out = {}, [], []
    for at, rows in obs.assign(log_loss=np.log(obs["loss"])).groupby(log_flops):
        if (sizes := rows["params"].nunique()) < MIN_SIZES:
            left_out.append(f"{np.exp(at):.3g} FLOPs: {sizes} distinct sizes, expected at least {MIN_SIZES}")
            continue
        size, loss, inside = _minimum(rows, rows["log_loss"].to_numpy()[None])
        if inside.all():
            usable[at] = rows
            best.append([at, size[0], loss[0]])
        else:
            left_out.append(f"{np.exp(at):.3g} FLOPs: no minimum within the sizes that were trained")
    if len(usable) < MIN_BUDGETS:
        raise Refused(
            f"{len(usable)} compute budgets with a minimum ({'; '.join(left_out[:3]) or 'none left out'}); expected at "
            f"least {MIN_BUDGETS}, since two always lie on a power law; train at least {MIN_SIZES} sizes at each, or "
            f"name budgets with --budget COLUMN"
        )
    used, noise = pd.concat(usable.values()), np.concatenate([_noise(rows) for rows in usable.values()])
    runs = pd.factorize(used["run"])[0]
    samples = resample(used["log_loss"].to_numpy(), noise, runs, 0, draws, seed)
    split = np.split(samples, np.cumsum([len(rows) for rows in usable.values()])[:-1], axis=1)
    minima = [_minimum(rows, sampled) for rows, sampled in zip(usable.values(), split, strict=True)]
    lost = float(np.mean(np.sum([inside for _, _, inside in minima], axis=0) < MIN_BUDGETS))
    if lost > MAX_LOST:
        raise Refused(
            f"{lost:.0%} of the resamples have fewer than {MIN_BUDGETS} budgets with a minimum within their sizes; "
            f"expected at most {MAX_LOST:.0%}; add sizes on both sides of each minimum"
        )
    budgets = pd.DataFrame(best, columns=["flops", "params_opt", "loss"])
    sizes = np.column_stack([budgets["params_opt"], np.array([size for size, _, _ in minima])])
    lines = np.polyfit(budgets["flops"], sizes, 1)[::-1].T
    freedom = min(sum(rows["params"].nunique() - MIN_SIZES + 1 for rows in usable.values()), int(runs.max()))
    table = interval_table({"exponent_a": lines[:, 1], "coefficient_k": np.exp(lines[:, 0])}, freedom)
    details = {"law": "N_opt = k C^a", "noise_log": _rms(noise), "left_out": left_out}
    return ScalingFit(table, freedom, lines, details, budgets=np.exp(budgets))


def interpolate(rows: pd.DataFrame, log_losses: Array) -> tuple[Array, Array]:
    """Akima curves through ln losses [S, R] of one budget (rows of a size averaged): ln N [K], and ln loss [K, S]."""
    log_params, size = np.unique(np.log(rows["params"]), return_inverse=True)
    mean = (np.arange(len(log_params))[:, None] == size) / np.bincount(size)[:, None]
    places = np.linspace(0, len(log_params) - 1, STEPS * (len(log_params) - 1) + 1)
    points = np.interp(places, np.arange(len(log_params)), log_params)
    return points, np.asarray(Akima1DInterpolator(log_params, mean @ log_losses.T)(points))


def _minimum(rows: pd.DataFrame, log_losses: Array) -> tuple[Array, Array, Array]:
    """ln N_opt, the ln loss there, and whether it lies within the sizes, each [S], for ln losses [S, R]."""
    points, curves = interpolate(rows, log_losses)
    at = curves.argmin(axis=0)
    return points[at], curves.min(axis=0), (at > 0) & (at < len(points) - 1)


def _noise(rows: pd.DataFrame) -> Array:
    """The noise of each row's ln loss [R], from fourth divided differences of five sizes with the lowest among them.

    An interpolated curve has no residuals. Fourth differences vanish for cubics and, divided by the norm of their
    weights, have the standard deviation of a row's noise (Gasser, Sroka and Jennen-Steinmetz, Biometrika 73, 1986).
    """
    sizes = rows.groupby("params")["log_loss"].agg(["mean", "size"])
    x, y, counts = np.log(sizes.index.to_numpy()), sizes["mean"].to_numpy(), sizes["size"].to_numpy()
    lowest, noise = int(y.argmin()), np.empty(len(x))
    for index in range(len(x)):
        first = np.clip(index - MIN_SIZES // 2, max(lowest - MIN_SIZES + 1, 0), min(lowest, len(x) - MIN_SIZES))
        five = slice(first, first + MIN_SIZES)
        weights = 1 / (x[five][:, None] - x[five] + np.eye(MIN_SIZES)).prod(axis=1)
        # Weights alternate in sign, and so do the five sizes' parts of one difference.
        noise[index] = (-1) ** index * (weights @ y[five]) / np.sqrt((weights**2 / counts[five]).sum())
    return noise[np.searchsorted(x, np.log(rows["params"]))]
