"""Compare functional forms of a metric (mean depth, accuracy) in size, tokens and penalty, by runs left out of the fit.

Columns enter as t = ln x, the penalty lambda as itself since it may be 0; less their means while fitting. Shape
suffixes: S resamples, P parameters, R rows, C columns, G runs, F forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.optimize import least_squares
from scipy.special import expit, logit

from .bootstrap import LEVEL, Refused, are_collinear, interval_table, percentile_interval, resample
from .table import Array, Columns, RunTable, run_index

MIN_RUNS = 8
"""Held-out errors of fewer runs say too little about each other to be compared."""
MAX_FOLDS = 50


@dataclass(frozen=True)
class MetricForm:
    """A family of curves: a `link` of a linear predictor; the fit's search starts at `inverse` of the metric. `low` and
    `high`: bounds of the form's values."""

    name: str
    formula: str
    link: Callable[[Array], Array] = np.asarray
    inverse: Callable[[Array], Array] = np.asarray
    low: float = -np.inf
    high: float = np.inf

    def fit(self, design: Array, y: Array, start: Array | None = None) -> Array:
        """Least-squares parameters [P] for regressors [P, R] and a metric [R], searched from a start [P] if given."""
        if start is None or self.link is np.asarray:
            start = np.linalg.lstsq(design.T, self.inverse(y), rcond=None)[0]
        if self.link is np.asarray:
            return np.asarray(start)
        return np.asarray(least_squares(lambda theta: self.link(theta @ design) - y, start, method="lm").x)


def _exp(z: Array) -> Array:
    return np.asarray(np.exp(np.minimum(z, 50.0)))


def _log(y: Array) -> Array:
    return np.asarray(np.log(np.maximum(y, 1e-12 * y.max())))


def _logit(y: Array) -> Array:
    return np.asarray(logit(np.clip(y, 0.02, 0.98)))


FORMS = (
    MetricForm("constant", "c"),
    MetricForm("linear", "c + Σ b t"),
    MetricForm("power", "exp(c + Σ b t)", _exp, _log, low=0),
    MetricForm("logistic", "1 / (1 + exp(-c - Σ b t))", expit, _logit, 0, 1),
)


