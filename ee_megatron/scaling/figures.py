"""Plots of fits and fronts as PNG (matplotlib's Agg canvas, no display)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report.numbers import pareto_front
from ..report.palette import LIGHT, SERIES, scale
from .compare import Comparison
from .fit import LawFit
from .forms import evaluate
from .isoflop_law import IsoFlopFit
from .loss_law import PARAMETERS, predict
from .solver import Array
from .table import Observations

MAX_CURVES = 8
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# The palest step of the scale vanishes on white.
SCALE = LIGHT[1:]


class Picture(NamedTuple):
    """A PNG, the file name it gets (without suffix), and what it shows, in words for who cannot see it."""

    name: str
    caption: str
    png: bytes


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.2, lw=0.6)
    return figure, list(axes)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib the same data give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _some(values: list[float]) -> list[float]:
    """At most MAX_CURVES of them, the ends included."""
    if len(values) <= MAX_CURVES:
        return values
    return [values[round(i * (len(values) - 1) / (MAX_CURVES - 1))] for i in range(MAX_CURVES)]


def _band(curves: Array) -> tuple[Array, Array]:
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return low, high


def _solid_inside(axes: Axes, x: Array, y: Array, known: Array, colour: str) -> None:
    """A curve that is dashed where it leaves the range of what was measured."""
    inside = (x >= known.min()) & (x <= known.max())
    axes.plot(x, np.where(inside, y, np.nan), color=colour, lw=1.2)
    axes.plot(x, y, color=colour, lw=1.0, ls=(0, (3, 3)))


def loss_law(fit: LawFit, obs: Observations, label: str = "") -> Picture:
    """Loss against N, one curve and band per token count (at most eight of them), measured losses as points."""
    figure, (axes,) = _figure(6.2, 4.2)
    shown = _some(np.unique(obs.tokens).tolist())
    values = np.array([[fit.values[name] for name in PARAMETERS]])
    # Tables with a token count per run have more of them than curves: no point is left out for that.
    rest = ~np.isin(obs.tokens, shown)
    axes.plot(obs.params[rest], obs.loss[rest], ".", color="0.6", ms=4)
    sizes = np.geomspace(obs.params.min() / 1.3, obs.params.max() * 1.3, 80)
    for index, (tokens, colour) in enumerate(zip(shown, scale(len(shown), SCALE), strict=True)):
        at = np.full(len(sizes), tokens)
        axes.fill_between(sizes, *_band(predict(fit.draws, sizes, at)), color=colour, alpha=0.25, lw=0)
        rows = obs.tokens == tokens
        _solid_inside(axes, sizes, predict(values, sizes, at)[0], obs.params, colour)
        mark = MARKERS[index % len(MARKERS)]
        axes.plot(obs.params[rows], obs.loss[rows], mark, color=colour, ms=4, label=f"D = {tokens:.3g}")
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss", title=f"{fit.method}{label}")
    axes.legend(frameon=False, fontsize=7)
    caption = (
        f"Loss against parameters by {fit.method}{label}, a curve per token count, dashed beyond the sizes of the "
        f"table; bands hold 95 % of the resampled fits. "
        f"alpha {fit.values['alpha']:.3g}, beta {fit.values['beta']:.3g}, E {fit.values['E']:.3g}."
    )
    return Picture(f"loss_{fit.method}", caption, _png(figure))


def isoflop(fit: IsoFlopFit, obs: Observations, label: str = "") -> Picture:
    """Left: a curve per budget with its minimum. Right: the minima, their power law and its band."""
    figure, (left, right) = _figure(9.0, 4.0, 2)
    for index, (budget, colour) in enumerate(zip(fit.budgets, scale(len(fit.budgets), SCALE), strict=True)):
        sizes = np.geomspace(obs.params[budget.rows].min(), obs.params[budget.rows].max(), 60)
        left.plot(sizes, budget.at(sizes), color=colour, lw=1.2)
        mark = MARKERS[index % len(MARKERS)]
        left.plot(
            obs.params[budget.rows], obs.loss[budget.rows], mark, color=colour, ms=4, label=f"C = {budget.flops:.2g}"
        )
        left.plot(budget.params, budget.loss, "*", color=SERIES[2], ms=9, zorder=3)
        right.plot(budget.flops, budget.params, mark, color=colour, ms=6, zorder=3)
    log_flops = np.log([b.flops for b in fit.budgets])
    x = np.linspace(log_flops.min() - 0.3, log_flops.max() + 0.3, 60)
    band = fit.draws[:, :1] + fit.draws[:, 1:] * (x - log_flops.mean())
    right.fill_between(np.exp(x), *np.exp(_band(band)), color=SERIES[1], alpha=0.2, lw=0)
    _solid_inside(right, np.exp(x), fit.coefficient * np.exp(fit.exponent * x), np.exp(log_flops), SERIES[1])
    left.set(xscale="log", xlabel="parameters N", ylabel="loss", title=f"isoFLOP{label}")
    right.set(xscale="log", yscale="log", xlabel="FLOPs C", ylabel="N_opt", title=f"N_opt ∝ C^{fit.exponent:.3f}")
    left.legend(frameon=False, fontsize=7)
    low, high = fit.interval
    caption = (
        f"Left: loss against parameters at equal FLOPs{label}, minima as stars. Right: the minima against FLOPs, "
        f"dashed beyond them, exponent {fit.exponent:.3g} [{low:.3g}, {high:.3g}]."
    )
    return Picture("isoflop", caption, _png(figure))


def pareto(accuracy: Array, depth: Array, sizes: Sequence[str], names: tuple[str, str]) -> Picture:
    """Accuracy against depth [R], a front per size: its undominated points joined, the others faint."""
    figure, (axes,) = _figure(6.2, 4.2)
    groups = list(dict.fromkeys(sizes))
    colours = scale(len(groups), SCALE)
    labels = np.array(sizes)
    told = []
    for index, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        rows = np.flatnonzero(labels == group)
        front = rows[pareto_front(depth[rows], accuracy[rows])]
        front = front[np.argsort(depth[front])]
        mark = MARKERS[index % len(MARKERS)]
        axes.plot(depth[rows], accuracy[rows], mark, color=colour, ms=4, alpha=0.35)
        axes.plot(depth[front], accuracy[front], "-" + mark, color=colour, ms=5, lw=1.2, label=group)
        told.append(f"{group}: {len(front)} of {len(rows)} points on the front")
    axes.set(xlabel=names[1], ylabel=names[0])
    axes.legend(frameon=False, fontsize=7)
    return Picture("pareto", f"{names[0]} against {names[1]}, a front per size. {'; '.join(told)}.", _png(figure))


def metric(comparison: Comparison, column: int) -> Picture:
    """The metric against one column; the best form's curve and band where it beats the constant, other columns at their
    means. At most eight levels of lambda get a curve each."""
    name = comparison.feats.names[column]
    figure, (axes,) = _figure(6.2, 4.2)
    best = comparison.winners[0] if comparison.winners else comparison.constant
    logarithmic = column != comparison.feats.penalty
    raw = comparison.raw[column]
    grid = np.linspace(raw.min(), raw.max(), 80)
    penalty = comparison.feats.penalty
    curves: list[float | None] = [None]
    if penalty is not None and penalty != column:
        curves = list(_some(np.unique(comparison.raw[penalty]).tolist()))
    colours = scale(len(curves), SCALE[::-1]) if len(curves) > 1 else [SERIES[1]]
    for index, (level, colour) in enumerate(zip(curves, colours, strict=True)):
        points = np.repeat(comparison.feats.centres[:, None], len(grid), axis=1)
        points[column] = grid
        rows = np.ones(len(raw), dtype=bool)
        label = None
        if level is not None and penalty is not None:
            points[penalty], rows = level, comparison.raw[penalty] == level
            label = f"{comparison.feats.names[penalty]} = {level:.3g}"
        design = best.form.design(comparison.feats.standardised(points), penalty)
        x = np.exp(grid) if logarithmic else grid
        axes.fill_between(x, *_band(evaluate(best.form, best.draws, design)), color=colour, alpha=0.2, lw=0)
        axes.plot(x, evaluate(best.form, best.theta[None], design)[0], color=colour, lw=1.2)
        at = np.exp(raw[rows]) if logarithmic else raw[rows]
        axes.plot(at, comparison.values[rows], MARKERS[index % len(MARKERS)], color=colour, ms=4, label=label)
    axes.set(xlabel=name, ylabel=comparison.metric, title=best.form.name, xscale="log" if logarithmic else "linear")
    if curves != [None]:
        axes.legend(frameon=False, fontsize=7)
    curve = f"curve: {best.form.name}, other columns at their means"
    caption = f"{comparison.metric} against {name}; {curve}. {comparison.verdict()}."
    return Picture(f"metric_{column}", caption, _png(figure))
