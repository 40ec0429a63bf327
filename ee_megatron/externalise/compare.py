"""Figures of a condition by base, and differences between conditions: RL seeds are averaged within a base, intervals
are over bases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..statistics import Estimate, t_interval
from .choice import PADDED, STEPS, TERSE, FamilyChoice
from .study import Condition, Record, Study

ByBase = Mapping[int, float]
"""Base -> figure."""
Figure = Callable[[Record, str], float]
"""What of a run is compared: of its reinforced model, on a family."""


def steps_share(run: Record, family: str) -> float:
    return run.found(family).share[STEPS]


def padding_odds(run: Record, family: str) -> float:
    """log of padded to terse answers. One answer more is counted, shared between both as in the corpus: where hardly
    any are left the odds are then the corpus', which is no change, and never infinite."""
    found, weights = run.found(family), run.weights
    padded, terse = (
        found.share[style] * found.free.n + weights[style] / (weights[PADDED] + weights[TERSE])
        for style in (PADDED, TERSE)
    )
    return math.log(padded / terse)


def by_base(runs: Sequence[Record], figure: Callable[[Record], float | None]) -> dict[int, float]:
    """Mean over each base's runs; bases without a value are left out."""
    values: dict[int, list[float]] = {}
    for run in runs:
        value = figure(run)
        if value is not None and math.isfinite(value):
            values.setdefault(run.base, []).append(value)
    return {base: sum(found) / len(found) for base, found in sorted(values.items())}


def measured(study: Study, tau: int, family: str, condition: Condition, figure: Figure) -> dict[int, float]:
    """A figure of the reinforced models, by base."""
    return by_base(study.runs(tau, family, condition), lambda run: figure(run, family))


def difference(first: ByBase, second: ByBase) -> dict[int, float]:
    """`first` minus `second`, of bases that have both."""
    return {base: first[base] - second[base] for base in first if base in second}


def mean_of(parts: Sequence[ByBase]) -> dict[int, float]:
    """Mean over the parts, of bases that have all of them."""
    common = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {base: sum(part[base] for part in parts) / len(parts) for base in sorted(common)}


def over_bases(values: ByBase) -> Estimate:
    return t_interval(list(values.values()))


def effect(study: Study, tau: int, family: str, pair: tuple[Condition, Condition], figure: Figure) -> dict[int, float]:
    """What the first condition changes against the second, by base."""
    first, second = (measured(study, tau, family, condition, figure) for condition in pair)
    return difference(first, second)


def mean_effect(
    study: Study, tau: int, families: Sequence[str], pair: tuple[Condition, Condition], figure: Figure
) -> dict[int, float]:
    return mean_of([effect(study, tau, family, pair, figure) for family in families])


def before_rl(
    study: Study,
    tau: int,
    family: str,
    look: Callable[[Record, str], FamilyChoice | None],
    figure: Callable[[FamilyChoice], float | None],
) -> dict[int, float]:
    """A figure of what the runs began from, by base; `look`: `study.start`, say."""

    def of(run: Record) -> float | None:
        found = look(run, family)
        return None if found is None else figure(found)

    return by_base([r for r in study.records if r.tau == tau], of)
