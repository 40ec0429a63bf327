"""PNG copies of the report's charts, for slides and papers (matplotlib's Agg canvas, no display)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..observe.rundir import write_atomic
from .charts import Axes, Effect, Line, Point, Trend
from .palette import LIGHT, SERIES, scale

MARKERS = ("o", "s", "^", "D")
DASHES = ("-", "--", ":", "-.")
Curve = Sequence[tuple[int, float]]


def _colour(series: int) -> str:
    return SERIES[series % len(SERIES)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
    return path


def tradeoff(series: Sequence[tuple[str, list[Point]]], path: Path) -> Path:
    figure = _figure(5.2, 3.9)
    axes = figure.subplots()
    for index, (name, points) in enumerate(series):
        colour = _colour(index)
        xs, ys = [p.x for p in points], [p.y for p in points]
        spans = [[p.y - p.low for p in points], [p.high - p.y for p in points]]
        axes.errorbar(xs, ys, spans, fmt=MARKERS[index % 4], color=colour, label=name, ms=5, elinewidth=0.8, alpha=0.9)
        for p in points:
            axes.annotate(p.mark, (p.x, p.y), (5, 4), textcoords="offset points", fontsize=7, color="0.35")
    axes.set(xlabel="mean depth (fraction of the layers)", ylabel="accuracy")
    axes.grid(alpha=0.2, lw=0.6)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def histogram(rows: Sequence[tuple[str, dict[int, float]]], outcomes: Sequence[int], path: Path) -> Path:
    figure = _figure(5.6, 1.1 + 0.38 * len(rows))
    axes = figure.subplots()
    colours = scale(len(outcomes), LIGHT)
    for row, (_, counts) in enumerate(rows):
        total, start = sum(counts.values()) or 1.0, 0.0
        for index, depth in enumerate(outcomes):
            share = counts.get(depth, 0.0) / total
            axes.barh(row, share, left=start, color=colours[index], height=0.62, label=str(depth) if row == 0 else None)
            start += share
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of tokens")
    axes.legend(
        title="exit depth",
        frameon=False,
        fontsize=7,
        title_fontsize=7,
        ncols=1,
        bbox_to_anchor=(1, 1),
        loc="upper left",
    )
    return _save(figure, path)


def scatter(trends: Sequence[Trend], path: Path) -> Path:
    figure = _figure(5.2, 3.9)
    axes = figure.subplots()
    for t in trends:
        colour = _colour(t.series)
        axes.scatter([x for x, _ in t.points], [y for _, y in t.points], s=5, color=colour, alpha=0.18, lw=0)
        xs, ys = [b[0] for b in t.bins], [b[1] for b in t.bins]
        errors = [b[2] if math.isfinite(b[2]) else 0.0 for b in t.bins]
        line = axes.errorbar(xs, ys, errors, color=colour, label=t.name, ms=4, lw=1.2, fmt=MARKERS[t.series % 4])
        line[0].set_linestyle(DASHES[t.rule % 4])
    axes.set(xlabel="teacher's entropy (nats)", ylabel="depth (fraction of the layers)", ylim=(0, 1.06))
    axes.grid(alpha=0.2, lw=0.6)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def lines(drawn: Sequence[Line], axes: Axes, path: Path) -> Path:
    figure = _figure(5.2, 3.9)
    panel = figure.subplots()
    x_range, y_range = axes.ranges(drawn)
    if axes.diagonal:
        panel.axline((0, 0), slope=1, color="0.5", lw=0.8, ls="--")
    for line in drawn:
        dots = [d for d in line.dots if not axes.log_y or d.y > 0]
        spans = [[_length(d.y - d.low) for d in dots], [_length(d.high - d.y) for d in dots]]
        drawn_line = panel.errorbar(
            [d.x for d in dots], [d.y for d in dots], spans, color=_colour(line.series), fmt=MARKERS[line.series % 4],
            ms=4, lw=1.2, elinewidth=0.8, alpha=0.95 if line.joined else 0.4,
            label=line.name if line.joined else None,
        )  # fmt: skip
        for d in dots:
            if d.word:
                panel.annotate(d.word, (d.x, d.y), (5, 4), textcoords="offset points", fontsize=7, color="0.35")
        drawn_line[0].set_linestyle(DASHES[line.rule % 4] if line.joined else "")
    panel.set(xlabel=axes.x, ylabel=axes.y, xlim=x_range, yscale="log" if axes.log_y else "linear", ylim=y_range)
    panel.grid(alpha=0.2, lw=0.6)
    if any(line.joined for line in drawn):
        panel.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _length(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0


def forest(effects: Sequence[Effect], label: str, path: Path) -> Path:
    figure = _figure(5.6, 0.9 + 0.34 * len(effects))
    panel = figure.subplots()
    panel.axvline(0, color="0.5", lw=0.8)
    for row, e in enumerate(effects):
        span = [[_length(e.value - e.low)], [_length(e.high - e.value)]]
        fill = _colour(1) if e.kept else "none"
        panel.errorbar([e.value], [row], xerr=span, fmt="o", color=_colour(1), mfc=fill, ms=5, elinewidth=1.2)
    panel.set_yticks(range(len(effects)), [e.name for e in effects], fontsize=8)
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_xlabel(label, fontsize=8)
    panel.grid(alpha=0.2, lw=0.6, axis="x")
    return _save(figure, path)


def training(curves: Mapping[str, Sequence[tuple[str, int, Curve]]], path: Path) -> Path:
    """Small multiples of one stage's metrics: name -> a line per run (label, series, points)."""
    columns = min(4, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = _figure(2.7 * columns, 1.8 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes, (name, runs) in zip(panels, curves.items(), strict=False):
        for label, series, points in runs:
            xs, ys = [s for s, _ in points], [v for _, v in points]
            colour = _colour(series) if len(runs) > 1 else SERIES[1]
            axes.plot(xs, ys, color=colour, lw=1.2, marker="." if len(points) < 40 else "", label=label)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.2, lw=0.6)
    if any(len(runs) > 1 for runs in curves.values()):
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=7)
    return _save(figure, path)
