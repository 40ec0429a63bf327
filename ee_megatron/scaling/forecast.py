"""What fitted laws say of sizes, token counts and budgets that were not trained, and how far beyond the data these lie.

Shape suffix: S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .fit import LawFit, with_derived
from .intervals import LEVEL, BootstrapInterval, percentile_interval
from .isoflop_law import IsoFlopFit
from .loss_law import PARAMETERS, predict
from .solver import Array
from .table import FLOPS_PER_PARAMETER_AND_TOKEN, Observations


@dataclass(frozen=True)
class Forecast:
    """`quantity` ("loss" or "N_opt") at `where`, with 95 % intervals: of the law, and of one run's loss, which has a
    run's noise besides (None for N_opt). `beyond` names what lies outside the table, and how far."""

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


def forecast_lines(forecasts: Sequence[Forecast]) -> list[str]:
    """A table for the terminal."""
    lines = [
        f"  {'method':<8} {'at':<32} {'':<6} {'value':>10}  {'law, 95 %':<24} {'one run, 95 %':<24} beyond the data"
    ]
    for one in forecasts:
        where = ", ".join(f"{name} {value:.4g}" for name, value in one.where.items())
        intervals = (f"[{i.low:.4g}, {i.high:.4g}]" if i is not None else "" for i in (one.law, one.run))
        law, run = intervals
        lines.append(
            f"  {one.method:<8} {where:<32} {one.quantity:<6} {one.value:>10.4g}  {law:<24} {run:<24} "
            f"{', '.join(one.beyond) or 'no'}"
        )
    return lines


def _exp(interval: BootstrapInterval) -> BootstrapInterval:
    return BootstrapInterval(float(np.exp(interval.low)), float(np.exp(interval.high)))


def _beyond(name: str, value: float, known: Array) -> list[str]:
    low, high = float(known.min()), float(known.max())
    # Equal but for rounding is not beyond.
    if value > high * (1 + 1e-9):
        return [f"{name} {value / high:.3g} × the largest"]
    return [f"{name} 1/{low / value:.3g} of the smallest"] if value < low * (1 - 1e-9) else []
