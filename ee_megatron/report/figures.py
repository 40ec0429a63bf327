"""The report's charts: parts of results.json and training curves, as SVG and PNG.

A function returns a list, [] where there is nothing to draw. matplotlib is imported with the first figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from .numbers import number, or_nan
from .plotting import DASHES, MARKERS, PAGE, QUIET, SERIES, figure, figure_png, figure_svg, ink, scale
from .results import Results

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

DEPTH, ACCURACY = "mean depth (fraction of the layers)", "accuracy"
Tips = dict["Artist", list[str]]


class Point(NamedTuple):
    """A value with its interval (nan: none) and a word that stands beside it."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    word: str = ""


class ChartLine(NamedTuple):
    """Points of one colour and shape (`series`), joined by a line of one dash (`rule`; None: not joined). Without a
    name they are faint and not in the legend."""

    name: str
    series: int
    points: Sequence[Point]
    rule: int | None = 0


class ReportChart(NamedTuple):
    """A drawing for the page and for the file plots/NAME.png."""

    name: str
    title: str
    svg: Markup
    png: bytes
    note: str = ""


def _chart(name: str, title: str, drawn: Figure, spoken: Sequence[str], tips: Tips, note: str) -> list[ReportChart]:
    svg = figure_svg(drawn, f"{title}. {'; '.join(spoken)}.", tips)
    return [ReportChart(name, title, svg, figure_png(drawn), note)]


def line_chart(
    name: str, title: str, lines: Iterable[ChartLine], x: str, y: str, note: str = "", *, unit: bool = False
) -> list[ReportChart]:
    """Lines with marks and intervals; `unit`: both axes from 0 to 1 with the diagonal. Values of a wide range get a
    logarithmic axis."""
    lines = [line for line in lines if line.points]
    named = [line for line in lines if line.name]
    if not lines:
        return []
    columns = 2 if max((len(line.name) for line in named), default=0) < 30 else 1
    drawn, (axes,) = figure(height=3.2 + 0.17 * math.ceil(len(named) / columns) * (len(named) > 1))
    tips: Tips = {}
    for line in lines:
        colour, (xs, ys, lows, highs, _) = SERIES[line.series % len(SERIES)], zip(*line.points, strict=True)
        (marks,) = axes.plot(
            xs, ys, color=colour, marker=MARKERS[line.series % len(MARKERS)], markeredgecolor=PAGE,
            linestyle="none" if line.rule is None else DASHES[line.rule % len(DASHES)], alpha=1 if line.name else 0.5,
            markeredgewidth=0.6, label=line.name or "_",
        )  # fmt: skip
        axes.vlines(xs, lows, highs, color=colour, linewidth=0.9, alpha=0.6, zorder=1.5)
        tips[marks] = []
        for at, value, low, high, word in line.points:
            axes.annotate(word, (at, value), (4, 3), textcoords="offset points", color=QUIET, fontsize=7)
            interval = f" [{number(low)}, {number(high)}]" if math.isfinite(low + high) else ""
            tips[marks].append(f"{word} {line.name}".strip() + f"\n{x}: {number(at)}\n{y}: {number(value)}{interval}")
    values = [point.y for line in lines for point in line.points]
    axes.set(xlabel=x, ylabel=y, yscale="log" if min(values) > 0 and max(values) / min(values) > 30 else "linear")
    if unit:
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.axline((0, 0), (1, 1), color=QUIET, linewidth=0.8, linestyle=DASHES[1])
    if y == ACCURACY:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    if len(named) > 1:
        drawn.legend(loc="outside lower center", ncols=columns)
    ends = ((line.name, line.points[0], line.points[-1]) for line in named)
    spoken = [f"{n}: {number(a.y)} at {number(a.x)}, {number(b.y)} at {number(b.x)}" for n, a, b in ends]
    return _chart(name, title, drawn, [f"{y} against {x}", *spoken], tips, note)


def row_point(row: Mapping[str, Any], word: str = "") -> Point:
    """A row's mean depth, and its accuracy with its interval."""
    return Point(row["mean_depth"], row["accuracy"], or_nan(row.get("low")), or_nan(row.get("high")), word)


def front(name: str, series: int, points: Sequence[Point], on_front: Sequence[bool]) -> list[ChartLine]:
    """The points that no other beats, joined by depth, and the rest, loose."""
    rest = list(compress(points, (not on for on in on_front)))
    return [ChartLine(name, series, sorted(compress(points, on_front))), ChartLine("", series, rest, None)]


