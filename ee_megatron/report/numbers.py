"""Numbers as they stand in JSON, and as they are written in tables, on charts and in tooltips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number, which a truth value is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def or_nan(value: Any) -> float:
    """The number as a float; nan for what is none."""
    return float(value) if is_number(value) else math.nan


def strict_json(value: Any) -> Any:
    """The value with null for every float that isn't finite, which some readers of JSON refuse; keys become strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return value


def pareto_front(costs: Iterable[float], values: Iterable[float]) -> list[bool]:
    """Which of n points no other beats: none costs no more, is worth no less, and is better in one of the two.

    Of equal points all stand. Pareto efficiency; bool [n].
    """
    points = list(zip(costs, values, strict=True))
    return [not any(a <= c and b >= v and (a, b) != (c, v) for a, b in points) for c, v in points]


def number(value: float, digits: int = 3) -> str:
    """Three significant digits; whole from a thousand on."""
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.{digits - 3}f}"


def span(values: Sequence[float], form: Callable[[float], str]) -> str:
    """ "least to greatest", one of them where both look alike, a dash where there is none."""
    if not values:
        return "–"
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def estimate(value: Mapping[str, Any] | None, form: str = "{:.2f}") -> str:
    """ "value [low, high]"; a dash where there is none or it isn't finite."""
    if value is None or not is_number(value.get("value")):
        return "–"
    if not (is_number(value.get("low")) and is_number(value.get("high"))):
        return form.format(value["value"])
    return f"{form} [{form}, {form}]".format(value["value"], value["low"], value["high"])
