"""PNG copies of the report's charts, for slides and papers: the page's own SVG on white, its legend underneath."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import resvg_py
from markupsafe import Markup, escape

from .charts import Chart
from .palette import LIGHT, SERIES, rules
from .template import FOLDER

ZOOM = 2
MARGIN, GAP = 12, 24
# The font's mean width per character in legends and names.
CHARACTER = 6.5
COLUMNS = 4
STRIP = (400, 20)
# What XML, unlike HTML, refuses.
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
Legend = Sequence[tuple[Markup, str]]


def picture(chart: Chart, outcomes: int) -> bytes:
    """A chart as PNG; `outcomes`: how many steps the scale of depths has."""
    sheet = _Sheet()
    if isinstance(chart.drawing, Markup):
        sheet.place(chart.drawing, 0, 0)
    else:
        left = max(len(strip.name) for strip in chart.drawing) * CHARACTER
        for strip in chart.drawing:
            y = sheet.height
            sheet.text(strip.name, left - 8, y + 14, "end")
            sheet.place(strip.drawing, left, y, STRIP)
            sheet.text(strip.value, left + STRIP[0] + 8, y + 14)
            sheet.height += 6
        sheet.note(chart.note)
    sheet.legend(chart.legend)
    return sheet.png(outcomes)


def multiples(panels: Sequence[tuple[str, Markup]], legend: Legend) -> bytes:
    """Small drawings, each under its title, in rows of four, as PNG."""
    sheet = _Sheet()
    for start in range(0, len(panels), COLUMNS):
        x, y = 0.0, sheet.height + (24 if start else 12)
        for title, drawing in panels[start : start + COLUMNS]:
            sheet.text(title, x, y)
            x += GAP + sheet.place(drawing, x, y + 6)[0]
    sheet.legend(legend)
    return sheet.png(0)


class _Sheet:
    """SVG that grows downward as drawings are placed on it; lengths in the pixels of the page."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.width = self.height = 0.0

    def place(
        self, drawing: Markup, x: float, y: float, size: tuple[float, float] | None = None
    ) -> tuple[float, float]:
        """An <svg> at x, y, in its own size if none is given. Returns its width and height."""
        width, height = size or _size(drawing)
        head = f'<svg x="{x:.1f}" y="{y:.1f}" width="{width}" height="{height}"'
        self.parts.append(drawing.replace("<svg", Markup(head), 1))
        self._reach(x + width, y + height)
        return width, height

    def text(self, words: str, x: float, y: float, anchor: str = "start") -> None:
        self.parts.append(f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')
        self._reach(x + len(words) * CHARACTER if anchor == "start" else x, y)

    def note(self, words: str) -> None:
        for line in textwrap.wrap(words, int(self.width / CHARACTER)):
            self.text(line, 0, self.height + 16)

    def legend(self, entries: Legend) -> None:
        """Below all that there is, in lines as long as it is wide."""
        x, y = 0.0, self.height + 8
        for mark, name in entries:
            wide = (_size(mark)[0] + 5 if mark else 0) + len(name) * CHARACTER
            if x and x + wide > self.width:
                x, y = 0.0, y + 18
            left = x + self.place(mark, x, y)[0] + 5 if mark else x
            self.text(name, left, y + 11)
            x += wide + 10

    def png(self, outcomes: int) -> bytes:
        width, height = self.width + 2 * MARGIN, self.height + 2 * MARGIN
        body = NO_XML.sub("", "".join(self.parts))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}">'
            f'<g transform="translate({MARGIN} {MARGIN})">{body}</g></svg>'
        )
        # matplotlib's font is on every machine, the system's need not be.
        font = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=svg, style_sheet=_style(outcomes), background="#ffffff", zoom=ZOOM, skip_system_fonts=True,
                font_files=[str(font)], font_family="DejaVu Sans",
            )
        )  # fmt: skip

    def _reach(self, right: float, bottom: float) -> None:
        self.width, self.height = max(self.width, right), max(self.height, bottom)


def _size(drawing: Markup) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 (\d+) (\d+)"', drawing)
    assert found is not None, drawing[:80]
    return float(found[1]), float(found[2])


def _style(outcomes: int) -> str:
    """The page's rules for drawings in its light colours, without variables, which resvg doesn't know: what a series'
    --c is on the page, `color` is here."""
    css = (FOLDER / "charts.css").read_text(encoding="utf-8") + rules(outcomes, LIGHT, SERIES)
    css = re.sub(r"var\(--c(, var\(--accent\))?\)", "currentColor", css).replace("{--c:", "{color:")
    page = (FOLDER / "page.css").read_text(encoding="utf-8").partition("@media")[0]
    light = dict(re.findall(r"--(\w+): (#\w+)", page))
    css = re.sub(r"var\(--(\w+)\)", lambda found: light[found[1]], css)
    return f"svg {{ color: {light['accent']}; overflow: visible; font-family: 'DejaVu Sans'; }}\n{css}"
