"""The report's charts as strings of inline SVG or HTML. Colours come from the page's style sheet and follow its mode.

Every mark that has more to say carries `data-tip`, which the page's script shows beside the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Point:
    """A result: accuracy y with its interval at mean depth x; `mark` is the number of its row in the table."""

    x: float
    y: float
    low: float
    high: float
    mark: str
    tip: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Least and greatest finite value with some air; never an empty range."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    air = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - air, high + air


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


@dataclass
class Frame:
    """A plot area inside a viewBox of width × height, with linear axes."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 44
    right: int = 10
    top: int = 10
    bottom: int = 36

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def axes(
        self, x_label: str, y_label: str, percent_y: bool = False, x_ticks: int = 5, y_ticks: int = 5
    ) -> list[str]:
        parts, end, floor = [], self.width - self.right, self.height - self.bottom
        for value in ticks(*self.y_range, y_ticks):
            y = self.y(value)
            text = f"{value:.0%}" if percent_y else number(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{self.left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<line class="axis" x1="{self.left}" x2="{end}" y1="{floor}" y2="{floor}"/>')
        for value in ticks(*self.x_range, x_ticks):
            x = self.x(value)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 3}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 14}" text-anchor="middle">{number(value)}</text>')
        if x_label:
            middle = (self.left + end) / 2
            parts.append(
                f'<text class="label" x="{middle:.0f}" y="{self.height - 4}" text-anchor="middle">'
                f"{escape(x_label)}</text>"
            )
        if y_label:
            middle = (self.top + floor) / 2
            parts.append(
                f'<text class="label" transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
                f"{escape(y_label)}</text>"
            )
        return parts

    def svg(self, parts: Sequence[str], alt: str) -> Markup:
        body = "".join(parts)
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(alt)}">{body}</svg>'
        )


def marker(series: int, x: float, y: float, size: float = 4.5, tip: str = "") -> str:
    """Circle, square, triangle, diamond: series differ by shape as well as by colour."""
    data = f' data-tip="{escape(tip)}"' if tip else ""
    css = f'class="mark s{series % 4}"{data}'
    s = size
    if series % 4 == 0:
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{s}"/>'
    if series % 4 == 1:
        return f'<rect {css} x="{x - s * 0.9:.1f}" y="{y - s * 0.9:.1f}" width="{s * 1.8:.1f}" height="{s * 1.8:.1f}"/>'
    if series % 4 == 2:
        return f'<path {css} d="M{x:.1f} {y - s * 1.2:.1f} l{s * 1.15:.1f} {s * 2:.1f} h{-s * 2.3:.1f} z"/>'
    d = s * 1.3
    return f'<path {css} d="M{x:.1f} {y - d:.1f} l{d:.1f} {d:.1f} l{-d:.1f} {d:.1f} l{-d:.1f} {-d:.1f} z"/>'


