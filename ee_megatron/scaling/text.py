"""Fits and comparisons as tables that read on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .compare import Comparison, coefficients
from .fit import FitOrRefusal, LawFit
from .isoflop_law import IsoFlopFit
from .refusal import Refused

MEANING = {
    "E": "loss that neither size nor data removes",
    "A": "coefficient of N^-alpha",
    "B": "coefficient of D^-beta",
    "alpha": "exponent of N",
    "beta": "exponent of D",
    "exponent_a": "N_opt grows as C^a, a = beta/(alpha + beta)",
    "coefficient_G": "N_opt = G (C/6)^a",
}


def number(value: float) -> str:
    return f"{value:.4g}"


def fit_lines(outcomes: Mapping[str, FitOrRefusal]) -> list[str]:
    """Each method's parameters with their intervals, or why it was refused."""
    lines: list[str] = []
    for method, outcome in outcomes.items():
        lines.append("")
        if isinstance(outcome, Refused):
            lines.append(f"{method}: refused: {outcome}")
        elif isinstance(outcome, IsoFlopFit):
            lines += _isoflop_lines(outcome)
        else:
            lines += _law_lines(outcome)
    return lines[1:]


def _law_lines(fit: LawFit) -> list[str]:
    lines = [f"{fit.method}: L(N, D) = E + A/N^alpha + B/D^beta; 95 % intervals: {fit.interval_kind}"]
    for name, value in fit.values.items():
        low, high = fit.intervals[name]
        interval = f"[{number(low)}, {number(high)}]"
        lines.append(f"  {name:<14}{number(value):>10}  {interval:<24}{MEANING[name]}")
    lines.append(f"  residual (rms of ln L): {fit.residual:.4f}")
    for held in fit.held_out:
        error = "" if held.error is None else f": {held.error:.4f} (a constant: {held.constant:.4f})"
        lines.append(f"  held out, {held.how}{error}")
    return lines


def _isoflop_lines(fit: IsoFlopFit) -> list[str]:
    low, high = fit.interval
    lines = [f"isoflop: N_opt = k C^a; 95 % interval: bootstrap of runs' residuals, {len(fit.draws)} resamples"]
    lines.append(
        f"  {'exponent_a':<14}{number(fit.exponent):>10}  {f'[{number(low)}, {number(high)}]':<24}exponent of C"
    )
    lines.append(f"  {'coefficient_k':<14}{number(fit.coefficient):>10}")
    left, right = fit.steepness
    lines.append(f"  curves rise as exp({left:.3g} ln N) to the left of a minimum, exp({right:.3g} ln N) to the right")
    if math.isfinite(fit.window):
        lines.append(f"  sizes within a factor of {fit.window:g} of their minimum only: the curve fits no wider window")
    lines.append(f"  {'FLOPs':>12} {'N_opt':>12} {'loss there':>12}")
    lines += [f"  {b.flops:>12.4g} {b.params:>12.4g} {b.loss:>12.4f}" for b in fit.budgets]
    lines += [f"  left out: {reason}" for reason in fit.left_out]
    return lines


def comparison_lines(comparison: Comparison) -> list[str]:
    lines = [f"{comparison.metric} against {', '.join(comparison.feats.names)}; held out: {comparison.how}"]
    lines.append(
        f"  {'form':<18}{'held-out rms':>13}  {'squared error less the constant’s, 95 %':<42}beats the constant"
    )
    for result in sorted(comparison.results, key=lambda r: r.error):
        low, high = result.interval
        gain, beats = f"{result.gain:+.3g} [{low:+.3g}, {high:+.3g}]", "yes" if result.beats else "no"
        if result is comparison.constant:
            gain = beats = ""
        lines.append(f"  {result.form.name:<18}{number(result.error):>13}  {gain:<42}{beats}")
    lines += [f"  {name}: refused: {reason}" for name, reason in comparison.refused.items()]
    if comparison.winners:
        best = comparison.winners[0]
        lines.append(f"  slopes of {best.form.name}, {best.form.formula} (t = ln x; lambda as it is):")
        for name, value in coefficients(comparison, best).items():
            shown = value.get("refused") or "{:>10}  [{}, {}]".format(*map(number, value.values()))
            lines.append(f"    {name:<18}{shown}")
    lines.append(f"  {comparison.verdict()}")
    return lines
