"""What a ladder of models is trained for: how many layers a hop takes inside a token, and the price of depth at which a
model begins to write its steps, by the shape of the model.

Depths stand in layers, which is what a hop takes, and as shares of the L layers that there are, which bound them
(`depth_...`); caps in layers. Prices stand as they were set: lambda is charged on shares, so that one layer costs
lambda / L (`..._per_layer`), the same to every shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from ..report.numbers import is_number
from ..report.tables import TextTable
from .choice import STEPS, STYLES, TERSE
from .compare import measured, over_bases, steps_share
from .forecast import steps_price
from .rows import Row, of_shape
from .shape import Shape
from .study import FREE, Condition, Record, Study
from .styles import depth_of_hops

LEVEL = 0.5
"""The share of steps from which on they have taken over, unless another is asked for."""
ASKED, ON_REQUEST = ("mean", "total", "max"), "square"
"""Costs that a price is forecast for in any study, and one that it is where a run paid it."""
NOTHING = "–"


@dataclass(frozen=True)
class Law:
    """One base on one family, under one cost of depth; RL seeds averaged. `layers`, `right`: of every style when it is
    given, before RL, under its own exits; `right_full`: at full depth, what the model could do; empty where that was
    not measured. `per_hop`, `at_no_hop`: layers of a terse answer's deepest token as a line over the hops of all
    families. `forecast`, `observed`: the price at which steps have the share `level`, None where they don't; `shares`:
    price -> share of steps, of `runs` runs."""

    shape: Shape
    base: int
    tau: int
    family: str
    hops: int
    cost: str
    layers: Mapping[str, float]
    right: Mapping[str, float]
    right_full: Mapping[str, float]
    per_hop: float
    at_no_hop: float
    forecast: float | None
    observed: float | None
    shares: Mapping[float, float]
    runs: int
    level: float


def crossing(shares: Mapping[float, float], level: float) -> float | None:
    """The least price at which `shares` (price -> share) reach the level, on straight lines between neighbouring
    prices. 0 if they have reached it without a price; None if they never do, or have at the lowest price that was
    tried where that is not 0."""
    points = sorted(shares.items())
    if points and points[0][1] >= level:
        return 0.0 if points[0][0] == 0 else None
    for (price, share), (next_price, next_share) in pairwise(points):
        if share < level <= next_share:
            return price + (level - share) / (next_share - share) * (next_price - price)
    return None


def laws(study: Study, level: float = LEVEL) -> list[Law]:
    """By shape, tokens a step, family, cost and base; bases that only had fixed depths, or a price of length, have
    none. Where other bases were trained on a family alone, one that was not has no prices there, but the rest: what
    was measured before RL. `level`: the share of steps that prices are asked for."""
    return [law for shape in study.shapes for law in _of_shape(study.of_shape(shape), shape, level)]


def _of_shape(study: Study, shape: Shape, level: float) -> Iterator[Law]:
    for tau in study.taus:
        for family in study.families(tau):
            runs = _on_the_line(study.runs(tau, family))
            having = _on_the_line(r for r in study.records if r.tau == tau and family in r.families)
            paid = {r.condition.kind for r in runs}
            for cost in (*ASKED, *([ON_REQUEST] if ON_REQUEST in paid else [])):
                places = {Condition(FREE)} | {r.condition for r in runs if r.condition.kind == cost}
                found = {c.number: measured(study, tau, family, c, steps_share) for c in places}
                for base in sorted({r.base for r in having}):
                    one = next(r for r in (*runs, *having) if r.base == base)
                    shares = {price: values[base] for price, values in found.items() if base in values}
                    count = sum(r.condition in places for r in runs if r.base == base)
                    yield _law(study, one, family, cost, shares, count, level)


def _on_the_line(runs: Iterable[Record]) -> list[Record]:
    """Those that a cost of depth was paid in, or nothing."""
    return [r for r in runs if r.condition == Condition(FREE) or r.condition.priced]


def _law(
    study: Study, run: Record, family: str, cost: str, shares: Mapping[float, float], runs: int, level: float
) -> Law:
    """`run`: any of the base's, of which what was there before RL is that of all."""
    start, shape = study.start(run, family), run.shape
    forced = start.forced if start else {}
    full = study.start_anywhere(run, family)
    others = [found for f in study.families(run.tau) if (found := study.start(run, f)) and TERSE in found.forced]
    per_hop, at_no_hop = depth_of_hops(
        (found.hops, found.forced[TERSE].correct, shape.layers * found.forced[TERSE].max_depth) for found in others
    )
    return Law(
        shape=shape,
        base=run.base,
        tau=run.tau,
        family=family,
        hops=study.hops[family],
        cost=cost,
        layers={style: shape.layers * figures.max_depth for style, figures in forced.items()},
        right={style: figures.correct for style, figures in forced.items()},
        right_full={style: figures.correct for style, figures in full.forced_full.items()} if full else {},
        per_hop=per_hop,
        at_no_hop=at_no_hop,
        forecast=steps_price(study, run, family, cost, level),
        observed=crossing(shares, level),
        shares=shares,
        runs=runs,
        level=level,
    )