def legend_mark(series: int, rule: int | None = None) -> Markup:
    """The marker of a series; with `rule`, on the dashed line of an exit rule."""
    if rule is None:
        return Markup(f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{marker(series, 7, 7)}</svg>')
    line = f'<line class="line s{series % 4} r{rule % 4}" x1="0" x2="34" y1="7" y2="7"/>'
    return Markup(f'<svg class="key long" viewBox="0 0 34 14" aria-hidden="true">{line}{marker(series, 17, 7)}</svg>')


def tradeoff(series: Sequence[tuple[str, list[Point]]]) -> Markup:
    """Accuracy against mean depth, 95 % intervals as bars, points numbered like the table's rows."""
    points = [p for _, group in series for p in group]
    low, high = padded([v for p in points for v in (p.low, p.high)], 0.06)
    frame = Frame(460, 330, padded([p.x for p in points], 0.07), (max(0.0, low), min(1.0, high) if high > 0 else 1.0))
    parts = frame.axes("mean depth (fraction of the layers)", "accuracy", percent_y=True)
    taken = [(frame.x(p.x), frame.y(p.y)) for p in points]
    for index, (_, group) in enumerate(series):
        for p in group:
            x, low_y, high_y = frame.x(p.x), frame.y(p.low), frame.y(p.high)
            parts.append(
                f'<line class="bar s{index % 4}" x1="{x:.1f}" x2="{x:.1f}" y1="{low_y:.1f}" y2="{high_y:.1f}"/>'
            )
    for index, (_, group) in enumerate(series):
        for p in group:
            x, y = frame.x(p.x), frame.y(p.y)
            parts.append(marker(index, x, y, tip=p.tip))
            options = [(x + dx, y + dy) for dx, dy in ((11, -4), (-11, -4), (11, 11), (-11, 11))]
            at = max(options, key=lambda o: min((math.dist(o, t) for t in taken if t != (x, y)), default=99.0))
            taken.append(at)
            parts.append(
                f'<text class="mark-label" x="{at[0]:.1f}" y="{at[1] + 3:.1f}" text-anchor="middle">'
                f"{escape(p.mark)}</text>"
            )
    names = "; ".join(f"{name}: {len(group)} points" for name, group in series)
    return frame.svg(parts, f"Accuracy against mean depth. {names}. The table above has every value.")


def histogram(rows: Sequence[tuple[str, dict[int, float]]], outcomes: Sequence[int], num_layers: int) -> Markup:
    """One bar per label, cut into the shares of tokens that exit at each depth, in the colours of the depth scale.

    Plain HTML boxes: unlike a drawing, they keep the size of their text on a narrow screen.
    """
    parts = []
    for label, counts in rows:
        total = sum(counts.values()) or 1.0
        mean = sum(depth * count for depth, count in counts.items()) / total / num_layers
        pieces, spoken = [], []
        for index, depth in enumerate(outcomes):
            share = counts.get(depth, 0.0) / total
            if share <= 0:
                continue
            spoken.append(f"depth {depth} {share:.0%}")
            tip = f"{label}\nexit at depth {depth} of {num_layers}\n{share:.1%} of {total:,.0f} tokens"
            text = f"{share:.0%}" if share >= 0.07 else ""
            pieces.append(
                f'<span class="k{index}" style="width:{100 * share:.3f}%" data-tip="{escape(tip)}">{text}</span>'
            )
        alt = f"{label}: mean depth {mean:.2f}; {', '.join(spoken)}"
        parts.append(
            f'<div class="share"><span class="share-label">{escape(label)}</span>'
            f'<span class="stack" role="img" aria-label="{escape(alt)}">{"".join(pieces)}</span>'
            f'<span class="share-mean">{mean:.2f}</span></div>'
        )
    return Markup("".join(parts))


@dataclass(frozen=True)
class Trend:
    """Depth against entropy for one model and exit rule.

    `series` decides colour and shape, `rule` the dash of the line. points: (entropy in nats, depth / L) of single
    tokens; bins: (mean entropy, mean depth / L, standard error or nan, tokens).
    """

    series: int
    rule: int
    name: str
    points: list[tuple[float, float]]
    bins: list[tuple[float, float, float, int]]


def scatter(trends: Sequence[Trend]) -> Markup:
    """Tokens as faint dots, means over bins of equal counts with their standard error where it is known."""
    xs = [x for t in trends for x, *_ in (*t.points, *t.bins)]
    frame = Frame(460, 330, (0.0, max(xs, default=1.0) * 1.04 or 1.0), (0.0, 1.06))
    parts = frame.axes("teacher's entropy (nats)", "depth (fraction of the layers)")
    for trend in trends:
        stride = max(1, len(trend.points) // 600)
        for i, (x, y) in enumerate(trend.points[::stride]):
            # Depths take few values: a fixed small offset per token keeps the dots apart.
            at = frame.y(y) + ((i * 0.6180339887) % 1 - 0.5) * 9
            parts.append(f'<circle class="dot s{trend.series % 4}" cx="{frame.x(x):.1f}" cy="{at:.1f}" r="1.8"/>')
    for trend in trends:
        colour = f"s{trend.series % 4}"
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y, _, _ in trend.bins)
        parts.append(f'<polyline class="line {colour} r{trend.rule % 4}" points="{path}"/>')
        for x, y, error, n in trend.bins:
            at, spread = frame.x(x), ""
            if math.isfinite(error):
                top, bottom, spread = frame.y(min(1.06, y + error)), frame.y(y - error), f" ± {error:.2f}"
                parts.append(
                    f'<line class="bar {colour}" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
                )
            tip = f"{trend.name}\nentropy {x:.2f} nats (mean of {n:,} tokens)\nmean depth {y:.2f}{spread}"
            parts.append(marker(trend.series, at, frame.y(y), 3.8, tip))
    spoken = "; ".join(
        f"{t.name}: mean depth {t.bins[0][1]:.2f} in the lowest bin, {t.bins[-1][1]:.2f} in the highest"
        for t in trends
        if t.bins
    )
    return frame.svg(parts, f"Depth of a token against the teacher's entropy. {spoken}.")


def thin(points: Sequence[tuple[int, float]], limit: int = 240) -> list[tuple[int, float]]:
    """At most about `limit` points, each bin's least and greatest value among them, so that no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 2))
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        finite = [p for p in points[start : start + size] if math.isfinite(p[1])]
        if finite:
            kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
    return kept


def curve(name: str, points: Sequence[tuple[int, float]]) -> Markup:
    """One metric over the steps; values that are not finite leave a gap."""
    shown = thin(points)
    finite = [p for p in shown if math.isfinite(p[1])]
    steps = [s for s, _ in shown]
    x_range = (min(steps), max(steps)) if max(steps) > min(steps) else (steps[0] - 1, steps[0] + 1)
    frame = Frame(270, 140, x_range, padded([y for _, y in finite], 0.1), left=42, right=8, top=6, bottom=20)
    parts = frame.axes("", "", x_ticks=4, y_ticks=3)
    piece: list[str] = []
    for step, value in [*shown, (0, math.nan)]:
        if math.isfinite(value):
            piece.append(f"{frame.x(step):.1f},{frame.y(value):.1f}")
        elif piece:
            end = piece[0].split(",")
            parts.append(
                f'<polyline class="line" points="{" ".join(piece)}"/>'
                if len(piece) > 1
                else f'<circle class="lone" cx="{end[0]}" cy="{end[1]}" r="2.5"/>'
            )
            piece = []
    edges = [frame.x(s) for s, _ in finite]
    for i, (step, value) in enumerate(finite):
        left = (edges[i - 1] + edges[i]) / 2 if i else frame.left
        right = (edges[i] + edges[i + 1]) / 2 if i + 1 < len(edges) else frame.width - frame.right
        tip = f"{name}\nstep {step}: {number(value)}"
        parts.append(
            f'<rect class="hit" data-tip="{escape(tip)}" x="{left:.1f}" y="{frame.top}" '
            f'width="{max(0.5, right - left):.1f}" height="{frame.height - frame.top - frame.bottom}"/>'
        )
    first, last, values = finite[0], finite[-1], [y for _, y in finite]
    alt = (
        f"{name}: {number(first[1])} at step {first[0]}, {number(last[1])} at step {last[0]}; "
        f"least {number(min(values))}, greatest {number(max(values))}"
    )
    return frame.svg(parts, alt)
