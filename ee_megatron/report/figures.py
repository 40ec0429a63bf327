"""Charts of results.json and training curves by matplotlib, as SVG for a page and as PNG.

Draw within `matplotlib.rc_context(STYLE)`. A function that may find nothing to draw returns a list, then an empty one.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure

from .results import Results
from .tables import number, or_nan

# For depth and other ordered quantities, ordered by lightness alone, which survives colour blindness and grey print.
DEPTHS = LinearSegmentedColormap.from_list("depths", ["#f6f0cf", "#bfe0c2", "#62b3c4", "#2f70b3", "#242f79"])
# Distinguished under the common colour deficiencies, and by MARKERS too. Teacher, calibrated, reinforced, further runs.
SERIES = ("#6b7280", "#0072b2", "#d55e00", "#8a5a9e", "#00795a", "#8f6a00", "#b3427f", "#2b2f36")
MARKERS = ("o", "s", "^", "D")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK, QUIET, RULE, PAGE = "#1a1d23", "#5a616e", "#dfe2e8", "#ffffff"
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "text.parse_math": False,
    "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 8,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.size": 0, "ytick.minor.size": 0, "axes.grid": True, "axes.grid.axis": "y",
    "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    "lines.linewidth": 1.2, "lines.markersize": 5,
}  # fmt: skip
# What XML, unlike HTML, refuses.
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
DEPTH, ACCURACY = "mean depth (fraction of the layers)", "accuracy"
Tips = Mapping[Artist, Sequence[str]]
"""The hover text of each marker of an artist, in order, or one text for all of them."""


class Point(NamedTuple):
    """A value with its interval (nan: none) and a label."""

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
    """A figure for the page and for the file plots/NAME.png."""

    name: str
    title: str
    svg: Markup
    png: bytes
    note: str = ""


def scale(count: int) -> list[str]:
    """`count` colours (#rrggbb) at even distances from pale to dark."""
    return [to_hex(DEPTHS(i / (count - 1) if count > 1 else 1.0)) for i in range(count)]


def luminance(colour: str) -> float:
    """Relative luminance of a colour, 0..1 (WCAG 2.2)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink(colour: str) -> str:
    """Black or white, whichever contrasts more with `colour`: at least 4.5 : 1."""
    return "#000000" if (luminance(colour) + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def stylesheet(count: int) -> Markup:
    """CSS for text coloured by depth (`count` classes k0, k1, …) and the variable --c of series (s0, s1, …)."""
    depths = [f".k{i}{{background:{c};color:{ink(c)}}}" for i, c in enumerate(scale(count))]
    return Markup("".join([*depths, *(f".s{i}{{--c:{c}}}" for i, c in enumerate(SERIES))]))


def figure(width: float = 4.6, height: float = 3.3, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of `width` × `height` inches without a window, and its axes side by side."""
    made = Figure(figsize=(width, height), layout="constrained")
    return made, list(made.subplots(1, columns, squeeze=False).flat)


def figure_svg(figure: Figure, alt: str, tips: Tips = MappingProxyType({})) -> Markup:
    """Render a figure as an <svg> element for a page; text stays text. The same figure gives the same bytes. Texts may
    hold anything. alt: text for screen readers; tips become `data-tip`, which page.js shows."""
    for i, artist in enumerate(tips):
        artist.set_gid(f"tip-{i}")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": alt}), warnings.catch_warnings():
        # The page's font may have the characters that matplotlib's lacks.
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(NO_XML.sub("", buffer.getvalue()))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": NO_XML.sub("", alt)}
    for i, words in enumerate(tips.values()):
        group = root.find(f".//*[@id='tip-{i}']")
        if group is not None:
            for mark, tip in zip(group.findall(".//{*}use") or group.findall("{*}path"), words, strict=False):
                mark.set("data-tip", NO_XML.sub("", tip))
    for element in root.iter():
        # Those of markers and clips are referred to; the others stand in every figure again.
        if re.fullmatch(r"[\w.]+_\d+|tip-\d+", element.get("id", "")):
            del element.attrib["id"]
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if key.startswith("{")]:
            element.set(key.rpartition("}")[2], element.attrib.pop(key))
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def figure_png(figure: Figure) -> bytes:
    """Render a figure on white, for slides. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="png", dpi=150, facecolor=PAGE, metadata={"Software": None})
    return buffer.getvalue()


def line_chart(
    name: str, title: str, lines: Iterable[ChartLine], x: str, y: str, note: str = "", *, unit: bool = False
) -> list[ReportChart]:
    """Draw lines with marks and intervals; `unit`: both axes from 0 to 1 with the diagonal. Values of a wide range get
    a logarithmic axis."""
    lines = [line for line in lines if line.points]
    named = sum(1 for line in lines if line.name)
    if not lines:
        return []
    drawn, (axes,) = figure(height=3.2 + 0.17 * named * (named > 1))
    values = [point.y for line in lines for point in line.points]
    if min(values) > 0 and max(values) / min(values) > 30:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    tips: dict[Artist, list[str]] = {}
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
    axes.set(xlabel=x, ylabel=y)
    if unit:
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.axline((0, 0), (1, 1), color=QUIET, linewidth=0.8, linestyle=DASHES[1])
    if y == ACCURACY:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    if named > 1:
        drawn.legend(loc="outside lower center")
    svg = figure_svg(drawn, f"{title}: {y} against {x}", tips)
    return [ReportChart(name, title, svg, figure_png(drawn), note)]


def row_point(row: Mapping[str, Any], word: str = "") -> Point:
    """A row's mean depth, and its accuracy with the interval, as a point."""
    return Point(row["mean_depth"], row["accuracy"], row["low"], row["high"], word)