def laws_rows(found: Sequence[Law]) -> list[Row]:
    """A row per law; a column for every price that any run paid."""
    prices = sorted({price for law in found for price in law.shares})
    return [_row(law, prices) for law in found]


def _row(law: Law, prices: Sequence[float]) -> Row:
    row: Row = {
        "model": f"{law.shape.slug}#{law.base}", **of_shape(law.shape), "base": law.base, "tau": law.tau,
        "family": law.family, "hops": law.hops, "cost": law.cost,
    }  # fmt: skip
    row |= {f"layers_{style}": law.layers.get(style) for style in STYLES}
    row |= {f"depth_{style}": law.layers[style] / law.shape.layers if style in law.layers else None for style in STYLES}
    row |= {f"right_{style}": law.right.get(style) for style in STYLES}
    row |= {f"right_{style}_full": law.right_full.get(style) for style in STYLES}
    row |= {"level": law.level, "layers_per_hop": law.per_hop, "layers_at_no_hop": law.at_no_hop}
    for name, price in (("forecast", law.forecast), ("observed", law.observed)):
        row |= {f"price_{name}": price, f"price_{name}_per_layer": None if price is None else price / law.shape.layers}
    row |= {f"share_steps_{price:g}": law.shares.get(price) for price in prices}
    return row | {"runs": law.runs}


def laws_table(found: Sequence[Law]) -> tuple[str, TextTable]:
    """A caption and a row per shape, tokens a step, family and cost: means over bases with their 95 % intervals.
    `found`: one or more, of one level."""
    caption = (
        "By shape of the model. Before RL, the style given: layers that the deepest token of an answer takes, and "
        "layers per hop, over the families whose terse answers are right; how often terse answers are right at full "
        "depth. Then the price λ at which steps have "
        f"{found[0].level:.0%} of the answers: by the closed form, and as the runs have it, on straight lines between "
        "neighbouring prices. λ is charged on shares of the layers: a layer costs λ / L. Mean over bases, 95 %; where "
        "some bases have none, how many have."
    )
    heads = (
        "shape", "tokens a step", "hops", "cost", "layers, terse", "layers, steps", "layers per hop",
        "terse right, full depth", "λ, closed form", "λ, observed", "bases",
    )  # fmt: skip
    rows = []
    for _, group in groupby(found, key=lambda law: (law.shape, law.tau, law.family, law.cost)):
        alike = list(group)
        law = alike[0]
        columns = (
            [each.layers.get(TERSE) for each in alike],
            [each.layers.get(STEPS) for each in alike],
            [each.per_hop for each in alike],
            [each.right_full.get(TERSE) for each in alike],
            [each.forecast for each in alike],
            [each.observed for each in alike],
        )
        cells = (_mean(dict(enumerate(values))) for values in columns)
        rows.append((law.shape.label, str(law.tau), str(law.hops), law.cost, *cells, str(len(alike))))
    return caption, TextTable(heads, rows, names=4)


def _mean(values: Mapping[int, float | None]) -> str:
    known = {base: value for base, value in values.items() if is_number(value)}
    if not known:
        return NOTHING
    value, low, high = over_bases(known)
    around = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else ""
    return f"{value:.2f}{around}" + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")
