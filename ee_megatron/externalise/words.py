"""The study in words: the question, the answer that the numbers give, and how it was asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .compare import effect, measured, over_bases, steps_share
from .study import FREE, Condition, Study, counted
from .verdicts import PRICE, Verdict

QUESTION = "Does a price on depth make a model write its steps down?"
COSTS = {
    "max": "the depth of its deepest token",
    "mean": "its mean depth",
    "total": "its total depth",
    "square": "the mean square of its depth",
}
"""What of an answer is priced, the cleanest first (design: max has no way out through filler)."""
ASKED = (
    "A model was taught to follow chains of operations in three styles alike: terse (the answer at once, all hops "
    "inside one pass through its layers), in steps (a state written for every hop) and padded (as long as the steps, "
    "but without content). It may leave its layers early, token by token. Reinforcement learning then rewards right "
    "answers, and charges λ times what their depth costs: the mean over the answer's tokens, their total, or the "
    "largest (max). Nothing in the reward speaks of styles. A base is one pretrained model; intervals are over bases."
)
CLAIM = (
    "What this can show: in a model that can do both, the price moves the choice. Not shown: new reasoning, or that "
    "models do the same whose styles nobody taught them."
)

ACCEPTED = (
    "Points set before the study ran. If they hold, the theory is right in this model; if not, it is wrong, and that "
    "is the result. Differences are given with their 95 % interval over bases."
)
SHARES = (
    "How often a model writes its steps, against the price of depth; beside it what was trained without exits, under a "
    "cap (every token leaves at that depth) and under a price on length alone."
)
ODDS = (
    "Padding is as long as steps and says nothing. Where its odds against terse answers rise with the price, the price "
    "can be met by filler. One answer more is counted, shared as in the corpus, so that no odds are infinite."
)
TOKENS = (
    "What a price on total depth changes in the share of steps. A step of more tokens costs more in total than the "
    "deep token that it saves. Marks: mean over bases with its 95 % interval; faint: each base; dashed: closed form."
)


def answer(study: Study, points: Sequence[Verdict]) -> str:
    """Two sentences: what the strongest comparison that there is found, and how many of the points are met."""
    return f"{_found(study)} {_met(points)}"


def _found(study: Study) -> str:
    tau = study.taus[0]
    for cost, words in COSTS.items():
        for family in reversed(study.families(tau)):
            for number in sorted(_numbers(study, tau, family, cost), key=lambda n: (n != PRICE, -n)):
                gain = effect(study, tau, family, (Condition(cost, number), Condition(FREE)), steps_share)
                if gain:
                    return _sentence(study, tau, family, Condition(cost, number), words, gain)
    return (
        "Nothing can be said yet: there is no run with a price of depth beside one without (lambda 0) on the same base."
    )


def _numbers(study: Study, tau: int, family: str, cost: str) -> set[float]:
    return {
        run.condition.number for run in study.runs(tau, family) if run.condition.priced and run.condition.kind == cost
    }


def _sentence(study: Study, tau: int, family: str, priced: Condition, words: str, gain: dict[int, float]) -> str:
    value, low, high = over_bases(gain)
    with_price, without = (
        over_bases({b: v for b, v in measured(study, tau, family, c, steps_share).items() if b in gain}).value
        for c in (priced, Condition(FREE))
    )
    hops, bases = study.hops[family], len(gain)
    interval = f" [{100 * low:+.0f}, {100 * high:+.0f}]" if math.isfinite(low) else ""
    over = counted(bases, "base") + (", so without an interval" if bases == 1 else "")
    return (
        f"{_verdict(value, low, high)}: charged {priced.number:g} for {words}, a model wrote its steps in "
        f"{with_price:.0%} of its answers to problems of {counted(hops, 'hop')}, against {without:.0%} at "
        f"no charge ({100 * value:+.0f} points{interval}, {over})."
    )


def _verdict(value: float, low: float, high: float) -> str:
    if not math.isfinite(low):
        return "It looks so" if value > 0 else "It doesn't look so"
    if low > 0:
        return "Yes"
    return "No, it writes fewer" if high < 0 else "Not shown"


def _met(points: Sequence[Verdict]) -> str:
    groups = {
        "met": [p for p in points if p.passed],
        "missed": [p for p in points if p.passed is False],
        "open for want of runs": [p for p in points if p.passed is None],
    }
    parts = [
        f"{len(found)} {'is' if len(found) == 1 else 'are'} {word} ({', '.join(str(p.point) for p in found)})"
        for word, found in groups.items()
        if found
    ]
    if len(groups["met"]) == len(points):
        return f"All {len(points)} points that were set before the runs are met."
    said = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"Of the {len(points)} points that were set before the runs, {said}."
