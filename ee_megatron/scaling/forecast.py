"""What fitted laws and forms say of runs that were not made, and how far beyond the data these lie.

Shape suffixes: S resamples, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from .compare import Comparison, FormResult
from .fit import LawFit, with_derived
from .forms import evaluate
from .intervals import LEVEL, BootstrapInterval, percentile_interval
from .isoflop_law import IsoFlopFit
from .loss_law import PARAMETERS, predict
from .solver import Array
from .table import FLOPS_PER_PARAMETER_AND_TOKEN, Observations


@dataclass(frozen=True)
class Forecast:
    """`quantity` ("loss", "N_opt" or a metric's column) at `where`, with 95 % intervals: of the law, and of one run,
    which has a run's noise besides (None for N_opt). `beyond` names what lies outside the table, and how far."""

    method: str
    where: dict[str, float]
    quantity: str
    value: float
    law: BootstrapInterval
    run: BootstrapInterval | None
    beyond: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        intervals = {"interval_of_law": self.law._asdict()}
        if self.run is not None:
            intervals["interval_of_run"] = self.run._asdict()
        facts = {"method": self.method, "at": self.where, "quantity": self.quantity, "value": self.value}
        return {**facts, **intervals, "beyond": list(self.beyond)}


def forecast_losses(
    method: str, fit: LawFit, obs: Observations, points: Sequence[tuple[float, float]], seed: int
) -> list[Forecast]:
    """Losses at points (N, D). Quantiles of the resampled laws; least squares' are widened as in its intervals. A run's
    noise is drawn from the residuals of ln loss, enlarged by what the law's five parameters took of them."""
    values = np.array([[fit.values[name] for name in PARAMETERS]])
    runs, fitted = obs.run_count, len(PARAMETERS)
    size, tokens = (np.array(column) for column in zip(*points, strict=True))
    found, draws = np.log(predict(values, size, tokens)[0]), np.log(predict(fit.draws, size, tokens))
    freedom = runs - fitted if method == "varpro" else 0
    if freedom:
        draws = found + (draws - found) * np.sqrt(runs / freedom)
    residual = np.log(obs.loss) - np.log(predict(values, obs.params, obs.tokens)[0])
    noise = np.random.default_rng(seed).choice(residual * np.sqrt(runs / (runs - fitted)), size=len(draws))
    forecasts = []
    for index, (n, d) in enumerate(points):
        law = _exp(percentile_interval(draws[:, index], freedom))
        run = _exp(percentile_interval(draws[:, index] + noise, freedom))
        beyond = [*_beyond("N", n, obs.params), *_beyond("D", d, obs.tokens)]
        value = float(np.exp(found[index]))
        forecasts.append(Forecast(method, {"params": n, "tokens": d}, "loss", value, law, run, tuple(beyond)))
    return forecasts


def forecast_optima(
    method: str, fit: LawFit | IsoFlopFit, obs: Observations, budgets: Sequence[float]
) -> list[Forecast]:
    """The best size at budgets of C FLOPs."""
    forecasts = []
    for flops in budgets:
        if isinstance(fit, IsoFlopFit):
            value = fit.coefficient * flops**fit.exponent
            middle = float(np.log([b.flops for b in fit.budgets]).mean())
            draws = fit.draws[:, 0] + fit.draws[:, 1] * (np.log(flops) - middle)
            known = np.array([b.flops for b in fit.budgets])
        else:
            scale = np.log(flops / FLOPS_PER_PARAMETER_AND_TOKEN)
            value = fit.values["coefficient_G"] * float(np.exp(fit.values["exponent_a"] * scale))
            share, coefficient = with_derived(fit.draws)[:, len(PARAMETERS) :].T
            draws = np.log(np.maximum(coefficient, 1e-300)) + share * scale
            known = obs.flops
        law = _exp(percentile_interval(draws, level=LEVEL))
        forecasts.append(
            Forecast(method, {"flops": flops}, "N_opt", value, law, None, tuple(_beyond("C", flops, known)))
        )
    return forecasts


ANY_FORM = "any of these"


def forecast_metric(comparison: Comparison, point: Sequence[float]) -> list[Forecast]:
    """The metric at a point [C] of the columns as they are in a table, by the best form and by those that cannot be
    told from it. Where there are such, the last forecast is the best form's with intervals that hold all of theirs.

    Quantiles of the resampled curves, widened as least squares' are; a run's noise is the held-out error.
    """
    forecasts = [forecast_form(comparison, result, point) for result in (comparison.best, *comparison.near)]
    if len(forecasts) > 1:
        law, run = (
            BootstrapInterval(min(i.low for i in every), max(i.high for i in every))
            for every in ([f.law for f in forecasts], [f.run for f in forecasts if f.run is not None])
        )
        forecasts.append(replace(forecasts[0], method=ANY_FORM, law=law, run=run))
    return forecasts


def forecast_form(comparison: Comparison, result: FormResult, point: Sequence[float]) -> Forecast:
    """What one form says of the metric at a point [C]."""
    feats = comparison.feats
    at = np.array(point, dtype=np.float64)
    raw = np.array([x if c == feats.penalty else math.log(x) for c, x in enumerate(at)])
    design = result.form.design(feats.standardised(raw[:, None]), feats.penalty)
    value = float(evaluate(result.form, result.theta[None], design)[0, 0])
    draws = evaluate(result.form, result.draws, design)[:, 0]
    runs = int(comparison.runs.max()) + 1
    freedom = runs - len(result.theta)
    wide = percentile_interval(value + (draws - value) * math.sqrt(runs / freedom), freedom)
    one = _of_one_run(result, comparison.values, value, wide, float(stdtrit(freedom, (1 + LEVEL) / 2)))
    # Widening knows nothing of where a form's values end.
    law, run = (BootstrapInterval(*np.clip(ends, *result.form.range).tolist()) for ends in (wide, one))
    where = dict(zip(feats.names, at.tolist(), strict=True))
    return Forecast(result.form.name, where, comparison.metric, value, law, run, _beyond_columns(comparison, at, raw))


def noise_of(result: FormResult, values: Array) -> tuple[float, bool]:
    """A run's noise as the held-out error of a form, in the metric's unit or, true, as a standard deviation of ln:
    whichever makes the errors likelier, the normal or the log-normal distribution."""
    predicted = result.predicted
    if (values <= 0).any() or (predicted <= 0).any():
        return result.error, False
    relative = float(np.sqrt((np.log(values / predicted) ** 2).mean()))
    # Log-likelihoods per row, without what both have; of exact data neither is likelier.
    least = 1e-300
    by_unit, by_share = (
        -math.log(max(sd, least)) for sd in (float(np.sqrt(((values - predicted) ** 2).mean())), relative)
    )
    share = by_share - float(np.log(values).mean()) > by_unit
    return (relative if share else result.error), share


def _of_one_run(
    result: FormResult, values: Array, value: float, law: BootstrapInterval, quantile: float
) -> BootstrapInterval:
    """The law's interval with a run's noise: distances from `value` and noise add up as independent errors do."""
    noise, share = noise_of(result, values)
    if not share or min(value, law.low) <= 0:
        # A share of a value that may be 0 is taken in the metric's unit.
        noise *= quantile * (abs(value) if share else 1.0)
        return BootstrapInterval(
            value - math.hypot(value - law.low, noise), value + math.hypot(law.high - value, noise)
        )
    down, up = (math.hypot(math.log(end / value), quantile * noise) for end in law)
    return BootstrapInterval(value * math.exp(-down), value * math.exp(up))


def _beyond_columns(comparison: Comparison, at: Array, raw: Array) -> tuple[str, ...]:
    """Columns whose range the point [C] leaves; else whether no run has such a combination of them: it lies further
    from their middle, by their covariance, than any run."""
    feats = comparison.feats
    known = [row if c == feats.penalty else np.exp(row) for c, row in enumerate(comparison.raw)]
    beyond = [text for name, x, column in zip(feats.names, at, known, strict=True) for text in _beyond(name, x, column)]
    if not beyond and len(at) > 1:
        inverse = np.linalg.inv(np.cov(feats.values, bias=True))
        here = feats.standardised(raw[:, None])
        furthest = np.einsum("cr,cd,dr->r", feats.values, inverse, feats.values).max()
        if float((here.T @ inverse @ here)[0, 0]) > furthest * (1 + 1e-9):
            beyond = [f"{', '.join(feats.names)} together"]
    return tuple(beyond)


def forecast_lines(forecasts: Sequence[Forecast]) -> list[str]:
    """A table for the terminal."""
    header = ("method", "at", "", "value", "law, 95 %", "one run, 95 %", "beyond the data")
    rows = [
        (one.method, point_text(one.where), one.quantity, f"{one.value:.4g}", interval_text(one.law),
         interval_text(one.run), ", ".join(one.beyond) or "no")
        for one in forecasts
    ]  # fmt: skip
    return columns_text([header, *rows])


def point_text(where: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in where.items())


def interval_text(interval: BootstrapInterval | None) -> str:
    return "" if interval is None else f"[{interval.low:.4g}, {interval.high:.4g}]"


def columns_text(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _exp(interval: BootstrapInterval) -> BootstrapInterval:
    return BootstrapInterval(float(np.exp(interval.low)), float(np.exp(interval.high)))


def _beyond(name: str, value: float, known: Array) -> list[str]:
    low, high = float(known.min()), float(known.max())
    # Equal but for rounding is not beyond.
    if low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
        return []
    if value <= 0 or high <= 0 or (value < low and low <= 0):
        return [f"{name} outside {low:.3g} to {high:.3g}"]
    return [
        f"{name} {value / high:.3g} × the largest" if value > high else f"{name} 1/{low / value:.3g} of the smallest"
    ]
