"""The externalisation figures as text, one column per model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("accuracy with chain", ("accuracy_with",)),
    ("accuracy without", ("accuracy_without",)),
    ("chain necessity", ("chain_necessity",)),
    ("filler uplift", ("filler_uplift",)),
    ("truncation area, same answer", ("truncation", "area_same_answer")),
    ("truncation area, accuracy", ("truncation", "area_accuracy")),
    ("step necessity", ("step_necessity",)),
    ("mistake sensitivity", ("mistake_sensitivity",)),
    ("hint monitor g-mean²", ("hint_monitor", "g_mean2")),
    ("serial depth, median", ("serial_depth", "all", "quantiles", "0.5")),
    ("serial depth, 0.9", ("serial_depth", "all", "quantiles", "0.9")),
    ("serial depth of answer, mean", ("serial_depth", "answer", "mean")),
)


def externalisation_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Value and 95 % interval per figure and model; the probe's best depth for each distance. Dashes: not defined."""
    heads = ["", *(f"{model}, {found['exits']}" for model, found in models.items())]
    lines = [[name, *(_cell(_at(found, path)) for found in models.values())] for name, path in ROWS]
    ahead = sorted({entry["ahead"] for found in models.values() for entry in found.get("planning_probe", [])})
    lines += [
        [f"probe uplift, {k} ahead", *(_cell(_best(found.get("planning_probe", []), k)) for found in models.values())]
        for k in ahead
    ]
    widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]

    def line(texts: Sequence[str]) -> str:
        padded = [t.rjust(w) if i else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join(line(texts) for texts in (heads, ["-" * width for width in widths], *lines))


def _at(found: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, float] | None:
    value: Any = found
    for key in path:
        value = value.get(key) if value is not None else None
    return value  # type: ignore[no-any-return]


def _best(probes: Sequence[Mapping[str, Any]], ahead: int) -> Mapping[str, float] | None:
    uplifts = [estimate for probe in probes if probe["ahead"] == ahead for estimate in probe["uplift"]]
    return max(uplifts, key=lambda estimate: estimate["value"], default=None)


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None or not math.isfinite(estimate["value"]):
        return "–"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"
