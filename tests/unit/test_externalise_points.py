"""The acceptance points: met by runs that follow the theory; each one fails, and is open, on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from ee_megatron.externalise.choice import Model
from ee_megatron.externalise.compare import by_base, effect, measured, padding_odds, steps_share
from ee_megatron.externalise.study import Condition, Record, Study
from ee_megatron.externalise.verdicts import gains, verdicts
from ee_megatron.statistics import t_interval
from tests.externalise_samples import record, records, study, with_share

Change = Callable[[Record], Record]


def doctored(change: Change, **chosen: tuple[int, ...]) -> list[bool | None]:
    return [point.passed for point in verdicts(Study([change(r) for r in records(**chosen)]))]


def test_runs_that_follow_the_theory_meet_every_point() -> None:
    found = verdicts(study())
    assert [(v.point, v.passed, v.bases) for v in found] == [(i, True, 3) for i in range(1, 7)]
    # Three bases, two seeds, two families: mean, max and lambda 0.
    assert found[3].runs == 36 and found[2].runs == 24


def of(label: str, change: Callable[[Record], Record], **only: int) -> Change:
    def apply(r: Record) -> Record:
        mine = all(getattr(r, name) == value for name, value in only.items() if name != "hops")
        mine &= r.condition.label == label and r.families == (f"hop{only.get('hops', 3)}",)
        return change(r) if mine else r

    return apply


def less_skilled(r: Record) -> Record:
    """Terse answers of the start are right 3 points less often than steps."""
    if "start" not in r.models:
        return r
    (name,) = r.families
    start = r.models["start"][name]
    terse = replace(start.forced["terse"], correct=start.forced["steps"].correct - 0.03)
    return with_model(r, "start", {name: replace(start, forced={**start.forced, "terse": terse})})


def padding_helps(r: Record) -> Record:
    if "start" not in r.models:
        return r
    (name,) = r.families
    start = r.models["start"][name]
    held = start.fixed[2]
    padded = replace(held["padded"], correct=held["terse"].correct + 0.08)
    return with_model(r, "start", {name: replace(start, fixed={**start.fixed, 2: {**held, "padded": padded}})})


def with_model(r: Record, name: str, model: Model) -> Record:
    return replace(r, models={**r.models, name: model})


FAILING: dict[str, tuple[int, Change]] = {
    "terse answers are worse before RL": (1, less_skilled),
    "padding helps at one depth": (1, padding_helps),
    "exits alone make steps": (2, of("lambda 0", lambda r: with_share(r, steps=0.7, padded=0.1), hops=1)),
    "one base of three writes fewer steps under max": (3, of("max 1", lambda r: with_share(r, steps=0.2), base=2)),
    "mean doesn't pay for padding": (4, of("mean 1", lambda r: with_share(r, steps=0.5, padded=0.1))),
    "max pays for padding": (4, of("max 1", lambda r: with_share(r, steps=0.5, padded=0.45 + r.base / 100))),
    "a cap changes what fits": (5, of("cap 2", lambda r: with_share(r, steps=0.6, padded=0.1), hops=1)),
    "a cap doesn't force steps": (5, of("cap 2", lambda r: with_share(r, steps=0.8))),
    "total makes long steps too": (6, of("total 1", lambda r: with_share(r, steps=0.95), tau=4)),
}


@pytest.mark.parametrize("name", FAILING)
def test_each_point_fails_where_runs_speak_against_it_and_the_others_stay(name: str) -> None:
    point, change = FAILING[name]
    found = doctored(change)
    assert found[point - 1] is False, name
    others = {i for i, passed in enumerate(found, start=1) if passed is not True} - {point}
    assert others <= ({3, 6} if point == 2 else set()), name


@pytest.mark.parametrize(
    ("missing", "open_points"),
    [
        ("no exits", {2}), ("lambda 0", {1, 2, 3, 4, 5, 6}), ("max 1", {3, 4}), ("mean 1", {4}), ("cap 2", {5}),
        ("total 1", {6}), ("length 0.5", set()),
    ],
)  # fmt: skip
def test_a_point_whose_runs_are_missing_is_open(missing: str, open_points: set[int]) -> None:
    found = verdicts(Study([r for r in records() if r.condition.label != missing]))
    assert {v.point for v in found if v.passed is None} == open_points
    assert all(v.passed for v in found if v.point not in open_points)
    assert all("not measured" in " ".join(p.words for p in v.parts) for v in found if v.point in open_points)


def test_a_base_that_lacks_runs_leaves_a_point_open_unless_another_fails_it() -> None:
    made = [r for r in records() if not (r.base == 3 and r.condition.label == "max 1")]
    point = verdicts(Study(made))[2]
    assert point.passed is None and "(2 of 3 bases)" in point.parts[0].words
    made = [with_share(r, steps=0.1) if r.base == 1 and r.condition.label == "max 1" else r for r in made]
    assert verdicts(Study(made))[2].passed is False


def test_one_base_has_no_intervals_so_what_asks_for_one_is_open() -> None:
    found = verdicts(study(bases=(1,)))
    assert [v.passed for v in found] == [True, True, True, None, True, True]
    assert all(math.isnan(p.estimate.low) for v in found for p in v.parts)


def test_a_study_of_two_conditions_is_judged_as_far_as_it_goes() -> None:
    found = verdicts(Study([record("lambda 0"), record("max 1")]))
    assert [v.passed for v in found] == [True, None, True, None, None, None]


def test_seeds_are_averaged_within_a_base_before_bases_are_compared() -> None:
    """Gains .1 and .3 of one base, .6 of another: (.2 + .6) / 2, not their mean .33; t(1) = 12.706."""
    shares = {(1, 1): 0.5, (1, 2): 0.7, (2, 1): 0.9}
    made = [with_share(record("max 1", base, seed), steps=share) for (base, seed), share in shares.items()]
    made += [with_share(record("lambda 0", base), steps=share) for base, share in ((1, 0.4), (2, 0.3))]
    part = verdicts(Study(made))[2].parts[0]
    assert part.per_base == pytest.approx({1: 0.2, 2: 0.6})
    half = 12.7062 * 0.2
    assert part.estimate == pytest.approx((0.4, 0.4 - half, 0.4 + half), abs=1e-4)
    assert part.words.startswith("3 hops") and part.words.endswith(": +0.40 [-2.14, +2.94]")


def test_students_interval_by_hand() -> None:
    """1, 2, 6: mean 3, s = sqrt(7), t(2) = 4.30265."""
    half = 4.30265 * math.sqrt(7 / 3)
    assert t_interval([1, 2, 6]) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)
    assert t_interval([2.0])[0] == 2 and math.isnan(t_interval([2.0])[1]) and math.isnan(t_interval([])[0])


def test_odds_of_padding_by_hand_also_where_nobody_pads() -> None:
    """150 steps, 30 padded, 120 terse; the answer that is added is padded by a third, as .2 of .2 + .4."""
    run = with_share(record("max 1"), steps=0.5, padded=0.1)
    assert padding_odds(run, "hop3") == pytest.approx(math.log((30 + 1 / 3) / (120 + 2 / 3)))
    assert padding_odds(with_share(run, steps=0.5), "hop3") == pytest.approx(math.log((1 / 3) / (150 + 2 / 3)))
    # With neither left nothing is known: the corpus' odds.
    assert padding_odds(with_share(run, steps=1.0), "hop3") == pytest.approx(math.log(0.5))


def test_runs_on_several_families_are_not_mixed_with_runs_on_one() -> None:
    alone = [with_share(record("max 1"), steps=0.8)]
    mixed = replace(with_share(record("max 1", seed=2), steps=0.2), families=("hop1", "hop3"))
    mixed = with_model(mixed, "reinforced", {"hop1": mixed.found("hop3"), "hop3": mixed.found("hop3")})
    deepest = Condition("max", 1.0)
    assert measured(Study([*alone, mixed]), 1, "hop3", deepest, steps_share) == pytest.approx({1: 0.8})
    assert measured(Study([mixed]), 1, "hop3", deepest, steps_share) == pytest.approx({1: 0.2})


def test_differences_are_of_bases_that_have_both() -> None:
    made = [with_share(record("max 1", base), steps=0.5) for base in (1, 2)]
    made.append(with_share(record("lambda 0", 2), steps=0.1))
    found = effect(Study(made), 1, "hop3", (Condition("max", 1.0), Condition("lambda 0")), steps_share)
    assert found == pytest.approx({2: 0.4})
    assert by_base(made, lambda r: math.nan if r.base == 1 else 1.0) == {2: 1.0}


def test_the_total_gains_by_tokens_a_step() -> None:
    found = gains(study(), "total")
    assert sorted(found) == [1, 4] and min(found[1].values()) > 0 > max(found[4].values())
    # Families are those that both have: their mean is over the same problems.
    fewer = Study([r for r in records() if not (r.tau == 4 and r.families == ("hop1",))])
    assert gains(fewer, "total")[1] == pytest.approx(effect(fewer, 1, "hop3", TOTAL, steps_share))


TOTAL = (Condition("total", 1.0), Condition("lambda 0"))