def front(name: str, series: int, points: Sequence[Point], on_front: Sequence[bool]) -> list[ChartLine]:
    """Pareto front of the points as a line, joined by depth, and the other points, not joined."""
    rest = list(compress(points, (not on for on in on_front)))
    return [ChartLine(name, series, sorted(compress(points, on_front))), ChartLine("", series, rest, None)]


def _by_label(results: Results, entries: Mapping[str, Sequence[Point]]) -> list[ChartLine]:
    """Each label in the colour of the model that it begins with, a model's labels distinguished by their dashes."""
    lines: list[ChartLine] = []
    for label, points in entries.items():
        series = results.rank(label)
        lines.append(ChartLine(label, series, points, sum(line.series == series for line in lines)))
    return lines


def _estimates(xs: Iterable[float], entries: Iterable[Mapping[str, Any]], key: str = "value") -> list[Point]:
    both = zip(xs, entries, strict=True)
    points = [Point(x, or_nan(e.get(key)), or_nan(e.get("low")), or_nan(e.get("high"))) for x, e in both]
    return [point for point in points if math.isfinite(point.y)]


def result_charts(results: Results) -> list[ReportChart]:
    """Charts of accuracy against depth, depth against entropy, and exit shares."""
    by_model: dict[str, list[Point]] = {model: [] for model in results.models}
    for i, row in enumerate(results.rows, start=1):
        by_model[row["model"]].append(row_point(row, str(i)))
    lines = [ChartLine(model, results.rank(model), points, None) for model, points in by_model.items()]
    note = "Bars: 95 % intervals. Numbers: rows of the table."
    charts = line_chart("accuracy_depth", "Accuracy against depth", lines, DEPTH, ACCURACY, note)
    bins = {
        label: [Point(b["entropy"], b["depth"] / results.num_layers) for b in part.get("bins") or []]
        for label, part in results.depth_by_entropy.items()
    }
    x, y, note = "teacher's entropy (nats)", "depth (fraction of the layers)", "Means over bins of equal counts."
    charts += line_chart("depth_entropy", "Depth against entropy", _by_label(results, bins), x, y, note)
    return charts + _histogram(results)


