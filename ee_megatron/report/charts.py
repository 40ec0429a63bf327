"""The report's charts as inline SVG, drawn once: for the page, and for the PNG copies that `pictures` makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup, escape

from .data import Curve
from .numbers import number
from .svg import Frame, colour, marker, padded, ticks


@dataclass(frozen=True)
class Dot:
    """One value with its interval (nan: none), what the pointer is told of it, and a word that stands beside it."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    tip: str = ""
    word: str = ""


@dataclass(frozen=True)
class Strip:
    """A row of a bar chart: a name, a drawing and a value.

    The drawing is an <svg> of which lengths along x are per cent of a width that is not its own to say: text in it
    keeps its size on a narrow screen.
    """

    name: str
    drawing: Markup
    value: str


@dataclass(frozen=True)
class Chart:
    """A drawing with what stands around it. `name`: that of its PNG file, without suffix."""

    name: str
    title: str
    drawing: Markup | list[Strip]
    note: str = ""
    legend: list[tuple[Markup, str]] = field(default_factory=list)


def tradeoff(series: Sequence[tuple[str, list[Dot]]]) -> Markup:
    """Accuracy against mean depth, 95 % intervals as bars; beside a point its row in the table, as its word."""
    points = [p for _, group in series for p in group]
    low, high = padded([v for p in points for v in (p.low, p.high)], 0.06)
    y_range = (max(0.0, low), min(1.0, high) if high > 0 else 1.0)
    frame = Frame(460, 330, padded([p.x for p in points], 0.07), y_range, percent_y=True)
    parts = frame.axes("mean depth (fraction of the layers)", "accuracy")
    taken = [(frame.x(p.x), frame.y(p.y)) for p in points]
    for index, (_, group) in enumerate(series):
        parts += _bars(frame, index, group)
    for index, (_, group) in enumerate(series):
        for p in group:
            x, y = frame.x(p.x), frame.y(p.y)
            parts.append(marker(index, x, y, tip=p.tip))
            options = [(x + dx, y + dy) for dx, dy in ((11, -4), (-11, -4), (11, 11), (-11, 11))]
            at = max(options, key=lambda o: min((math.dist(o, t) for t in taken if t != (x, y)), default=99.0))
            taken.append(at)
            parts.append(
                f'<text class="mark-label" x="{at[0]:.1f}" y="{at[1] + 3:.1f}" text-anchor="middle">'
                f"{escape(p.word)}</text>"
            )
    names = "; ".join(f"{name}: {len(group)} points" for name, group in series)
    return frame.svg(parts, f"Accuracy against mean depth. {names}. The table above has every value.")


def histogram(rows: Mapping[str, Mapping[str, int]], outcomes: Sequence[int], num_layers: int) -> list[Strip]:
    """A bar per label, cut into the shares of tokens that exit at each depth, in the colours of the depth scale, and
    the mean depth. rows: label -> depth -> tokens."""
    strips = []
    for label, found in rows.items():
        counts = {int(depth): count for depth, count in found.items()}
        total = sum(counts.values()) or 1
        mean = sum(depth * count for depth, count in counts.items()) / total / num_layers
        parts, spoken, left = [], [], 0.0
        for index, depth in enumerate(outcomes):
            share = counts.get(depth, 0) / total
            if share <= 0:
                continue
            spoken.append(f"depth {depth} {share:.0%}")
            tip = f"{label}\nexit at depth {depth} of {num_layers}\n{share:.1%} of {total:,.0f} tokens"
            parts.append(
                f'<rect class="cell k{index}" x="{100 * left:.3f}%" width="{100 * share:.3f}%" height="100%" '
                f'data-tip="{escape(tip)}"/>'
            )
            if share >= 0.07:
                middle = 100 * (left + share / 2)
                parts.append(f'<text class="inside k{index}" x="{middle:.3f}%" y="50%" dy=".35em">{share:.0%}</text>')
            left += share
        strips.append(_strip(label, parts, f"{mean:.2f}", f"mean depth {mean:.2f}; {', '.join(spoken)}"))
    return strips


def _strip(name: str, parts: Sequence[str], value: str, alt: str, tip: str = "") -> Strip:
    data = f' data-tip="{escape(tip)}"' if tip else ""
    head = f'<svg class="strip" role="img" aria-label="{escape(f"{name}: {alt}")}"{data}>'
    return Strip(name, Markup(f"{head}{''.join(parts)}</svg>"), value)


