"""Plots of fits as matplotlib figures; curves are dashed beyond the data. Draw within `matplotlib.rc_context`."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.figures import figure
from .compare import FormComparison
from .laws import ScalingFit, interpolate, predict
from .table import Array

MAX_CURVES = 8


def _curve(axes: Axes, x: Array, curves: Array, known: Array, colour: str) -> None:
    """The first of curves [1 + S, K], with the band that holds 95 % of the others, its resamples."""
    inside = (x >= known.min()) & (x <= known.max())
    axes.fill_between(x, *np.quantile(curves[1:], [0.025, 0.975], axis=0), color=colour, alpha=0.2, lw=0)
    axes.plot(x, np.where(inside, curves[0], np.nan), color=colour)
    axes.plot(x, curves[0], color=colour, lw=0.8, ls="--")


def loss_law(fit: ScalingFit, obs: pd.DataFrame) -> Figure:
    """Plot loss against N: measured losses, and a curve with its band per token count (at most eight of them)."""
    drawn, (axes,) = figure(6, 4.2)
    counts = np.unique(obs["tokens"])
    shown = counts[np.unique(np.linspace(0, len(counts) - 1, MAX_CURVES).round().astype(int))]
    sizes = np.geomspace(obs["params"].min() / 1.3, obs["params"].max() * 1.3, 80)
    axes.plot(obs["params"], obs["loss"], ".", color="0.6")
    for tokens, colour in zip(shown, colormaps["viridis"](np.linspace(0, 0.9, len(shown))), strict=True):
        _curve(axes, sizes, predict(fit.theta, sizes, np.full(len(sizes), tokens)), obs["params"], colour)
        rows = obs[obs["tokens"] == tokens]
        axes.plot(rows["params"], rows["loss"], "o", color=colour, label=f"D = {tokens:.3g}")
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss")
    axes.legend()
    return drawn


def isoflop(fit: ScalingFit, obs: pd.DataFrame) -> Figure:
    """Plot, left, losses at equal FLOPs with their curves and minima; right, the minima and their power law."""
    drawn, (left, right) = figure(10.5, 4.2, 2)
    budgets = [rows for _, rows in obs.groupby("budget") if rows["params"].nunique() > 1]
    for rows, colour in zip(budgets, colormaps["viridis"](np.linspace(0, 0.9, len(budgets))), strict=True):
        points, curve = interpolate(rows, np.log(rows["loss"].to_numpy())[None])
        left.plot(np.exp(points), np.exp(curve[:, 0]), color=colour)
        left.plot(rows["params"], rows["loss"], "o", color=colour, label=f"C = {rows['flops'].mean():.2g}")
    flops, sizes, losses = fit.budgets.to_numpy().T
    left.plot(sizes, losses, "*", color="C3", ms=9)
    right.plot(flops, sizes, "*", color="C3", ms=9)
    axis = np.geomspace(flops.min() / 1.5, flops.max() * 1.5, 60)
    _curve(right, axis, np.transpose([fit.optima(c) for c in axis]), flops, "C0")
    left.set(xscale="log", xlabel="parameters N", ylabel="loss")
    right.set(xscale="log", yscale="log", xlabel="FLOPs C", ylabel="N_opt", title=f"N_opt ∝ C^{fit.lines[0, 1]:.3f}")
    left.legend()
    return drawn


def metric(comparison: FormComparison) -> Figure:
    """Plot the metric against each column, with the best form's curve at the others' means."""
    drawn, panels = figure(1.5 + 4.5 * len(comparison.against), 4.2, len(comparison.against))
    for column, (axes, name) in enumerate(zip(panels, comparison.against, strict=True)):
        x, show = comparison.raw[column], np.asarray if name == comparison.penalty else np.exp
        raw = np.repeat(comparison.raw.mean(axis=1)[:, None], 60, axis=1)
        raw[column] = np.linspace(x.min(), x.max(), 60)
        axes.plot(show(x), comparison.values, "o", color="0.5")
        _curve(axes, show(raw[column]), comparison.predict(comparison.best, raw), show(x), "C0")
        axes.set(xlabel=name, ylabel=comparison.metric, title=comparison.best)
        axes.set_xscale("linear" if name == comparison.penalty else "log")
    return drawn
