"""`ee-megatron externalise DIRECTORY`: read a study's finished evaluations; write one page, tables and figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import Parser
from ..observe.rundir import check_folder, write_atomic
from ..report.figures import DASHES, MARKERS, SERIES, STYLE, ReportChart, figure, figure_png, figure_svg
from ..report.page import render, style
from ..report.tables import TextTable, cell
from ..statistics import t_interval
from .effects import before_rl, conditions, effects
from .laws import Row, forecast, laws, runs_table, with_forecast
from .screen import CRITERIA, screen
from .study import CAP, COSTS, FREE, LENGTH, NO_EXITS, SHAPE, STEPS, read_study

ABOUT = "does a depth penalty make a model write out its reasoning? A study's runs on one page, with tables"
EPILOG = """\
reads   every finished evaluation below DIRECTORY (*/evaluate-*/) of runs that measured the choice of style
        (tasks with styles, evaluate.style_choice.models=reinforced or all)
writes  externalise.html  points, figures, conditions side by side; self-contained. plots/: figures as PNG
        effects.csv       a row per acceptance point: effect, interval, replicates, status
        externalise.csv   a row per run and family of problems: shares, right, depth, length, the closed form's forecast
        laws.csv          a row per model, family and cost of depth: layers that a hop takes, the penalty at which steps
                          take over, by the closed form and as measured

example:
  ee-megatron externalise runs --out study
"""
PARTS = {
    "Points": "Points set before the study ran: the change of a figure under a condition, against another where one is "
    "named. Mean over bases, RL seeds averaged within a base, with Student's 95 % interval. Open: runs are missing.",
    "Conditions": "What RL under each condition did: change in the share of written steps on the same base; shares of "
    "steps and of padding beside the closed form's forecast, from figures before RL; depths as shares of the layers; "
    "how often a terse answer is right when its style is given; answers whose first step was replaced by a wrong one: "
    "right after all, and ending where the wrong step leads. Mean over bases, 95 %.",
    "Before RL": "The style given: right answers under the gates' own exits, the depth of the deepest token as a share "
    "of the layers, right answers at full depth and with every token held to one depth. Mean over bases, 95 %.",
}


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0. Raises ValueError or FileNotFoundError for errors of the user."""
    parser = Parser(
        prog="ee-megatron externalise", description=ABOUT, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="contains the study's runs, at any level")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory (default: DIRECTORY)")
    help_level = "laws.csv has the penalty at which this share of the steps is written (default: %(default)s)"
    parser.add_argument("--level", type=float, default=0.5, metavar="SHARE", help=help_level)
    help_screen = "only the screen of tasks before RL (sweep=choice_screen): which give the model a choice; screen.csv"
    parser.add_argument("--screen", action="store_true", help=help_screen)
    given = parser.parse_args(list(argv))
    if not 0 < given.level < 1:
        raise ValueError(f"--level {given.level:g}: expected a share between 0 and 1, e.g. 0.75")
    check_folder("--out", given.out or given.directory)
    out = given.out or given.directory
    if given.screen:
        table = screen(given.directory)
        print(table.drop(columns="path").to_string(index=False, na_rep="–", float_format="{:.2f}".format))
        print("\ngo:", "; ".join(f"{name} {text}" for name, (text, _) in CRITERIA.items()))
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "screen.csv", table.to_csv(index=False))
        print(out / "screen.csv")
        return 0
    study, remarks = read_study(given.directory)
    runs = with_forecast(study)
    effect_table, prices = effects(runs), laws(runs, given.level)
    shapes, bases = runs["shape"].nunique(), len(runs[["shape", "base"]].drop_duplicates())
    facts = f"runs: {runs['path'].nunique()}, bases: {bases}, shapes of model: {shapes}"
    charts = draw(runs)
    page = render(
        Path(__file__).with_name("page.html.j2"), style=style(), facts=facts, remarks=remarks, charts=charts,
        tables=[(title, PARTS[title], table) for title, table in tables(runs, effect_table).items()],
    )  # fmt: skip
    shown = effect_table.drop(columns=["question", "by_base"])
    print(facts, *remarks, "", shown.to_string(index=False, na_rep="–", float_format="{:+.3f}".format), "", sep="\n")
    (out / "plots").mkdir(parents=True, exist_ok=True)
    frames = {"externalise.csv": runs_table(runs), "effects.csv": effect_table, "laws.csv": prices}
    files: dict[str, str | bytes] = {name: frame.to_csv(index=False) for name, frame in frames.items() if len(frame)}
    files |= {f"plots/{chart.name}.png": chart.png for chart in charts} | {"externalise.html": page}
    for name, content in files.items():
        write_atomic(out / name, content)
        print(out / name)
    print(f"\nAnswers written out in steps, after RL:\n{written_out(runs)}")
    return 0