def _histogram(results: Results) -> list[ReportChart]:
    """A bar per label, cut into the shares of tokens that exit at each depth."""
    outcomes, layers, rows = results.outcomes, results.num_layers, results.exit_histogram
    if not rows:
        return []
    drawn, (axes,) = figure(height=0.8 + 0.24 * len(rows))
    tips: dict[Artist, list[str]] = {}
    totals = {label: sum(counts.values()) or 1 for label, counts in rows.items()}
    left = [0.0] * len(rows)
    for depth, colour in zip(outcomes, scale(len(outcomes)), strict=True):
        shares = [counts.get(str(depth), 0) / totals[label] for label, counts in rows.items()]
        bars = axes.barh(range(len(rows)), shares, 0.85, left, color=colour, edgecolor=PAGE, label=str(depth))
        words = [f"{share:.0%}" if share >= 0.08 else "" for share in shares]
        axes.bar_label(bars, words, label_type="center", color=ink(colour), fontsize=8)
        for bar, label, share in zip(bars, rows, shares, strict=True):
            tips[bar] = [f"{label}\nexit at depth {depth} of {layers}\n{share:.1%} of {totals[label]:,.0f} tokens"]
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for place, (label, counts) in enumerate(rows.items()):
        mean = sum(int(depth) * count for depth, count in counts.items()) / totals[label] / layers
        axes.text(1.01, place, f"{mean:.2f}", va="center", fontsize=8)
    axes.set(xlim=(0, 1), xticks=[], ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    drawn.legend(loc="outside upper center", ncols=len(outcomes))
    title, note = (
        "Where tokens exit",
        f"Share of generated tokens by exit depth; {layers} means no exit. Right: mean depth.",
    )
    return [ReportChart("exit_histogram", title, figure_svg(drawn, title, tips), figure_png(drawn), note)]


def exit_charts(results: Results) -> list[ReportChart]:
    """Charts of fronts over thresholds, the gates' reliability, and KL to the teacher by exit."""
    fronts: list[ChartLine] = []
    for model, part in results.pareto.items():
        points = [row_point(entry) for entry in part]
        fronts += front(model, results.rank(model), points, [bool(entry.get("front")) for entry in part])
    note = "One mark per hazard threshold, on the validation split; lines join those that none beats."
    charts = line_chart("pareto", "Fronts over thresholds", fronts, DEPTH, ACCURACY, note)
    bins = {
        m: [Point(b["hazard"], b["target"]) for b in (part or {}).get("bins", [])] for m, part in results.gates.items()
    }
    x, y = "hazard that the gate gave", "target hazard 1 − tanh(c·KL/2)"
    note = "Gates that follow their target lie on the dashed line; RL may move them off it on purpose."
    charts += line_chart("gates", "Gates: hazard against target", _by_label(results, bins), x, y, note, unit=True)
    kl = {
        label: _estimates(sorted(map(int, part)), [part[str(depth)] for depth in sorted(map(int, part))], "kl")
        for label, part in results.kl_by_exit.items()
    }
    x, y = "exit depth (layers)", "KL to the teacher (nats)"
    note = "Mean over the tokens that exited there; tokens aren't assigned to depths at random."
    return charts + line_chart("kl_by_exit", "KL to the teacher by exit depth", _by_label(results, kl), x, y, note)


def externalisation_charts(results: Results) -> list[ReportChart]:
    """Charts of answers after a truncated chain, and of a linear probe's accuracy on later tokens."""
    cut, probes = {}, {}
    for model, part in results.externalisation.items():
        curve = part.get("truncation") or {}
        cut[model] = _estimates(curve.get("fractions", []), curve.get("same_answer", []))
        for probe in part.get("planning_probe") or []:
            if len(probe["uplift"]) == len(results.outcomes):
                probes[f"{model}, {probe['ahead']} ahead"] = _estimates(results.outcomes, probe["uplift"])
    x, y = "share of the chain that is kept", "same answer"
    note = "Share of answers that are the same as after the whole chain."
    charts = line_chart("truncation", "Chain cut short", _by_label(results, cut), x, y, note)
    x, y = "depth (layers)", "probe − n-gram (accuracy)"
    note = "Accuracy of a linear map on later tokens, beyond that of the text alone."
    return charts + line_chart("planning_probe", "Planning probe", _by_label(results, probes), x, y, note)


def forest(name: str, title: str, controls: Iterable[Mapping[str, Any]]) -> list[ReportChart]:
    """Forest plot of the policy's accuracy minus each control's at equal depth; hollow where the depth was missed."""
    entries: list[tuple[Mapping[str, Any], float, float, float]] = []
    for e in controls:
        value, low, high = (or_nan(e["comparison"]["difference"].get(key)) for key in ("value", "low", "high"))
        if e["matched_by"] == "depth" and math.isfinite(value):
            entries.append((e, value, low, high))
    if not entries:
        return []
    drawn, (axes,) = figure(height=0.9 + 0.28 * len(entries))
    tips: dict[Artist, list[str]] = {}
    for place, (e, value, low, high) in enumerate(entries):
        axes.hlines(place, low, high, color=SERIES[1], alpha=1 if e["within"] else 0.5, zorder=1.5)
        (mark,) = axes.plot(value, place, "o", color=SERIES[1], markerfacecolor=SERIES[1] if e["within"] else PAGE)
        tips[mark] = [f"{e['control']}: {value:+.1%} [{low:+.1%}, {high:+.1%}]\n{e['exits']}"]
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.set_yticks(range(len(entries)), [e["control"] + ("" if e["within"] else " (!)") for e, *_ in entries])
    axes.set(ylim=(len(entries) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}%")
    note = "Accuracy of the policy minus that of the control at equal mean depth, 95 % intervals."
    return [ReportChart(name, title, figure_svg(drawn, title, tips), figure_png(drawn), note)]


def training_curve(alt: str, curves: Mapping[int, Sequence[tuple[int, float]]]) -> Markup:
    """Small chart of one metric over steps, a series per run; values that aren't finite leave a gap. alt: as of
    `figure_svg`; unique on a page."""
    drawn, (axes,) = figure(2.7, 1.4)
    drawn.set_layout_engine("none")
    axes.set_position((0.17, 0.17, 0.8, 0.76))
    for series, points in curves.items():
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), color=SERIES[series % len(SERIES)], marker=marker)
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=4, integer=True)
    return figure_svg(drawn, alt)
