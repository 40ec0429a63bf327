"""One style for all figures: matplotlib drawings as SVG within a page, in light and dark mode.

Importing this module doesn't import matplotlib, which takes half a second: draw with `figure`, end with `figure_svg`.
Colours that this module names get their dark counterpart in dark mode, matplotlib's black becomes the page's text
colour; any other colour stays as it is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# For depth and other ordered quantities, ordered by lightness alone, which survives colour blindness and grey print:
# pale to dark on a light page, dark to bright on a dark one.
LIGHT = ("#f6f0cf", "#bfe0c2", "#62b3c4", "#2f70b3", "#242f79")
DARK = ("#26324d", "#2c5580", "#33888f", "#78b98a", "#efe08c")
# Distinguished under the common colour deficiencies, and by MARKERS too. Teacher, calibrated, reinforced, further runs.
SERIES = ("#6b7280", "#0072b2", "#d55e00", "#8a5a9e", "#00795a", "#8f6a00", "#b3427f", "#2b2f36")
SERIES_DARK = ("#a3abb8", "#56b4e9", "#f0883e", "#c79bdc", "#3fc39b", "#e0b64a", "#f08fbd", "#e9ecf1")
MARKERS = ("o", "s", "^", "D")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK, QUIET, RULE, PAGE = "#1a1d23", "#5a616e", "#dfe2e8", "#ffffff"
INKS_DARK = ("#e4e7ec", "#9aa3b2", "#2c323c", "#14171c")
STEPS = 40
"""Most steps of a scale that have dark counterparts."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 8,
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


def scale(count: int, stops: Sequence[str] = LIGHT) -> list[str]:
    """`count` colours (#rrggbb) at even distances along the stops, the ends included. LIGHT[1:]: for lines, of which
    the palest vanishes on white."""
    colours = []
    for i in range(count):
        at = (i / (count - 1) if count > 1 else 1.0) * (len(stops) - 1)
        base = min(int(at), len(stops) - 2)
        mixed = [a + (b - a) * (at - base) for a, b in zip(_rgb(stops[base]), _rgb(stops[base + 1]), strict=True)]
        colours.append("#" + "".join(f"{round(255 * c):02x}" for c in mixed))
    return colours


def luminance(colour: str) -> float:
    """Relative luminance, 0..1 (WCAG 2.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink(colour: str) -> str:
    """Black or white, whichever contrasts more with `colour`: at least 4.5 : 1."""
    return "#000000" if (luminance(colour) + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def stylesheet(count: int) -> Markup:
    """CSS: text on the scale of `count` depths (classes k0, k1, …); the variable --c of series (s0, s1, …)."""

    def rules(stops: Sequence[str], series: Sequence[str]) -> str:
        depths = [f".k{i}{{background:{c};color:{ink(c)}}}" for i, c in enumerate(scale(count, stops))]
        return "".join([*depths, *(f".s{i}{{--c:{c}}}" for i, c in enumerate(series))])

    dark = rules(DARK, SERIES_DARK)
    return Markup(f"{rules(LIGHT, SERIES)}@media screen and (prefers-color-scheme:dark){{{dark}}}")


def figure(width: float = 4.6, height: float = 3.3, columns: int = 1, layout: str = "constrained") -> tuple[
    Figure, list[Axes]
]:  # fmt: skip
    """A figure of `width` × `height` inches and its axes, side by side. It has no window and no state outside of it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout=layout)
        return made, list(made.subplots(1, columns, squeeze=False)[0])


def figure_svg(figure: Figure, alt: str, tips: Mapping[Artist, Sequence[str]] | None = None) -> Markup:
    """The figure as an <svg> element for a page; text stays text in the page's font. The same figure gives the same
    bytes.

    alt: what a screen reader says instead. tips: for an artist what the pointer is told (`data-tip`, which page.js
    shows) of each of its markers in order, or of the whole of it. Texts may hold anything; dollar signs aren't math.
    """
    import matplotlib
    from matplotlib.legend import Legend
    from matplotlib.text import Text
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, NullFormatter

    marks = {f"tip-{i}": (artist, words) for i, (artist, words) in enumerate((tips or {}).items())}
    for name, (artist, _) in marks.items():
        artist.set_gid(name)
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": alt}):
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            if isinstance(axis.get_major_formatter(), LogFormatterSciNotation):
                low, high = axis.get_view_interval()
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                if high / low < 30:
                    axis.set_minor_formatter(FuncFormatter(_two_or_five))
                else:
                    axis.set_minor_formatter(NullFormatter())
        for legend in figure.findobj(Legend):
            legend.set_frame_on(False)
        for text in figure.findobj(Text):
            text.set_parse_math(False)
            text.set_text(NO_XML.sub("", text.get_text()))
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _tidy(root, alt, {name: words for name, (_, words) in marks.items()})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def standalone(svg: Markup) -> str:
    """`figure_svg`'s element as a file of its own."""
    return str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _tidy(root: ElementTree.Element, alt: str, tips: Mapping[str, Sequence[str]]) -> None:
    """Matplotlib's document as an element of a page: without namespaces, metadata, rules for all of the page, fonts of
    its own, or ids that nothing refers to; with colours that follow the mode."""
    used, referred = {INK}, set[str]()
    for element in root.iter():
        for child in [child for child in element if child.tag.endswith(("}metadata", "}style"))]:
            element.remove(child)
        # Spaces count in text alone.
        element.tag, element.tail = element.tag.rpartition("}")[2], None
        element.text = element.text if element.tag == "text" else None
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key in ("d", "x", "y", "transform"):
                value = re.sub(r"(\.\d\d)\d+", r"\1", value)
            element.set(key.rpartition("}")[2], value)
        if style := element.get("style"):
            style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", re.sub("font-family:[^;]*;?", "", style))
            used |= {colour for colour in re.findall("#[0-9a-f]{6}", style) if colour in _dark()}
            style = re.sub("#([0-9a-f]{6})", lambda c: f"var(--c{c[1]}, {c[0]})" if c[0] in _dark() else c[0], style)
            element.set("style", style)
        referred |= set(re.findall(r"#(\w+)", element.get("href", "") + element.get("clip-path", "")))
    for element in root.iter():
        if (words := tips.get(element.get("id", ""))) is not None:
            for mark, tip in zip([*element.iter("use")] or [*element.iter("path")], words, strict=False):
                mark.set("data-tip", NO_XML.sub("", tip))
        if element.get("id", "") not in referred:
            element.attrib.pop("id", None)
    box = root.get("viewBox", "")
    root.attrib.clear()
    # Matplotlib leaves black text without a colour.
    style = f"fill: var(--c{INK[1:]}, {INK}); stroke-linejoin: round; font-family: var(--sans, sans-serif)"
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": NO_XML.sub("", alt), "style": style})
    dark = ElementTree.Element("style")
    variables = "".join(f"--c{colour[1:]}:{_dark()[colour]};" for colour in sorted(used))
    dark.text = f"@media screen and (prefers-color-scheme:dark){{:root{{{variables}}}}}"
    root.insert(0, dark)


def _two_or_five(value: float, _: int) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


@cache
def _dark() -> dict[str, str]:
    """Colour on a light page -> its counterpart on a dark one."""
    pairs = dict(zip((INK, QUIET, RULE, PAGE), INKS_DARK, strict=True)) | {"#000000": INKS_DARK[0]}
    for first in (1, 0):
        for count in range(1, STEPS + 1):
            pairs |= dict(zip(scale(count, LIGHT[first:]), scale(count, DARK[first:]), strict=True))
    return pairs | dict(zip(SERIES, SERIES_DARK, strict=True))


def _rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255