def result_charts(results: Results) -> list[ReportChart]:
    """Accuracy against depth, depth against entropy, and where tokens exit."""
    rows = [(i, row) for i, row in enumerate(results.sorted_rows(), start=1)]
    known = [(i, r) for i, r in rows if math.isfinite(or_nan(r.get("accuracy")) + or_nan(r.get("mean_depth")))]
    by_model = {m: [row_point(row, str(i)) for i, row in known if row["model"] == m] for m in results.models}
    lines = [ChartLine(model, results.rank(model), points, None) for model, points in by_model.items()]
    note = "Bars: 95 % intervals. Numbers: rows of the table."
    found = line_chart("accuracy_depth", "Accuracy against depth", lines, DEPTH, ACCURACY, note)
    bins = {
        label: [Point(b["entropy"], b["depth"] / results.num_layers) for b in part.get("bins") or []]
        for label, part in results.in_order(results.depth_by_entropy).items()
    }
    x, y, note = "teacher's entropy (nats)", "depth (fraction of the layers)", "Means over bins of equal counts."
    found += line_chart("depth_entropy", "Depth against entropy", _by_label(results, bins), x, y, note)
    return found + _histogram(results)


def _by_label(results: Results, entries: Mapping[str, Sequence[Point]]) -> list[ChartLine]:
    """Each label in the colour of the model that it begins with, a model's labels told apart by their dashes."""
    lines: list[ChartLine] = []
    for label, points in entries.items():
        series = results.rank(label)
        lines.append(ChartLine(label, series, points, sum(line.series == series for line in lines)))
    return lines


def _estimates(xs: Iterable[float], found: Iterable[Mapping[str, Any]], key: str = "value") -> list[Point]:
    both = zip(xs, found, strict=True)
    points = [Point(x, or_nan(e.get(key)), or_nan(e.get("low")), or_nan(e.get("high"))) for x, e in both]
    return [point for point in points if math.isfinite(point.y)]


