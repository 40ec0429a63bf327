"""The study's page, one HTML file that needs nothing but itself, and its figures as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..report.plotting import DASHES, MARKERS, SERIES, figure, figure_svg
from ..statistics import Estimate, t_interval
from .effects import before_rl, cell, conditions
from .laws import Row, forecast
from .study import CAP, COSTS, FREE, LENGTH, NO_EXITS, SHAPE, STEPS


def draw(runs: pd.DataFrame) -> Any:
    """A matplotlib figure with a panel per family: the share of steps against λ, a line per cost of depth, and beside
    them the conditions without a depth penalty. Marks: means over bases with 95 % intervals; faint: bases; dashed: the
    closed form. `runs`: of one shape and one length of step, as `laws.with_forecast` returns them."""
    families = list(runs.sort_values("hops")["family"].unique())
    drawn, panels = figure(0.6 + 3.6 * len(families), 3.3, len(families))
    for axes, family in zip(panels, families, strict=True):
        rows = runs[(runs["family"] == family) & runs["compared"]]
        prices = sorted({0.0, *rows.loc[rows["priced"], "number"]})
        ticks = {price: f"{price:g}" for price in prices}
        for i, cost in enumerate(COSTS, start=1):
            priced = rows[rows["priced"] & (rows["kind"] == cost)]
            if len(priced):
                line = pd.concat([rows[rows["condition"] == FREE], priced])
                _means(axes, line["number"], line, i, cost)
                at, records = np.linspace(0, priced["number"].max(), 25), priced.to_dict("records")
                axes.plot(at, [_expected(records, x) for x in at], color=SERIES[i], linestyle=DASHES[1])
        beside = rows[rows["kind"].isin([NO_EXITS, CAP, LENGTH, *([] if prices[1:] else [FREE])])]
        for i, (label, held) in enumerate(beside.groupby("condition", sort=False)):
            scale = prices[-1] or 1.0
            x = scale * (1.15 + 0.12 * i)
            ticks[x] = str(label)
            _means(axes, held["number"] * 0 + x, held, 0)
            axes.hlines(_expected(held.to_dict("records")), x - 0.04 * scale, x + 0.04 * scale, SERIES[0], DASHES[1])
        axes.set_xticks(list(ticks), list(ticks.values()), rotation=60 if len(ticks) > len(prices) else 0)
        axes.set(title=f"hops: {rows['hops'].max()}", xlabel="depth penalty λ", ylabel="share of steps", ylim=(0, 1.03))
        if prices[1:]:
            axes.legend()
    return drawn


def _means(axes: Any, x: pd.Series, rows: pd.DataFrame, series: int, label: str | None = None) -> None:
    """Means over bases at x, joined, with their intervals; each base faint behind them."""
    look = {"color": SERIES[series], "marker": MARKERS[series]}
    bases = rows.groupby([x.rename("x"), "base"])["share_steps"].mean()
    axes.plot(bases.index.get_level_values("x"), bases, linestyle="", alpha=0.4, **look)
    means = bases.groupby(level="x").agg(lambda values: t_interval(values.tolist()))
    axes.plot(means.index, [mean.value for mean in means], label=label, **look)
    axes.vlines(means.index, [m.low for m in means], [m.high for m in means], look["color"], linewidth=0.8)


def _expected(rows: Sequence[Row], lambda_exit: float | None = None) -> float:
    """The forecast share of steps, mean over bases; NaN where it isn't known."""
    values = pd.Series([forecast(row, lambda_exit)[STEPS] for row in rows], index=[row["base"] for row in rows])
    return float(values.groupby(level=0).mean().mean())


def page(runs: pd.DataFrame, found: pd.DataFrame, facts: str, remarks: Sequence[str]) -> tuple[str, dict[str, bytes]]:
    """The page as HTML, and its figures as PNG by file name. `runs`, `found`: as `laws.with_forecast` and `effects`
    return them; facts: how much there is of the study."""
    several = runs["shape"].nunique() > 1
    drawings, files = [], {}
    for (shape, tau), rows in runs.sort_values([*SHAPE, "tau"], kind="stable").groupby(["shape", "tau"], sort=False):
        where, buffer, drawn = [f"tau{tau}", *([str(shape)] if several else [])], io.BytesIO(), draw(rows)
        title = ", ".join(["Share of steps against the depth penalty", *where])
        drawings.append({"title": title, "svg": figure_svg(drawn, title)})
        drawn.savefig(buffer, format="png", dpi=150, facecolor="white")
        files["_".join(["steps", *where]) + ".png"] = buffer.getvalue()
    estimates = [Estimate(*values) for values in found[["effect", "low", "high"]].itertuples(index=False)]
    points = found.assign(effect=[cell(mean, "{:+.2f}") for mean in estimates]).drop(columns=["low", "high"])
    tables = {"points": points, "conditions": conditions(runs), "before": before_rl(runs)}
    if not several:
        tables = {name: table.drop(columns="shape") for name, table in tables.items()}
    folder = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=folder, autoescape=True, undefined=StrictUndefined).get_template("page.html.j2")
    return template.render(facts=facts, remarks=remarks, figures=drawings, tables=tables), files
