"""The points on which the study is accepted, set before it ran. Each is a function of the records.

Points 1 to 5 are asked of the answers with the fewest tokens a step, point 6 across tokens a step. A limit on a figure
is asked of its mean over bases: a single base's figures, of some hundred answers, are uncertain by points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..statistics import Estimate
from .choice import PADDED, START, STEPS, TERSE, FamilyChoice
from .compare import (
    ByBase,
    before_rl,
    difference,
    effect,
    mean_effect,
    mean_of,
    measured,
    over_bases,
    padding_odds,
    steps_share,
)
from .shape import Shape
from .study import CAP, FREE, NO_EXITS, Condition, Study, counted

PRICE = 1.0
"""The lambda at which costs are compared."""
SKILL_GAP, PADDING_GAP, DRIFT = 0.02, 0.06, 0.1
CAPPED_DEPTH, CAPPED_SHARE = 2, 0.9
TAUS = (1, 4)
NONE, WITHOUT = Condition(NO_EXITS), Condition(FREE)


@dataclass(frozen=True)
class Part:
    """One figure that a point asks for. `per_base` is empty, and `passed` None, where runs are missing."""

    name: str
    per_base: ByBase
    estimate: Estimate
    passed: bool | None
    form: str = "{:+.2f}"

    @property
    def words(self) -> str:
        if not self.per_base:
            return f"{self.name}: not measured"
        value, low, high = self.estimate
        interval = f" [{self.form}, {self.form}]".format(low, high) if math.isfinite(low) else ""
        return f"{self.name}: {self.form.format(value)}{interval}"


@dataclass(frozen=True)
class Verdict:
    """One point: what was to be, what was found. passed: None where runs are missing and none speaks against it."""

    point: int
    name: str
    statement: str
    tau: str
    parts: Sequence[Part]
    runs: int

    @property
    def passed(self) -> bool | None:
        found = [part.passed for part in self.parts]
        if False in found:
            return False
        return None if None in found or not found else True

    @property
    def bases(self) -> int:
        return len({base for part in self.parts for base in part.per_base})

    @property
    def answer(self) -> str:
        return {True: "yes", False: "no", None: "open"}[self.passed]

    def as_json(self) -> dict[str, Any]:
        found = {"point": self.point, "name": self.name, "statement": self.statement, "tau": self.tau}
        found |= {"passed": self.passed, "bases": self.bases, "runs": self.runs}
        parts = [{**asdict(part), "estimate": part.estimate._asdict()} for part in self.parts]
        return found | {"parts": [{k: v for k, v in part.items() if k != "form"} for part in parts]}


Points = Mapping[Shape, Sequence[Verdict]]
"""What was found of each shape of model."""


def verdicts(study: Study) -> list[Verdict]:
    """The six points, 1 to 5 at the fewest tokens a step, of a study of one shape."""
    return [*at_tau(study, study.taus[0]), sign_turns(study)]


def at_tau(study: Study, tau: int) -> list[Verdict]:
    """Points 1 to 5 for answers of so many tokens a step."""
    return [point(study, tau) for point in (sound_base, exits_alone, deepest_token, padding, capped)]


def sound_base(study: Study, tau: int) -> Verdict:
    """Point 1. Per family one part for steps, and one for padding at the depth where it is furthest off."""
    parts = []
    runs = [r for r in study.records if r.tau == tau]
    for family in study.families(tau):
        k = counted(study.hops[family], "hop")
        gap = before_rl(study, tau, family, study.start, _skill_gap)
        parts.append(_within(study, tau, f"{k}, terse − steps under own exits", gap, SKILL_GAP))
        at = {
            depth: before_rl(study, tau, family, study.start_anywhere, partial(_padding_gap, depth=depth))
            for depth in range(1, runs[0].num_layers + 1)
        }
        worst = max((depth for depth in at if at[depth]), key=lambda d: abs(over_bases(at[d]).value), default=0)
        name = f"{k}, padded − terse, most at depth {worst}" if worst else f"{k}, padded − terse at every depth"
        parts.append(_within(study, tau, name, at.get(worst, {}), PADDING_GAP))
    statement = (
        f"Before RL a terse answer is as often right as steps are under the gates' exits (within {SKILL_GAP:.0%}), and "
        f"padding as often as a terse answer at every depth (within {PADDING_GAP:.0%})."
    )
    return Verdict(1, "a base that can do both", statement, f"{tau}", parts, sum(START in r.models for r in runs))


def exits_alone(study: Study, tau: int) -> Verdict:
    """Point 2."""
    pair = (WITHOUT, NONE)
    parts = [
        _within(study, tau, counted(study.hops[family], "hop"), effect(study, tau, family, pair, steps_share), DRIFT)
        for family in study.families(tau)
    ]
    statement = f"Exits without a price leave the share of steps within {DRIFT:g} of that without exits."
    return Verdict(2, "exits alone change nothing", statement, f"{tau}", parts, _count(study, [tau], pair))


def deepest_token(study: Study, tau: int) -> Verdict:
    """Point 3: of each base, not of their mean."""
    pair = (Condition("max", PRICE), WITHOUT)
    gain = mean_of([effect(study, tau, family, pair, steps_share) for family in _of_hops(study, 3)])
    passed = all(value > 0 for value in gain.values())
    # One base against it is enough, whatever others would say.
    part = _part(study, tau, "3 hops, gain in steps", gain, passed)
    parts = [part if passed or not gain else replace(part, passed=False)]
    statement = "A price on the deepest token (max) makes every base write more steps at 3 hops than no price."
    name = "pricing the deepest token externalises"
    return Verdict(3, name, statement, f"{tau}", parts, _count(study, [tau], pair))


def padding(study: Study, tau: int) -> Verdict:
    """Point 4: log odds of padded to terse answers, mean over the families."""
    parts, conditions = [], [WITHOUT]
    for cost in ("mean", "max"):
        pair = (Condition(cost, PRICE), WITHOUT)
        conditions.append(pair[0])
        families = compared(study, [tau], pair)
        change = mean_effect(study, tau, families, pair, padding_odds)
        estimate = over_bases(change)
        passed = estimate.low > 0 if cost == "mean" else estimate.low <= 0 <= estimate.high
        part = _part(study, tau, f"{cost}, change of log odds{_over(study, families)}", change, passed)
        parts.append(part if math.isfinite(estimate.low) else replace(part, passed=None))
    statement = (
        "The mean depth pays for padding, the largest doesn't: the log odds of padded to terse answers rise under "
        "mean (interval above 0) and not under max (interval includes 0)."
    )
    return Verdict(4, "only the mean pays for padding", statement, f"{tau}", parts, _count(study, [tau], conditions))


def capped(study: Study, tau: int) -> Verdict:
    """Point 5."""
    cap = Condition(CAP, CAPPED_DEPTH)
    shares = {k: mean_of([measured(study, tau, f, cap, steps_share) for f in _of_hops(study, k)]) for k in (1, 3)}
    base = mean_of(
        [before_rl(study, tau, f, study.teacher, lambda found: found.share[STEPS]) for f in _of_hops(study, 1)]
    )
    change = difference(shares[1], base)
    enough = over_bases(shares[3]).value >= CAPPED_SHARE
    parts = [
        _within(study, tau, "1 hop, share of steps − the base's", change, DRIFT),
        replace(_part(study, tau, "3 hops, share of steps", shares[3], enough), form="{:.2f}"),
    ]
    statement = (
        f"Held to {CAPPED_DEPTH} layers, a model writes steps where it must: its share stays within {DRIFT:g} of the "
        f"base's at 1 hop, which {CAPPED_DEPTH} layers can do, and is at least {CAPPED_SHARE:g} at 3, which they can't."
    )
    name = "a cap externalises what doesn't fit"
    return Verdict(5, name, statement, f"{tau}", parts, _count(study, [tau], [cap]))


def sign_turns(study: Study) -> Verdict:
    """Point 6: steps are cheaper than one deep token in total only while they are short."""
    pair, parts = (Condition("total", PRICE), WITHOUT), []
    for tau, sign in zip(TAUS, (1, -1), strict=True):
        families = compared(study, TAUS, pair) or compared(study, [tau], pair)
        gain = mean_effect(study, tau, families, pair, steps_share)
        estimate = over_bases(gain)
        doubt = " (interval includes 0)" if estimate.low <= 0 <= estimate.high else ""
        name = f"{counted(tau, 'token')} a step, gain in steps{_over(study, families)}{doubt}"
        parts.append(_part(study, tau, name, gain, sign * estimate.value > 0))
    statement = (
        f"A price on total depth makes a model write more steps where a step takes {TAUS[0]} token, and fewer where it "
        f"takes {TAUS[1]}."
    )
    return Verdict(
        6, "the total's sign turns", statement, " and ".join(map(str, TAUS)), parts, _count(study, TAUS, pair)
    )


def gains(study: Study, cost: str) -> dict[int, ByBase]:
    """Tokens a step -> what a cost at PRICE changes in the share of steps, mean over the families, by base."""
    pair = (Condition(cost, PRICE), WITHOUT)
    taus = [tau for tau in study.taus if compared(study, [tau], pair)]
    families = compared(study, taus, pair)
    found = {tau: mean_effect(study, tau, families or compared(study, [tau], pair), pair, steps_share) for tau in taus}
    return {tau: values for tau, values in found.items() if values}


def compared(study: Study, taus: Iterable[int], pair: tuple[Condition, Condition]) -> list[str]:
    """Families that both conditions have runs of, at each of the tokens a step."""
    return [f for f in study.hops if all(effect(study, tau, f, pair, steps_share) for tau in taus)]


def _over(study: Study, families: Sequence[str]) -> str:
    return f" (mean of {', '.join(str(study.hops[f]) for f in families)} hops)" if len(families) > 1 else ""


def _within(study: Study, tau: int, name: str, values: ByBase, limit: float) -> Part:
    # .90 - .88 is a rounding error more than .02.
    return _part(study, tau, name, values, abs(over_bases(values).value) <= limit + 1e-9)


def _part(study: Study, tau: int, name: str, values: ByBase, so: bool) -> Part:
    bases = len(study.bases(tau))
    missing = f" ({len(values)} of {bases} bases)" if values and len(values) < bases else ""
    return Part(name + missing, values, over_bases(values), so if values and not missing else None)


def _of_hops(study: Study, hops: int) -> list[str]:
    return [family for family, count in study.hops.items() if count == hops]


def _count(study: Study, taus: Iterable[int], conditions: Iterable[Condition]) -> int:
    chosen = set(conditions)
    return len({r.path for tau in taus for f in study.hops for r in study.runs(tau, f) if r.condition in chosen})


def _skill_gap(found: FamilyChoice) -> float | None:
    forced = found.forced
    return forced[TERSE].correct - forced[STEPS].correct if {TERSE, STEPS} <= set(forced) else None


def _padding_gap(found: FamilyChoice, depth: int) -> float | None:
    held = found.fixed.get(depth, {})
    return held[PADDED].correct - held[TERSE].correct if {PADDED, TERSE} <= set(held) else None
