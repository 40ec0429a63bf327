"""The study's charts: what is chosen against the price of depth, a panel for each number of hops, the closed form
dashed in the same colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..objectives.optimum import Shares
from ..report.charts import Axes, Chart, Dot, Line, Slot, lines
from ..report.svg import legend_line, legend_mark
from .choice import PADDED, STEPS, TERSE
from .compare import ByBase, Figure, by_base, difference, mean_of, measured, over_bases, padding_odds, steps_share
from .forecast import forecast
from .study import CAP, FREE, LENGTH, NO_EXITS, Condition, Record, Study, counted
from .verdicts import PRICE, compared, gains

COSTS = ("mean", "total", "max", "square")
WITHOUT = Condition(FREE)
BESIDE = (NO_EXITS, CAP, LENGTH)
POINTS = 24
"""Of a forecast's course."""
DASHED = 1
NOTE = (
    "Marks: mean over bases with its 95 % interval; faint: each base. Dashed: the closed form, from figures before RL."
)


@dataclass(frozen=True)
class Quantity:
    """What is drawn: of a run, and of forecast shares."""

    name: str
    title: str
    found: Figure
    expected: Callable[[Shares], float]
    axes: Axes
    form: str


def _odds(share: Shares) -> float:
    """nan where a style is never written."""
    possible = share[PADDED] > 0 and share[TERSE] > 0
    return math.log(share[PADDED] / share[TERSE]) if possible else math.nan


STEPS_SHARE = Quantity(
    "steps", "Steps written down", steps_share, lambda share: share[STEPS],
    Axes("λ, price of depth", "share of steps", y_range=(0.0, 1.02)), "{:.2f}",
)  # fmt: skip
PADDING = Quantity(
    "padding", "Padded against terse", padding_odds, _odds,
    Axes("λ, price of depth", "log odds padded : terse", span=1.0), "{:+.2f}",
)  # fmt: skip


def panels(study: Study, tau: int, quantity: Quantity) -> list[Chart]:
    """One per family that RL trained on with so many tokens a step."""
    return [_panel(study, tau, family, quantity) for family in study.families(tau)]


def _panel(study: Study, tau: int, family: str, quantity: Quantity) -> Chart:
    conditions = list(dict.fromkeys(run.condition for run in study.runs(tau, family)))
    drawn: list[Line] = []
    legend: list[tuple[Markup, str]] = []
    for series, cost in enumerate(COSTS, start=1):
        found = sorted({c.number for c in conditions if c.kind == cost and c.priced})
        if not found:
            continue
        legend.append((legend_mark(series), cost))
        places = [WITHOUT, *(Condition(cost, number) for number in found)]
        drawn += _course(study, tau, family, cost, max(found), quantity, series)
        drawn += _measured(study, tau, family, places, quantity, series)
    if not drawn:
        drawn += _measured(study, tau, family, [WITHOUT], quantity, 0)
    slots = [
        slot
        for condition in sorted(conditions, key=lambda c: (BESIDE.index(c.kind) if c.kind in BESIDE else -1, c.number))
        if condition.kind in BESIDE and not condition.also
        for slot in [_slot(study, tau, family, condition, quantity)]
        if slot.lines[0].dots
    ]
    if any(line.rule == DASHED for line in (*drawn, *(line for slot in slots for line in slot.lines))):
        legend.append((legend_line(0, DASHED), "closed form"))
    title = counted(study.hops[family], "hop")
    picture = lines(drawn, quantity.axes, f"{quantity.title}, {title}", slots)
    return Chart(f"{quantity.name}_{family}_tau{tau}", title, picture, "", legend)