def written_out(runs: pd.DataFrame) -> str:
    """The share of answers in steps under each condition, with what it goes with."""
    table = conditions(runs).rename(columns={"tau": "tokens a step", "steps": "share"})
    shown = ["tokens a step", "hops", "condition", "share", "right", "deepest token"]
    return table[["shape"] * (runs["shape"].nunique() > 1) + shown].to_string(index=False)


def tables(runs: pd.DataFrame, effect_table: pd.DataFrame) -> dict[str, TextTable]:
    """The page's tables by title. `runs`, `effect_table`: as `laws.with_forecast` and `effects` return them."""
    cells = [cell(row, "effect", "{:+.2f}", "low", "high") for row in effect_table.to_dict("records")]
    points = effect_table.assign(effect=cells).drop(columns=["low", "high"])
    made = {}
    for title, frame in (("Points", points), ("Conditions", conditions(runs)), ("Before RL", before_rl(runs))):
        frame = frame if runs["shape"].nunique() > 1 else frame.drop(columns="shape")
        heads = [head.replace("_", " ").replace("tau", "tokens a step") for head in frame]
        made[title] = TextTable(tuple(heads), [tuple(map(str, row)) for row in frame.to_numpy()], names=len(heads))
    return made


@rc_context(STYLE)
def draw(runs: pd.DataFrame) -> list[ReportChart]:
    """Draw a chart for each shape and length of a step."""
    charts = []
    for (shape, tau), rows in runs.sort_values([*SHAPE, "tau"], kind="stable").groupby(["shape", "tau"], sort=False):
        where = [f"tau{tau}", *([str(shape)] if runs["shape"].nunique() > 1 else [])]
        title, drawn = ", ".join(["Share of steps against the depth penalty", *where]), _drawn(rows)
        charts.append(ReportChart("_".join(["steps", *where]), title, figure_svg(drawn, title), figure_png(drawn)))
    return charts


def _drawn(runs: pd.DataFrame) -> Figure:
    """A figure with a panel per family: the share of steps against λ, a line per cost of depth, and beside
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


def _means(axes: Axes, x: pd.Series, rows: pd.DataFrame, series: int, label: str | None = None) -> None:
    """Means over bases at x, joined, with their intervals; each base faint behind them."""
    look: dict[str, Any] = {"color": SERIES[series], "marker": MARKERS[series]}
    bases = rows.groupby([x.rename("x"), "base"])["share_steps"].mean()
    axes.plot(bases.index.get_level_values("x"), bases, linestyle="", alpha=0.4, **look)
    means = bases.groupby(level="x").agg(lambda values: t_interval(values.tolist()))
    axes.plot(means.index, [mean.value for mean in means], label=label, **look)
    axes.vlines(means.index, [m.low for m in means], [m.high for m in means], look["color"], linewidth=0.8)


def _expected(rows: Sequence[Row], lambda_exit: float | None = None) -> float:
    """The forecast share of steps, mean over bases; NaN where it isn't known."""
    values = pd.Series([forecast(row, lambda_exit)[STEPS] for row in rows], index=[row["base"] for row in rows])
    return float(values.groupby(level=0).mean().mean())
