"""Controls: exit rules that know less than the policy under test, brought to its mean depth or to its accuracy.

A gain of learnt exits over full depth says little: any rule that exits early saves depth. What has to be shown is that
at the same depth the policy is more accurate than rules that know less, or as accurate with less depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..exit_rules import Dial, ExitRule
from ..statistics import clustered_difference, mcnemar_exact
from .evaluate import Answer
from .summary import EvaluationRow

TOLERANCE = 0.01
"""Mean depths count as the same within this, relative."""
TRIALS = 20
ACCURACY_TRIALS = 8


def marginal_exits(answers: Sequence[Answer], outcomes: Sequence[int], first_token: bool = False) -> list[float]:
    """Shares of the outcomes over all tokens whose depth is a choice: the answers' first where `first_token`, and the
    others. Raises ValueError if there are none."""
    depths = [t["depth"] for a in answers for t in a["tokens"][not first_token :]]
    if not depths:
        raise ValueError("answers of one token each have no exits; raise rollout.max_new_tokens")
    return [depths.count(outcome) / len(depths) for outcome in outcomes]


@dataclass
class Matched:
    """A control at a place on its dial. target: what was to be matched; row: what was measured there, on validation.

    `within`: the mean depth is the target's up to `TOLERANCE` (of accuracy: it reaches the target). `tried`: places on
    the dial and what was measured there.
    """

    policy: ExitRule
    row: EvaluationRow
    target: float
    within: bool
    trials: int = 0
    tried: list[tuple[float, EvaluationRow]] = field(default_factory=list)


Measure = Callable[[ExitRule], EvaluationRow]


def match_depth(measure: Measure, dial: Dial, target: float, trials: int = TRIALS) -> Matched:
    """The exit policy on a dial whose measured mean depth is the target's: the nearest of those that were tried.

    By bisection. The depth is only nearly monotone, as other exits make other answers, and it may jump over the target
    where many tokens share a value. Then two places on either side are mixed token by token, and the share is
    bisected. What counts is what was measured. Raises ValueError for a target outside 0..1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"mean depth {target} to match: expected a share of the layers, above 0 and at most 1")
    tried: list[tuple[float, EvaluationRow]] = []
    policies: list[ExitRule] = []

    def off(row: EvaluationRow) -> float:
        return row.mean_depth / target - 1

    def search(policy: Dial, place: Callable[[float], float], count: int) -> None:
        low, high = 0.0, 1.0
        for _ in range(count):
            middle = (low + high) / 2
            policies.append(policy(middle))
            tried.append((place(middle), measure(policies[-1])))
            if abs(off(tried[-1][1])) <= TOLERANCE / 5:
                return
            low, high = (middle, high) if off(tried[-1][1]) < 0 else (low, middle)

    search(dial, lambda position: position, trials // 2)
    on_dial = list(tried)
    below = [pair for pair in on_dial if off(pair[1]) < -TOLERANCE]
    above = [pair for pair in on_dial if off(pair[1]) > TOLERANCE]
    if len(below) + len(above) == len(on_dial) and below and above:
        shallow, deep = max(below, key=lambda p: p[1].mean_depth)[0], min(above, key=lambda p: p[1].mean_depth)[0]
        search(lambda share: dial(shallow).mixed(dial(deep), share), lambda _: math.nan, trials - len(tried))
    policy, (_, row) = min(zip(policies, tried, strict=True), key=lambda pair: abs(pair[1][1].mean_depth - target))
    return Matched(policy, row, target, abs(off(row)) <= TOLERANCE, len(tried), on_dial)


def match_accuracy(
    measure: Measure,
    dial: Dial,
    target: float,
    tried: Sequence[tuple[float, EvaluationRow]] = (),
    trials: int = ACCURACY_TRIALS,
) -> Matched:
    """The least depth at which a control is as accurate as the target, by bisection; `tried` places are used again.

    If nothing that was tried is, the most accurate place with `within` False. Accuracy need not be monotone in depth:
    the result is the least depth among those tried.
    """

    def reaches(row: EvaluationRow) -> bool:
        return row.accuracy >= target - 1e-9

    seen = list(tried)
    if not any(reaches(row) for _, row in seen):
        seen.append((1.0, measure(dial(1.0))))
    low = max((place for place, row in seen if not reaches(row)), default=0.0)
    high = min((place for place, row in seen if reaches(row)), default=0.0)
    while high > low and len(seen) - len(tried) < trials:
        place = (low + high) / 2
        seen.append((place, measure(dial(place))))
        low, high = (low, place) if reaches(seen[-1][1]) else (place, high)
    enough = [pair for pair in seen if reaches(pair[1])]
    place, row = min(enough, key=lambda p: p[1].mean_depth) if enough else max(seen, key=lambda p: p[1].accuracy)
    return Matched(dial(place), row, target, bool(enough), len(seen) - len(tried), seen)


def compare(reference: Sequence[Answer], control: Sequence[Answer]) -> dict[str, float | int | dict[str, float]]:
    """Reference minus control in accuracy on the prompts that both answered, its interval over groups of them that are
    right or wrong together, with McNemar's exact test.

    {"difference": {"value", "low", "high"}, "only_reference", "only_control", "p_value", "n"}.
    """
    right = {answer["id"]: answer["correct"] for answer in control}
    shared = [answer for answer in reference if answer["id"] in right]
    ours, theirs = [a["correct"] for a in shared], [right[a["id"]] for a in shared]
    test = mcnemar_exact(ours, theirs)
    return {
        "difference": clustered_difference(theirs, ours, [a.get("group") or a["id"] for a in shared])._asdict(),
        "only_reference": test.only_first,
        "only_control": test.only_second,
        "p_value": test.p_value,
        "n": len(shared),
    }
