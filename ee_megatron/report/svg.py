"""Pieces of inline SVG: axes, ticks, marks. Colours come from the page's style sheet and follow its mode.

Every mark that has more to say carries `data-tip`, which the page's script shows beside the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from .numbers import number
from .palette import SERIES

SHAPES = 4


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


def powers(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], and where those are fewer than two, 2 and 5 times them as well."""
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [10.0**k for k in span if low <= 10.0**k <= high]
    return found if len(found) > 1 else [v for k in span for m in (1, 2, 5) if low <= (v := m * 10.0**k) <= high]


def tick_words(values: Sequence[float], percent: bool = False) -> list[str]:
    """The ticks in words, with as many digits as it takes to say them, so that no two look alike."""
    slack = 0.01 * min((b - a for a, b in pairwise(values)), default=math.inf)
    words: list[str] = []
    for digits in range(8):
        words = [f"{value:.{digits}%}" if percent else number(value, 3 + digits) for value in values]
        said = [float(word.replace(",", "").rstrip("%")) / (100 if percent else 1) for word in words]
        if all(abs(a - b) <= slack for a, b in zip(said, values, strict=True)):
            break
    return words


def width_of(word: str, size: float) -> float:
    """About how wide a number is in a font of that size: digits are wider than points, narrower than per cent."""
    return size * sum({".": 0.3, ",": 0.3, "-": 0.4, "%": 0.95}.get(c, 0.58) for c in word)


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Least and greatest finite value with some air; never an empty range."""
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    air = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - air, high + air


# Sizes that page.css gives ticks on a narrow screen, and the strip that a label of the y axis takes.
TICK, LABEL = 14.0, 18


@dataclass
class Frame:
    """A plot area inside a viewBox of width × height, with linear axes. `left` is by default what the words of its y
    ticks take, and its label, if it has one."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = math.nan
    right: float = 10
    top: int = 10
    bottom: int = 36
    log_y: bool = False
    percent_y: bool = False
    y_ticks: int = 5
    labelled: bool = True

    def __post_init__(self) -> None:
        if math.isnan(self.left):
            words = tick_words(self.y_values, self.percent_y)
            self.left = round(8 + LABEL * self.labelled + max((width_of(w, TICK) for w in words), default=0), 1)

    @property
    def y_values(self) -> list[float]:
        return powers(*self.y_range) if self.log_y else ticks(*self.y_range, self.y_ticks)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log_y:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def axes(self, x_label: str, y_label: str, x_ticks: int = 5, whole_x: bool = False) -> list[str]:
        """Grid, ticks and labels; a label that is empty is left out. `whole_x`: no ticks between whole numbers."""
        parts, end, floor = [], self.width - self.right, self.height - self.bottom
        for value, text in zip(self.y_values, tick_words(self.y_values, self.percent_y), strict=True):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{self.left}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{self.left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<line class="axis" x1="{self.left}" x2="{end}" y1="{floor}" y2="{floor}"/>')
        x_values = [v for v in ticks(*self.x_range, x_ticks) if not whole_x or v == int(v)]
        for value, text in zip(x_values, tick_words(x_values), strict=True):
            x = self.x(value)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 3}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 14}" text-anchor="middle">{text}</text>')
        if x_label:
            middle = (self.left + end) / 2
            parts.append(
                f'<text class="label" x="{middle:.0f}" y="{floor + 32}" text-anchor="middle">{escape(x_label)}</text>'
            )
        if y_label:
            middle = (self.top + floor) / 2
            parts.append(
                f'<text class="label" transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
                f"{escape(y_label)}</text>"
            )
        return parts

    def svg(self, parts: Sequence[str], alt: str) -> Markup:
        """The drawing; `alt` is what is read out instead of it."""
        body = "".join(parts)
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(alt)}">{body}</svg>'
        )


def colour(series: int) -> str:
    """The class that colours a series; with more series than colours they begin again."""
    return f"s{series % len(SERIES)}"


def marker(series: int, x: float, y: float, size: float = 4.5, tip: str = "") -> str:
    """Circle, square, triangle, diamond: series differ by shape as well as by colour."""
    data = f' data-tip="{escape(tip)}"' if tip else ""
    css = f'class="mark {colour(series)}"{data}'
    s = size
    if series % SHAPES == 0:
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{s}"/>'
    if series % SHAPES == 1:
        return f'<rect {css} x="{x - s * 0.9:.1f}" y="{y - s * 0.9:.1f}" width="{s * 1.8:.1f}" height="{s * 1.8:.1f}"/>'
    if series % SHAPES == 2:
        return f'<path {css} d="M{x:.1f} {y - s * 1.2:.1f} l{s * 1.15:.1f} {s * 2:.1f} h{-s * 2.3:.1f} z"/>'
    d = s * 1.3
    return f'<path {css} d="M{x:.1f} {y - d:.1f} l{d:.1f} {d:.1f} l{-d:.1f} {d:.1f} l{-d:.1f} {-d:.1f} z"/>'


def legend_mark(series: int, rule: int | None = None) -> Markup:
    """The marker of a series; with `rule`, on the dashed line of an exit rule."""
    if rule is None:
        return Markup(f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{marker(series, 7, 7)}</svg>')
    line = f'<line class="line {colour(series)} r{rule % 4}" x1="0" x2="34" y1="7" y2="7"/>'
    return Markup(f'<svg class="key long" viewBox="0 0 34 14" aria-hidden="true">{line}{marker(series, 17, 7)}</svg>')


def legend_line(series: int, rule: int) -> Markup:
    """A line without a marker."""
    line = f'<line class="line {colour(series)} r{rule % 4}" x1="0" x2="34" y1="7" y2="7"/>'
    return Markup(f'<svg class="key long" viewBox="0 0 34 14" aria-hidden="true">{line}</svg>')


def legend_box(outcome: int) -> Markup:
    """A field in the colour of an exit depth."""
    return Markup(f'<svg class="key" viewBox="0 0 14 14"><rect class="k{outcome}" width="14" height="14"/></svg>')