def _measured(
    study: Study, tau: int, family: str, places: Sequence[Condition], quantity: Quantity, series: int
) -> list[Line]:
    """The means joined, the bases faint behind them."""
    means, bases = [], []
    for place in places:
        values = measured(study, tau, family, place, quantity.found)
        if values:
            means.append(
                _mean(place.number, values, f"{place.label}, {counted(study.hops[family], 'hop')}", quantity.form)
            )
            bases += _bases(place.number, values)
    name = next((place.kind for place in reversed(places)), "")
    return [Line(series, 0, f"{name}, bases", bases, joined=False), Line(series, 0, name, means)] if means else []


def _mean(x: float, values: ByBase, head: str, form: str) -> Dot:
    value, low, high = over_bases(values)
    interval = f" [{form}, {form}]".format(low, high) if math.isfinite(low) else ""
    each = "".join(f"\nbase {base}: {form.format(v)}" for base, v in values.items())
    return Dot(x, value, low, high, f"{head}\n{form.format(value)}{interval}{each}")


def _bases(x: float, values: ByBase) -> list[Dot]:
    return [Dot(x, value) for value in values.values()] if len(values) > 1 else []


def _course(study: Study, tau: int, family: str, cost: str, end: float, quantity: Quantity, series: int) -> list[Line]:
    """The forecast from no price to the highest, mean over bases."""
    runs = [run for run in study.runs(tau, family) if run.condition.kind == cost and run.condition.priced]
    dots = []
    for i in range(POINTS + 1):
        at = end * i / POINTS
        if values := _expected(study, runs, family, quantity.expected, at):
            dots.append(Dot(at, over_bases(values).value))
    return [Line(series, DASHED, f"closed form, {cost}", dots, marked=False)] if dots else []


def _slot(study: Study, tau: int, family: str, condition: Condition, quantity: Quantity) -> Slot:
    (*faint, mean) = _measured(study, tau, family, [condition], quantity, 0) or [Line(0, 0, "", [])]
    expected = _expected(study, study.runs(tau, family, condition), family, quantity.expected)
    course = [Line(0, DASHED, "closed form", [Dot(0, over_bases(expected).value)], marked=False)] if expected else []
    return Slot(condition.label, [mean, *course, *faint])


def _expected(
    study: Study, runs: Sequence[Record], family: str, figure: Callable[[Shares], float], price: float | None = None
) -> dict[int, float]:
    """A figure of the runs' forecasts, by base."""

    def of(run: Record) -> float | None:
        shares = forecast(study, run, family, price)
        return None if shares is None else figure(shares)

    return by_base(runs, of)


def by_tokens(study: Study, cost: str = "total") -> list[Chart]:
    """What a price on `cost` changes in the share of steps, by tokens a step; [] where no two conditions compare."""
    found = gains(study, cost)
    if not found:
        return []
    series = 1 + COSTS.index(cost)
    means = [
        _mean(tau, values, f"{cost} {PRICE:g}, {counted(tau, 'token')} a step", "{:+.2f}")
        for tau, values in found.items()
    ]
    faint = [dot for tau, values in found.items() for dot in _bases(tau, values)]
    drawn = [Line(series, 0, f"{cost}, bases", faint, joined=False), Line(series, 0, cost, means)]
    legend = [(legend_mark(series), f"{cost} {PRICE:g} against λ = 0")]
    pair = (Condition(cost, PRICE), WITHOUT)
    dots = []
    for tau in found:
        each = [
            difference(*(_expected(study, study.runs(tau, f, c), f, STEPS_SHARE.expected) for c in pair))
            for f in compared(study, list(found), pair) or compared(study, [tau], pair)
        ]
        if values := mean_of(each):
            dots.append(Dot(tau, over_bases(values).value))
    if dots:
        drawn.insert(0, Line(series, DASHED, "closed form", dots, marked=len(dots) == 1))
        legend.append((legend_line(series, DASHED), "closed form"))
    axes = Axes("tokens a step", "change of the share of steps", level=0.0, span=0.1)
    title = f"A price on {cost} depth, by length of a step"
    return [Chart(f"{cost}_by_tokens", title, lines(drawn, axes, title), "", legend)]
