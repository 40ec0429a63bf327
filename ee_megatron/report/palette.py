"""The colours of `plotting`, for charts that are drawn by hand."""

from collections.abc import Sequence

from .plotting import DARK, LIGHT, SERIES, SERIES_DARK, ink, scale


def rules(count: int, stops: Sequence[str], series: Sequence[str]) -> str:
    """CSS for the classes k0 … k(count-1) (depth: box, shape and the text on it) and s0, s1, … (series)."""
    depths = [f".k{i}{{background:{c};fill:{c};color:{ink(c)}}}" for i, c in enumerate(scale(count, stops))]
    return "".join([*depths, *(f".s{i}{{--c:{c}}}" for i, c in enumerate(series))])


def stylesheet(count: int) -> str:
    """`rules` for light and dark pages."""
    dark = rules(count, DARK, SERIES_DARK)
    return f"{rules(count, LIGHT, SERIES)}@media screen and (prefers-color-scheme:dark){{{dark}}}"
