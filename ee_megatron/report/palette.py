"""Colours: a sequential scale for depth ordered by lightness alone, so it survives colour blindness and grey print."""

from __future__ import annotations

from collections.abc import Sequence

# The further from the page's background, the deeper: pale to dark on a light page, dark to bright on a dark one.
LIGHT = ("#f6f0cf", "#bfe0c2", "#62b3c4", "#2f70b3", "#242f79")
DARK = ("#26324d", "#2c5580", "#33888f", "#78b98a", "#efe08c")
# Teacher, calibrated, reinforced, then further runs: told apart under the common colour deficiencies, and by shape too.
SERIES = ("#6b7280", "#0072b2", "#d55e00", "#8a5a9e", "#00795a", "#8f6a00", "#b3427f", "#2b2f36")
SERIES_DARK = ("#a3abb8", "#56b4e9", "#f0883e", "#c79bdc", "#3fc39b", "#e0b64a", "#f08fbd", "#e9ecf1")


def _rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255


def scale(count: int, stops: Sequence[str]) -> list[str]:
    """`count` colours at even distances along the stops, the ends included."""
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


def rules(count: int, stops: Sequence[str], series: Sequence[str]) -> str:
    """CSS for the classes k0 … k(count-1) (depth: box, shape and the text on it) and s0, s1, … (series)."""
    depths = [f".k{i}{{background:{c};fill:{c};color:{ink(c)}}}" for i, c in enumerate(scale(count, stops))]
    return "".join([*depths, *(f".s{i}{{--c:{c}}}" for i, c in enumerate(series))])


def stylesheet(count: int) -> str:
    """`rules` for light and dark pages."""
    dark = rules(count, DARK, SERIES_DARK)
    return f"{rules(count, LIGHT, SERIES)}@media screen and (prefers-color-scheme:dark){{{dark}}}"
