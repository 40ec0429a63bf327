"""Which form a metric follows, judged by runs that the fit had not seen.

Shape suffixes: S resamples, G runs, R rows, C columns, F forms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .forms import FORMS, STEEPEST, Features, Form, evaluate, features, fit_form
from .intervals import LEVEL, BootstrapInterval, leave_one_run_out, percentile_interval, resample_runs
from .refusal import MAX_AT_BOUND, Refused
from .solver import Array
from .table import ColumnNames, RunTable, run_index

MIN_RUNS = 8
"""Held-out errors of fewer runs say too little about each other to be compared."""
MAX_FOLDS = 50


@dataclass(frozen=True)
class FormResult:
    """One form. error: held-out root mean square, in the metric's unit; gain: its mean squared error less the
    constant's, with an interval over runs (negative is better); `beats` where the interval lies below 0 at the level
    that holds for all forms together; `ties` where the errors leave open whether it or the best form is better.
    predicted [R]: each row by a fit without its run. theta [P], draws [S, P]: of the standardised columns."""

    form: Form
    error: float
    gain: float
    interval: BootstrapInterval
    beats: bool
    ties: bool
    predicted: Array = field(repr=False)
    theta: Array = field(repr=False)
    draws: Array = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """results in the order of FORMS; refused forms with their reason; raw [C, R]: ln x, or lambda as it is; values and
    runs [R]: the metric and the run of each row."""

    metric: str
    feats: Features
    raw: Array
    values: Array
    runs: Array
    results: list[FormResult]
    refused: dict[str, str]
    how: str
    notes: tuple[str, ...]

    @property
    def constant(self) -> FormResult:
        return self.results[0]

    @property
    def winners(self) -> list[FormResult]:
        """Forms that beat the constant, best first."""
        return sorted((r for r in self.results if r.beats), key=lambda r: r.error)

    @property
    def best(self) -> FormResult:
        """The form that predicts held-out runs best of those that beat the constant; the constant where none does."""
        return self.winners[0] if self.winners else self.constant

    @property
    def near(self) -> list[FormResult]:
        """Forms that cannot be told from the best, best first. Where none beats the constant, those not told from the
        form of the least error, which may not be told from the constant either."""
        others = self.winners[1:] if self.winners else sorted(self.results[1:], key=lambda r: r.error)
        return [r for r in others if r.ties]

    def verdict(self) -> str:
        names = ", ".join(self.feats.names)
        if not self.winners:
            return f"no form beats the constant: these runs show no dependence of {self.metric} on {names}"
        first = self.best
        share = 1 - (first.error / self.constant.error) ** 2 if self.constant.error > 0 else 0.0
        near = ", ".join(r.form.name for r in self.near)
        also = f"; not told apart from it: {near}" if near else ""
        return f"{first.form.name} predicts {self.metric} best ({share:.0%} of the constant's squared error gone){also}"

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "against": list(self.feats.names),
            "held_out": self.how,
            "notes": list(self.notes),
            "verdict": self.verdict(),
            "beats_constant": [r.form.name for r in self.winners],
            "forms": [
                {
                    "form": r.form.name,
                    "formula": r.form.formula,
                    "held_out_rms": r.error,
                    "squared_error_less_constant": {"value": r.gain, **r.interval._asdict()},
                    "beats_constant": r.beats,
                    "coefficients": coefficients(self, r),
                }
                for r in self.results
            ],
            "refused": self.refused,
        }


def compare(
    table: RunTable, columns: ColumnNames, metric: str, against: tuple[str, ...], draws: int, seed: int
) -> Comparison:
    """Fit every form to `metric` and judge it by leaving out whole runs.

    Raises ValueError for missing columns and values that cannot be used, Refused for too few runs and for columns that
    do not vary or vary as one.
    """
    y = table.numbers(metric, "--metric")
    raw = np.stack([table.numbers(name, "--against", positive=name != columns.penalty) for name in against])
    for index, name in enumerate(against):
        raw[index] = raw[index] if name == columns.penalty else np.log(raw[index])
    runs, note = run_index(table, columns)
    count = int(runs.max()) + 1
    if count < MIN_RUNS:
        raise Refused(f"{count} runs; expected at least {MIN_RUNS} to compare forms by runs left out; add runs")
    penalty = against.index(columns.penalty) if columns.penalty in against else None
    feats = features(against, raw, penalty)
    folds, how = _folds(runs, seed)
    weights = resample_runs(runs, draws, seed)
    fitted: list[_Fitted] = []
    refused: dict[str, str] = {}
    for form in FORMS:
        try:
            for need in form.needs:
                need(feats, y)
            design = form.design(feats.values, penalty)
            parameters = form.starts(design, y).shape[1]
            if count < 2 * parameters:
                raise Refused(f"{count} runs for {parameters} parameters; expected at least {2 * parameters}")
        except Refused as refusal:
            refused[form.name] = str(refusal)
            continue
        predicted = _held_out(form, design, y, folds)
        errors = np.bincount(runs, (predicted - y) ** 2) / np.bincount(runs)
        theta = fit_form(form, design, y, np.ones((1, len(y))))
        fitted.append(_Fitted(form, predicted, errors, theta[0], fit_form(form, design, y, weights)))
    results = _judge(fitted, draws, seed)
    return Comparison(metric, feats, raw, y, runs, results, refused, how, (note,))


def _folds(runs: Array, seed: int) -> tuple[Array, str]:
    """Weights [folds, R], 0 for what is left out: each run alone, or groups of runs where there are more than 50."""
    count = int(runs.max()) + 1
    if count <= MAX_FOLDS:
        return leave_one_run_out(runs), f"each of {count} runs left out in turn"
    fold = np.random.default_rng(seed).permutation(np.arange(count) % MAX_FOLDS)
    return leave_one_run_out(fold[runs]), f"{MAX_FOLDS} folds over {count} runs"


def _held_out(form: Form, design: Array, y: Array, folds: Array) -> Array:
    """Each row [R], predicted by a fit without its run; a row is left out of exactly one fold."""
    predicted = evaluate(form, fit_form(form, design, y, folds), design)
    return np.asarray(predicted[(folds == 0).argmax(axis=0), np.arange(len(y))])


def _mean_difference(difference: Array, draws: int, seed: int) -> Array:
    """Resampled means [S] of differences [G]."""
    chosen = np.random.default_rng(seed).integers(len(difference), size=(draws, len(difference)))
    return np.asarray(difference[chosen].mean(axis=1))


class _Fitted(NamedTuple):
    """A form with what `FormResult` has of it; errors [G], the mean squared held-out error of each run."""

    form: Form
    predicted: Array
    errors: Array
    theta: Array
    draws: Array


def _judge(fitted: list[_Fitted], draws: int, seed: int) -> list[FormResult]:
    """Several forms against one constant: each at 1 - 0.05/F, so that all together are wrong in 5 % (Bonferroni)."""
    rivals = max(1, len(fitted) - 1)
    strict = 1 - (1 - LEVEL) / rivals
    best = min((one.errors for one in fitted), key=lambda values: float(values.mean()))
    constant = next(one.errors for one in fitted if one.form.name == "constant")
    results = []
    for form, predicted, errors, theta, sampled in fitted:
        difference = errors - constant
        means = _mean_difference(difference, draws, seed)
        freedom = len(difference) - 1
        beats = form.name != "constant" and percentile_interval(means, freedom, strict).high < 0
        error, gain = float(np.sqrt(errors.mean())), float(difference.mean())
        interval = percentile_interval(means, freedom)
        ties = percentile_interval(_mean_difference(errors - best, draws, seed), freedom).low <= 0
        results.append(FormResult(form, error, gain, interval, beats, ties, predicted, theta, sampled))
    return results


def coefficients(comparison: Comparison, result: FormResult) -> dict[str, dict[str, Any]]:
    """Slopes per unit of ln x or of lambda with 95 % intervals over runs; interactions as `x × lambda`, per unit of
    both, and then the slopes of x and lambda hold at the other's mean.

    A slope that resamples drive to its bound has `refused` instead of a value. The constants are left out: they depend
    on where ln x = 0.
    """
    feats = comparison.feats
    first = 1 if result.form.steepness is None else result.form.steepness
    names, scales = list(feats.names), list(feats.scales)
    if result.form.name.endswith("× lambda"):
        assert feats.penalty is not None
        others = [c for c in range(len(feats.names)) if c != feats.penalty]
        names += [f"{feats.names[c]} × {feats.names[feats.penalty]}" for c in others]
        scales += [float(feats.scales[c] * feats.scales[feats.penalty]) for c in others]
    freedom = len(np.unique(comparison.runs)) - len(result.theta)
    slopes: dict[str, dict[str, Any]] = {}
    # The constant has no slope, and forms without the interaction none for it.
    for index, name, scale in zip(range(first, len(result.theta)), names, scales, strict=False):
        at_bound = np.mean(np.abs(result.draws[:, index]) >= STEEPEST) if result.form.steepness is not None else 0.0
        if at_bound > MAX_AT_BOUND:
            slopes[name] = {"refused": f"not identified: at its bound in {at_bound:.0%} of the resamples"}
            continue
        interval = percentile_interval(result.draws[:, index] / scale, freedom)
        slopes[name] = {"value": float(result.theta[index] / scale), **interval._asdict()}
    return slopes
