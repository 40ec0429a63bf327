"""Forecasts of planned runs, and their check against later runs.

A forecast is a record: method, at (a value for each column), quantity, value, 95 % intervals of the law and of one run
(which has a run's noise besides; None for N_opt, which no run measures), and what of it lies beyond the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..families.hf_directory import read_json
from .bootstrap import LEVEL, percentile_interval
from .compare import FormComparison
from .laws import ScalingFit, predict
from .table import RunTable, observations, run_index

ENDS = ("law_low", "law_high", "run_low", "run_high")
Forecast = dict[str, Any]


def forecast_losses(fit: ScalingFit, obs: pd.DataFrame, points: Sequence[Sequence[float]], seed: int) -> list[Forecast]:
    """Forecast losses at points (N, D). A run's noise: residuals of ln loss, enlarged by what the fit took."""
    enlarged = fit.residuals * np.sqrt(obs["run"].nunique() / fit.freedom)
    noise = np.exp(np.random.default_rng(seed).choice(enlarged, size=len(fit.theta) - 1))
    records = []
    for n, d in points:
        value, *draws = predict(fit.theta, np.array([n]), np.array([d]))[:, 0]
        ends = [end for each in (draws, draws * noise) for end in percentile_interval(np.array(each), fit.freedom)]
        records.append(_record("huber", {"params": n, "tokens": d}, "loss", value, ends, obs))
    return records


def forecast_optimum(method: str, fit: ScalingFit, obs: pd.DataFrame, flops: float) -> Forecast:
    """Forecast the best size for a budget of C FLOPs."""
    value, *draws = fit.optima(flops)
    ends = [*percentile_interval(np.array(draws), fit.freedom), None, None]
    return _record(method, {"flops": flops}, "N_opt", value, ends, obs)


def forecast_metric(comparison: FormComparison, point: Sequence[float]) -> list[Forecast]:
    """Forecast the metric at a point [C], by the best form and by those not distinguished from it; if there are any,
    last the best form's value with intervals that contain all of theirs ("any of these").

    A run's noise is the held-out error, added as independent errors are.
    """
    at, records = dict(zip(comparison.against, point, strict=True)), []
    raw = np.array([[x if name == comparison.penalty else np.log(x)] for name, x in at.items()])
    for name in (comparison.best, *comparison.near):
        form, theta = comparison.fits[name]
        freedom = comparison.run_count - len(theta)
        value, *draws = comparison.predict(name, raw)[:, 0]
        low, high = percentile_interval(np.array(draws), freedom)
        noise = comparison.forms["held_out_rms"][name] * stdtrit(freedom, (1 + LEVEL) / 2)
        run = value + np.array([-np.hypot(value - low, noise), np.hypot(high - value, noise)])
        ends = [low, high, *np.clip(run, form.low, form.high)]
        records.append(_record(name, at, comparison.metric, value, ends, comparison.columns))
    if len(records) > 1:
        widest = {end: (min if end.endswith("low") else max)(one[end] for one in records) for end in ENDS}
        records.append({**records[0], "method": "any of these", **widest})
    return records


def _record(
    method: str, at: dict[str, float], quantity: str, value: float, ends: Sequence[Any], known: pd.DataFrame
) -> Forecast:
    beyond = []
    for name, x in at.items():
        low, high = known[name].min(), known[name].max()
        # Equal but for rounding is not beyond.
        if not low * (1 - 1e-9) <= x <= high * (1 + 1e-9):
            beyond.append(f"{name} beyond {low:.3g} to {high:.3g}")
    intervals = dict(zip(ENDS, ends, strict=True))
    return {"method": method, "at": at, "quantity": quantity, "value": value, **intervals, "beyond": ", ".join(beyond)}


def read_forecast(path: Path) -> dict[str, Any]:
    """Read the file of `scaling predict --out`. Raises FileNotFoundError, or ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such forecast; expected the predict.json of `ee-megatron scaling predict`")
    try:
        stored = read_json(path)
        metric, forecasts = dict(stored["options"])["metric"], stored["forecasts"]
        numbers = [x for one in forecasts for x in (*one["at"].values(), *(one[name] for name in ("value", *ENDS)))]
        if forecasts and isinstance(metric, str | None) and all(isinstance(x, int | float | None) for x in numbers):
            return {name: stored[name] for name in ("made", "table", "sha256", "options", "forecasts")}
    except (ValueError, AttributeError, TypeError, KeyError):
        pass
    raise ValueError(f"{path}: expected a forecast as `ee-megatron scaling predict --out` writes it; make it again")


def check_forecast(
    stored: Mapping[str, Any], table: RunTable, run: str | None, within: float
) -> tuple[list[Forecast], str]:
    """Compare each forecast of a run with the mean of the runs at its point (rows whose columns differ by a share
    `within`); with a note on what a run is.

    Raises ValueError for the forecast's own table, a missing column, and if no row lies at any of its points.
    """
    if table.digest == stored["sha256"]:
        raise ValueError(f"{table.name}: is the table that the forecast was made from; expected one of later runs")
    columns, metric, checks = dict(stored["options"]), stored["options"]["metric"], []
    runs, note = run_index(table, {**columns, "run": run or columns.get("run")})
    forecasts = [one for one in stored["forecasts"] if one["run_low"] is not None]
    if metric is None:
        frame = observations(table, columns)[0]
    else:
        frame = pd.DataFrame({name: table.numbers(name, "--where") for name in (*forecasts[0]["at"], metric)})
    if unknown := {name for one in forecasts for name in one["at"]} - {*frame}:
        raise ValueError(f"{table.name}: no column {min(unknown)}, which the forecast is of; expected a forecast's own")
    for one in forecasts:
        there = np.all([np.abs(frame[name] - x) <= within * abs(x) for name, x in one["at"].items()], axis=0)
        if there.any():
            each = frame.loc[there, metric or "loss"].groupby(runs[there]).mean()
            mean = float(each.mean())
            held = "held" if one["law_low"] <= mean <= one["law_high"] else "held within a run's noise"
            verdict = held if one["run_low"] <= mean <= one["run_high"] else "FAILED"
            checks.append({**one, "runs": len(each), "mean": mean, "error": mean - one["value"], "verdict": verdict})
    if not checks:
        points = "; ".join(str(one["at"]) for one in forecasts) or "N_opt, which no run measures"
        raise ValueError(f"{table.name}: no row within {within:g} of {points}; expected the runs that were forecast")
    return checks, note
