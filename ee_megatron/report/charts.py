"""The report's charts as inline SVG, drawn once: for the page, and for the PNG copies that `pictures` makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from markupsafe import Markup, escape

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