@dataclass
class FormComparison:
    """Fitted forms of a metric, and their comparison.

    columns: a column for each of `against`, a row for each of the metric's `values` and `runs` [R]; raw [C, R]: the
    same as ln x, or lambda as it is; penalty: its name. forms: a row per form's name, best first, with columns
    held_out_rms (in the metric's unit), less_constant (its mean squared error less the constant's; low and high over
    runs), beats_constant (at the level that holds for all forms together) and ties (the errors leave open whether it
    or the best form is better). fits: each form and its parameters [P]; refused: forms with their reason.
    """

    metric: str
    columns: pd.DataFrame
    raw: Array
    penalty: str
    values: Array
    runs: Array
    draws: int
    seed: int
    notes: list[str]
    forms: pd.DataFrame = field(default_factory=pd.DataFrame)
    fits: dict[str, tuple[MetricForm, Array]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def against(self) -> list[str]:
        return list(self.columns)

    @property
    def run_count(self) -> int:
        return int(self.runs.max()) + 1

    @property
    def best(self) -> str:
        """The form that predicts left-out runs best among those that beat the constant; else the constant."""
        winners = self.forms.index[self.forms["beats_constant"]]
        return str(winners[0]) if len(winners) else "constant"

    @property
    def near(self) -> list[str]:
        """Forms that the data cannot distinguish from the best, best first."""
        rivals = self.forms["ties"] & (self.forms["beats_constant"] | (self.best == "constant"))
        return [name for name in self.forms.index[rivals] if name not in (self.best, "constant")]

    def design(self, form: MetricForm, raw: Array) -> Array:
        """Regressors [P, R'] at raw columns [C, R']: 1, and the columns less their means."""
        columns = [] if form.name == "constant" else list(raw - self.raw.mean(axis=1)[:, None])
        return np.stack([np.ones(raw.shape[1]), *columns])

    def sample(self, name: str) -> Array:
        """Parameters [1 + S, P] of a form, and of its fits to resampled runs."""
        form, theta = self.fits[name]
        design = self.design(form, self.raw)
        fitted = form.link(theta @ design)
        data = resample(fitted, self.values - fitted, self.runs, len(theta), self.draws, self.seed)
        return np.array([theta, *(form.fit(design, y, theta) for y in np.clip(data, form.low, form.high))])

    def predict(self, name: str, raw: Array) -> Array:
        """Predict the metric [1 + S, R'] by a form and by its fits to resampled runs, at raw columns [C, R']."""
        form, _ = self.fits[name]
        return form.link(self.sample(name) @ self.design(form, raw))

    def slopes(self, name: str) -> pd.DataFrame:
        """Columns value, low and high of a form's slopes, per unit of ln x or of lambda."""
        theta = self.sample(name)
        return interval_table(dict(zip(self.against, theta.T[1:], strict=True)), self.run_count - theta.shape[1])

    def verdict(self) -> str:
        if self.best == "constant":
            return f"no form beats the constant: no dependence of {self.metric} on {', '.join(self.against)} is shown"
        best, constant = self.forms["held_out_rms"][[self.best, "constant"]]
        near = f"; not distinguished from it: {', '.join(self.near)}" if self.near else ""
        return f"{self.best} predicts {self.metric} best ({1 - (best / constant) ** 2:.0%} of squared error gone){near}"


def compare(
    table: RunTable, columns: Columns, metric: str, against: Sequence[str], draws: int, seed: int
) -> FormComparison:
    """Fit every form to `metric` and judge it by leaving out whole runs.

    Raises ValueError for missing columns and values that cannot be used, Refused for too few runs and for columns that
    do not vary or vary as one.
    """
    y, penalty = table.numbers(metric, "--metric"), columns.get("lambda") or "lambda"
    known = pd.DataFrame({name: table.numbers(name, "--against", positive=name != penalty) for name in against})
    raw = np.stack([x if name == penalty else np.log(x) for name, x in known.items()])
    runs, note = run_index(table, columns)
    comparison = FormComparison(metric, known, raw, penalty, y, runs, draws, seed, [note])
    count, folds = comparison.run_count, min(comparison.run_count, MAX_FOLDS)
    if count < MIN_RUNS:
        raise Refused(f"{count} runs; expected at least {MIN_RUNS} to compare forms by runs left out; add runs")
    for index, name in enumerate(against):
        if np.ptp(raw[index]) == 0:
            raise Refused(f"column {name} has one value; expected at least 2; leave it out of --against")
        if alike := [against[other] for other in range(index) if are_collinear(raw[index], raw[other])]:
            raise Refused(
                f"columns {alike[0]} and {name} are collinear (squared correlation above 0.99), so their influences "
                f"cannot be distinguished; expected one of them in --against"
            )
    comparison.notes.append(f"held-out errors: {count} runs in {folds} folds")
    fold = (np.random.default_rng(seed).permutation(count) % folds)[runs]
    errors = {}
    for form in FORMS:
        if reason := _misfit(comparison, form):
            comparison.refused[form.name] = reason
            continue
        design, predicted = comparison.design(form, raw), np.empty(len(y))
        theta = form.fit(design, y)
        for out in (fold == number for number in range(folds)):
            # The start decides where the search begins; left-out rows do not enter what it minimises.
            predicted[out] = form.link(form.fit(design[:, ~out], y[~out], theta) @ design[:, out])
        errors[form.name] = np.bincount(runs, (predicted - y) ** 2) / np.bincount(runs)
        comparison.fits[form.name] = (form, theta)
    comparison.forms = _judge(errors, draws, seed)
    return comparison


def _misfit(comparison: FormComparison, form: MetricForm) -> str:
    """Why the metric or the columns rule the form out, or nothing."""
    low, high = comparison.values.min(), comparison.values.max()
    if low < form.low or high > form.high or (form.name == "power" and low == 0):
        return f"the metric runs from {low:.4g} to {high:.4g}, the form from {form.low:g} to {form.high:g}"
    parameters = len(comparison.design(form, comparison.raw))
    few = comparison.run_count < 2 * parameters
    return f"{comparison.run_count} runs for {parameters} parameters; expected at least {2 * parameters}" if few else ""


def _judge(errors: dict[str, Array], draws: int, seed: int) -> pd.DataFrame:
    """The table of forms from their mean squared errors by run [G]. Several forms stand against one constant: each at
    1 - 0.05/F, so that all together are wrong in 5 % (Bonferroni)."""
    best = min(errors.values(), key=lambda each: float(each.mean()))
    strict = 1 - (1 - LEVEL) / max(1, len(errors) - 1)

    def interval(difference: Array, level: float = LEVEL) -> tuple[float, float]:
        mean, each = np.full(len(difference), difference.mean()), np.arange(len(difference))
        sampled = resample(mean, difference - mean, each, 1, draws, seed).mean(axis=1)
        return percentile_interval(sampled, len(difference) - 1, level)

    rows = {}
    for name, each in errors.items():
        gain = each - errors["constant"]
        beats, ties = interval(gain, strict)[1] < 0, interval(each - best)[0] <= 0
        rows[name] = (float(np.sqrt(each.mean())), float(gain.mean()), *interval(gain), beats, ties)
    columns = ["held_out_rms", "less_constant", "low", "high", "beats_constant", "ties"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).sort_values("held_out_rms")