def _histogram(results: Results) -> list[ReportChart]:
    """A bar per label, cut into the shares of tokens that exit at each depth."""
    outcomes, layers, rows = results.outcomes, results.num_layers, results.in_order(results.exit_histogram)
    if not rows:
        return []
    drawn, (axes,) = figure(height=0.8 + 0.24 * len(rows))
    tips: Tips = {}
    spoken = []
    for place, (label, counts) in enumerate(rows.items()):
        total, left = sum(counts.values()) or 1, 0.0
        mean = f"{sum(int(depth) * count for depth, count in counts.items()) / total / layers:.2f}"
        spoken.append(f"{label}: mean depth {mean}")
        for depth, colour in zip(outcomes, scale(len(outcomes)), strict=True):
            share = counts.get(str(depth), 0) / total
            name = "_" if place else str(depth)
            (bar,) = axes.barh(place, share, 0.85, left, color=colour, edgecolor=PAGE, linewidth=0.6, label=name)
            tips[bar] = [f"{label}\nexit at depth {depth} of {layers}\n{share:.1%} of {total:,.0f} tokens"]
            if share >= 0.08:
                axes.text(
                    left + share / 2, place, f"{share:.0%}", color=ink(colour), ha="center", va="center", fontsize=8
                )
            left += share
        axes.text(1.01, place, mean, va="center", fontsize=8)
    axes.set(xlim=(0, 1), xticks=[], ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    drawn.legend(loc="outside upper center", ncols=len(outcomes))
    note = f"Share of generated tokens by exit depth; {layers} means no exit. Right: mean depth."
    return _chart("exit_histogram", "Where tokens exit", drawn, spoken, tips, note)


def exit_charts(results: Results) -> list[ReportChart]:
    """Fronts over thresholds, the gates' reliability, and KL to the teacher by exit."""
    fronts: list[ChartLine] = []
    for model, part in results.pareto.items():
        points = [row_point(entry) for entry in part]
        fronts += front(model, results.rank(model), points, [bool(entry.get("front")) for entry in part])
    note = "One mark per hazard threshold, on the validation split; lines join those that none beats."
    found = line_chart("pareto", "Fronts over thresholds", fronts, DEPTH, ACCURACY, note)
    bins = {
        m: [Point(b["hazard"], b["target"]) for b in (part or {}).get("bins", [])] for m, part in results.gates.items()
    }
    x, y = "hazard that the gate gave", "target hazard 1 − tanh(c·KL/2)"
    note = "Gates that follow their target lie on the dashed line; RL may move them off it on purpose."
    found += line_chart("gates", "Gates: hazard against target", _by_label(results, bins), x, y, note, unit=True)
    kl = {
        label: _estimates(sorted(map(int, part)), [part[str(depth)] for depth in sorted(map(int, part))], "kl")
        for label, part in results.in_order(results.kl_by_exit).items()
    }
    x, y = "exit depth (layers)", "KL to the teacher (nats)"
    note = "Mean over the tokens that exited there; tokens aren't assigned to depths at random."
    return found + line_chart("kl_by_exit", "KL to the teacher by exit depth", _by_label(results, kl), x, y, note)


def externalisation_charts(results: Results) -> list[ReportChart]:
    """Answers after a chain that was cut short, and what a linear probe reads of later tokens."""
    cut, probes = {}, {}
    for model, part in results.externalisation.items():
        curve = part.get("truncation") or {}
        cut[model] = _estimates(curve.get("fractions", []), curve.get("same_answer", []))
        for probe in part.get("planning_probe") or []:
            if len(probe["uplift"]) == len(results.outcomes):
                probes[f"{model}, {probe['ahead']} ahead"] = _estimates(results.outcomes, probe["uplift"])
    x, y = "share of the chain that is kept", "same answer"
    note = "Share of answers that are the same as after the whole chain."
    found = line_chart("truncation", "Chain cut short", _by_label(results, cut), x, y, note)
    x, y = "depth (layers)", "probe − n-gram (accuracy)"
    note = "What a linear map reads of later tokens, beyond what the text tells."
    return found + line_chart("planning_probe", "Planning probe", _by_label(results, probes), x, y, note)


def forest(name: str, title: str, controls: Iterable[Mapping[str, Any]]) -> list[ReportChart]:
    """The policy's accuracy minus each control's at equal depth; hollow where the depth was missed."""
    entries: list[tuple[Mapping[str, Any], float, float, float]] = []
    for e in controls:
        value, low, high = (or_nan(e["comparison"]["difference"].get(key)) for key in ("value", "low", "high"))
        if e["matched_by"] == "depth" and math.isfinite(value):
            entries.append((e, value, low, high))
    if not entries:
        return []
    drawn, (axes,) = figure(height=0.9 + 0.28 * len(entries))
    tips: Tips = {}
    for place, (e, value, low, high) in enumerate(entries):
        axes.hlines(place, low, high, color=SERIES[1], alpha=1 if e["within"] else 0.5, zorder=1.5)
        (mark,) = axes.plot(value, place, "o", color=SERIES[1], markerfacecolor=SERIES[1] if e["within"] else PAGE)
        tips[mark] = [f"{e['control']}: {value:+.1%} [{low:+.1%}, {high:+.1%}]\n{e['exits']}"]
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_yticks(range(len(entries)), [e["control"] + ("" if e["within"] else " (!)") for e, *_ in entries])
    axes.set(ylim=(len(entries) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}%")
    spoken = [tip.partition("\n")[0] for (tip,) in tips.values()]
    note = "Accuracy of the policy minus that of the control at equal mean depth, 95 % intervals."
    return _chart(name, title, drawn, spoken, tips, note)


def training_curve(metric: str, curves: Iterable[tuple[str, int, Sequence[tuple[int, float]]]]) -> Markup:
    """A small chart of one metric over steps: (run, series, points) each; values that aren't finite leave a gap."""
    drawn, (axes,) = figure(2.7, 1.4)
    drawn.set_layout_engine("none")
    axes.set_position((0.17, 0.17, 0.8, 0.76))
    spoken = []
    for run, series, points in curves:
        marker, colour = "o" if len(points) == 1 else "", SERIES[series % len(SERIES)]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker)
        values = [value for _, value in points if math.isfinite(value)]
        words = (
            f"from {number(values[0])} to {number(values[-1])}, {number(min(values))} to {number(max(values))} in all"
        )
        spoken.append(f"{run} {words}".strip())
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=4, integer=True)
    return figure_svg(drawn, f"{metric}: {'; '.join(spoken)}")