@dataclass(frozen=True)
class Line:
    """`series` decides colour and shape, `rule` the dash; unjoined lines are loose marks, drawn faint; unmarked ones
    are a course alone."""

    series: int
    rule: int
    name: str
    dots: list[Dot]
    joined: bool = True
    marked: bool = True


@dataclass(frozen=True)
class Slot:
    """A place of its own beside a chart's lines, for what has none on its x axis; of its lines y counts alone."""

    name: str
    lines: Sequence[Line]


def scatter(means: Sequence[Line], tokens: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    """Depth (fraction of L) against entropy (nats): means over bins with their standard error where it is known, and
    single tokens as faint dots, by the line's name."""
    xs = [d.x for line in means for d in line.dots] + [x for line in means for x, _ in tokens.get(line.name, [])]
    frame = Frame(460, 330, (0.0, max(xs, default=1.0) * 1.04 or 1.0), (0.0, 1.06))
    parts = frame.axes("teacher's entropy (nats)", "depth (fraction of the layers)")
    for line in means:
        points = tokens.get(line.name, [])
        for i, (x, y) in enumerate(points[:: max(1, len(points) // 600)]):
            # Depths take few values: a fixed small offset per token keeps the dots apart.
            at = frame.y(y) + ((i * 0.6180339887) % 1 - 0.5) * 9
            parts.append(f'<circle class="dot {colour(line.series)}" cx="{frame.x(x):.1f}" cy="{at:.1f}" r="1.8"/>')
    for line in means:
        parts += [_line(frame, line, line.dots), *_bars(frame, line.series, line.dots)]
        parts += _marks(frame, line.series, line.dots, 3.8)
    spoken = "; ".join(
        f"{line.name}: mean depth {line.dots[0].y:.2f} in the lowest bin, {line.dots[-1].y:.2f} in the highest"
        for line in means
    )
    return frame.svg(parts, f"Depth of a token against the teacher's entropy. {spoken}.")


def _line(frame: Frame, line: Line, dots: Sequence[Dot]) -> str:
    path = " ".join(f"{frame.x(d.x):.1f},{frame.y(d.y):.1f}" for d in dots)
    return f'<polyline class="line {colour(line.series)} r{line.rule % 4}" points="{path}"/>'


def _marks(frame: Frame, series: int, dots: Sequence[Dot], size: float) -> list[str]:
    return [marker(series, frame.x(d.x), frame.y(d.y), size, d.tip) for d in dots]


def _bars(frame: Frame, series: int, dots: Sequence[Dot]) -> list[str]:
    """The intervals that are known, as far as they lie within the frame."""
    low, high = frame.y_range
    known = [d for d in dots if math.isfinite(d.low) and math.isfinite(d.high)]
    ends = [(frame.x(d.x), frame.y(max(d.low, low)), frame.y(min(d.high, high))) for d in known]
    return [
        f'<line class="bar {colour(series)}" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>'
        for x, bottom, top in ends
    ]


@dataclass(frozen=True)
class Axes:
    """Labels and scale of a chart of lines. `diagonal`: the line y = x, where both would agree."""

    x: str
    y: str
    percent_y: bool = False
    log_y: bool = False
    diagonal: bool = False
    unit: bool = False
    """Both axes run from 0 to 1."""
    y_range: tuple[float, float] | None = None
    level: float | None = None
    """Of y, as a dashed line."""
    span: float = 0.0
    """Least range of y: what differs by less looks alike."""

    def ranges(self, lines: Sequence[Line]) -> tuple[tuple[float, float], tuple[float, float]]:
        xs = [d.x for line in lines for d in line.dots]
        ys = [v for line in lines for d in line.dots for v in (d.y, d.low, d.high) if math.isfinite(v)]
        if self.y_range:
            return padded(xs, 0.06), self.y_range
        if self.level is not None:
            ys.append(self.level)
        if self.unit:
            return (0.0, 1.0), (0.0, 1.0)
        if self.log_y:
            positive = [v for v in ys if v > 0] or [1.0]
            return padded(xs, 0.06), (min(positive) / 1.3, max(positive) * 1.3)
        low, high = padded(ys, 0.06)
        wider = max(0.0, self.span - (high - low)) / 2
        low, high = low - wider, high + wider
        return padded(xs, 0.06), (max(0.0, low), min(1.0, high)) if self.percent_y else (low, high)


SLOT, GAP, NAMES = 24, 16, 38
"""Widths of a slot and of what parts the slots from the lines; height of the slots' names."""


def lines(drawn: Sequence[Line], axes: Axes, title: str, beside: Sequence[Slot] = ()) -> Markup:
    """Lines with marks and intervals. `title` begins what is read out; every line follows with its ends."""
    x_range, y_range = axes.ranges(drawn)
    if beside and axes.y_range is None:
        y_range = axes.ranges([*drawn, *(line for slot in beside for line in slot.lines)])[1]
    right, bottom = (10 + GAP + SLOT * len(beside), 36 + NAMES) if beside else (10, 36)
    frame = Frame(
        460, 330 + bottom - 36, x_range, y_range, log_y=axes.log_y, right=right, bottom=bottom,
        percent_y=axes.percent_y, labelled=bool(axes.y),
    )  # fmt: skip
    parts = frame.axes(axes.x, axes.y)
    if axes.level is not None:
        y, end = frame.y(axes.level), frame.width - frame.right
        parts.append(f'<line class="axis dashed" x1="{frame.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if axes.diagonal:
        low, high = max(x_range[0], y_range[0]), min(x_range[1], y_range[1])
        parts.append(
            f'<line class="axis dashed" x1="{frame.x(low):.1f}" y1="{frame.y(low):.1f}" '
            f'x2="{frame.x(high):.1f}" y2="{frame.y(high):.1f}"/>'
        )
    for line in drawn:
        dots = [d for d in line.dots if not axes.log_y or d.y > 0]
        if line.joined and len(dots) > 1:
            parts.append(_line(frame, line, dots))
        parts += _bars(frame, line.series, dots)
        if line.marked:
            faint = "" if line.joined else ' opacity=".45"'
            words = [_beside(frame, d) for d in dots if d.word]
            parts += [f"<g{faint}>", *_marks(frame, line.series, dots, 4.0), *words, "</g>"]
    parts += _slots(frame, beside)
    spoken = "; ".join(
        f"{line.name}: {number(line.dots[0].y)} at {number(line.dots[0].x)}, "
        f"{number(line.dots[-1].y)} at {number(line.dots[-1].x)}"
        for line in drawn
        if line.dots
    )
    spoken += "".join(f"; {slot.name}: {number(d.y)}" for slot in beside for d in slot.lines[0].dots[:1])
    return frame.svg(parts, f"{title}: {axes.y} against {axes.x}. {spoken}.")


def _slots(frame: Frame, slots: Sequence[Slot]) -> list[str]:
    """To the right of the frame, on its y axis."""
    if not slots:
        return []
    left, floor = frame.width - frame.right + GAP, frame.height - frame.bottom
    end, parts = left + SLOT * len(slots), []
    for value in ticks(*frame.y_range):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<line class="axis" x1="{left}" x2="{end}" y1="{floor}" y2="{floor}"/>')
    for i, slot in enumerate(slots):
        middle = left + SLOT * (i + 0.5)
        parts.append(
            f'<text class="tick" transform="translate({middle + 3.5:.1f} {floor + 7}) rotate(-90)" text-anchor="end">'
            f"{escape(slot.name)}</text>"
        )
        # A frame whose x is the slot's middle, whatever the dots say.
        place = replace(frame, x_range=(-1.0, 1.0), left=middle - SLOT, right=frame.width - middle - SLOT)
        for line in slot.lines:
            dots = [replace(d, x=0.0) for d in line.dots]
            parts += _bars(place, line.series, dots)
            if line.marked:
                faint = "" if line.joined else ' opacity=".45"'
                parts += [f"<g{faint}>", *_marks(place, line.series, dots, 4.0), "</g>"]
                continue
            ends = [replace(dots[0], x=-0.4), replace(dots[0], x=0.4)] if dots else []
            parts += [_line(place, line, ends)] if ends else []
    return parts


def _beside(frame: Frame, dot: Dot) -> str:
    """Its word, on the side where there is more room."""
    x, left = frame.x(dot.x), frame.x(dot.x) > frame.width / 2
    at, anchor = (x - 8, "end") if left else (x + 8, "start")
    y = frame.y(dot.y) + 3
    return f'<text class="mark-label" x="{at:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(dot.word)}</text>'


@dataclass(frozen=True)
class Effect:
    """A difference with its interval, as a row of a forest plot; `kept` False: drawn hollow, not a fair comparison."""

    name: str
    value: float
    low: float
    high: float
    kept: bool
    tip: str


def forest(effects: Sequence[Effect]) -> list[Strip]:
    """A row per effect: its interval as a bar about its value, and the zero line."""
    ends = [v for e in effects for v in (e.low, e.high, e.value) if math.isfinite(v)]
    low, high = padded([*ends, 0.0], 0.05)

    def at(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}%"

    strips = []
    for e in effects:
        css = "effect" if e.kept else "effect hollow"
        parts = [
            '<rect class="ground" width="100%" height="100%"/>',
            f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="0" y2="100%"/>',
            f'<line class="{css}" x1="{at(e.low)}" x2="{at(e.high)}" y1="50%" y2="50%"/>',
            f'<circle class="{css}" cx="{at(e.value)}" cy="50%" r="3.6"/>',
        ]
        alt = f"{e.value:+.1%} [{e.low:+.1%}, {e.high:+.1%}]"
        strips.append(_strip(e.name, parts, f"{e.value:+.1%}", alt, e.tip))
    return strips


def thin(points: Curve, limit: int = 240) -> list[tuple[int, float]]:
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


def curve(name: str, runs: Sequence[tuple[str, int, Curve]]) -> Markup:
    """One metric over the steps, a line per run (label, series, points); values that are not finite leave a gap."""
    shown = [(label, series, thin(points)) for label, series, points in runs]
    steps = [s for _, _, points in shown for s, _ in points]
    values = [y for _, _, points in shown for _, y in points if math.isfinite(y)]
    x_range = (min(steps), max(steps)) if max(steps) > min(steps) else (steps[0] - 1, steps[0] + 1)
    frame = Frame(270, 140, x_range, padded(values, 0.1), right=8, top=6, bottom=20, y_ticks=3, labelled=False)
    parts = frame.axes("", "", x_ticks=4, whole_x=True)
    for _, series, points in shown:
        css = f" {colour(series)}" if len(shown) > 1 else ""
        parts += _pieces(frame, points, css)
    if len(shown) == 1:
        parts += _hits(frame, name, shown[0][2])
    spoken = "; ".join(_spoken(label, points) for label, _, points in shown)
    return frame.svg(parts, f"{name}: {spoken}")


def _pieces(frame: Frame, points: Curve, css: str) -> list[str]:
    parts, piece = [], []
    for step, value in [*points, (0, math.nan)]:
        if math.isfinite(value):
            piece.append(f"{frame.x(step):.1f},{frame.y(value):.1f}")
        elif piece:
            x, y = piece[0].split(",")
            parts.append(
                f'<polyline class="line{css}" points="{" ".join(piece)}"/>'
                if len(piece) > 1
                else f'<circle class="lone{css}" cx="{x}" cy="{y}" r="2.5"/>'
            )
            piece = []
    return parts


def _hits(frame: Frame, name: str, points: Curve) -> list[str]:
    """Invisible columns, each nearest to one step, that tell the pointer its value."""
    finite = [p for p in points if math.isfinite(p[1])]
    edges, parts = [frame.x(s) for s, _ in finite], []
    for i, (step, value) in enumerate(finite):
        left = (edges[i - 1] + edges[i]) / 2 if i else frame.left
        right = (edges[i] + edges[i + 1]) / 2 if i + 1 < len(edges) else frame.width - frame.right
        tip = f"{name}\nstep {step}: {number(value)}"
        parts.append(
            f'<rect class="hit" data-tip="{escape(tip)}" x="{left:.1f}" y="{frame.top}" '
            f'width="{max(0.5, right - left):.1f}" height="{frame.height - frame.top - frame.bottom}"/>'
        )
    return parts


def _spoken(label: str, points: Curve) -> str:
    finite = [p for p in points if math.isfinite(p[1])]
    if not finite:
        return f"{label}: no value"
    first, last, values = finite[0], finite[-1], [y for _, y in finite]
    begin = f"{label}: " if label else ""
    return (
        f"{begin}{number(first[1])} at step {first[0]}, {number(last[1])} at step {last[0]}; "
        f"least {number(min(values))}, greatest {number(max(values))}"
    )
