"""The forecast: the closed form is the maximum of what RL maximises, of figures from before RL and of nothing else."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_megatron.externalise.choice import STYLES, Figures
from ee_megatron.externalise.forecast import forecast, price, reference_shares
from ee_megatron.externalise.study import Objective, Study
from ee_megatron.objectives.optimum import closed_form, takeover_price
from tests.externalise_samples import BETA, OBJECTIVES, WEIGHTS, record

Case = tuple[dict[str, float], dict[str, float], dict[str, float], float]
"""Shares of the reference, worth and cost of the styles, beta."""


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_shares_are_worth_as_much(beta: float, seed: int) -> None:
    """Against all shares on a grid, and against small moves away from the claimed maximum."""
    rng = np.random.default_rng(seed)
    reference = dict(zip(STYLES, rng.dirichlet([2, 2, 2]).tolist(), strict=True))
    value = dict(zip(STYLES, rng.uniform(0, 1, 3).tolist(), strict=True))

    def worth(shares: tuple[float, ...]) -> float:
        divergence = sum(p * math.log(p / reference[s]) for s, p in zip(STYLES, shares, strict=True) if p > 0)
        return sum(p * value[s] for s, p in zip(STYLES, shares, strict=True)) - beta * divergence

    found = closed_form(reference, value, beta)
    best = tuple(found[s] for s in STYLES)
    assert sum(best) == pytest.approx(1)
    grid = [(a / 100, b / 100, (100 - a - b) / 100) for a in range(101) for b in range(101 - a)]
    assert worth(best) >= max(map(worth, grid))
    nearest = max(grid, key=worth)
    assert max(abs(p - q) for p, q in zip(best, nearest, strict=True)) < 0.02
    for i, j in itertools.permutations(range(3), 2):
        moved = list(best)
        step = min(1e-3, moved[i] / 2)
        moved[i] -= step
        moved[j] += step
        assert worth(tuple(moved)) < worth(best)


def test_what_the_reference_never_writes_stays_unwritten_and_beta_zero_takes_the_best() -> None:
    value = {"terse": 0.5, "steps": 0.9, "padded": 0.9}
    assert closed_form({"terse": 0.5, "steps": 0.0, "padded": 0.5}, value, 0.1)["steps"] == 0
    assert closed_form(WEIGHTS, value, 0.0) == pytest.approx({"terse": 0, "steps": 2 / 3, "padded": 1 / 3})
    assert closed_form(WEIGHTS, {"terse": 900.0, "steps": 0.0, "padded": 0.0}, 0.01)["terse"] == 1


def share_of_steps(case: Case, price: float) -> float:
    reference, value, cost, beta = case
    return closed_form(reference, {s: value[s] - price * cost[s] for s in STYLES}, beta)["steps"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    weights = draw(st.lists(st.integers(1, 50), min_size=3, max_size=3))
    sixths = st.integers(0, 12).map(lambda n: n / 6)
    value = draw(st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=3, max_size=3))
    cost = draw(st.lists(sixths, min_size=3, max_size=3))
    reference = {style: weight / sum(weights) for style, weight in zip(STYLES, weights, strict=True)}
    beta = draw(st.sampled_from((0.0, 0.02, 0.1, 1.0)))
    return reference, dict(zip(STYLES, value, strict=True)), dict(zip(STYLES, cost, strict=True)), beta


@given(cases())
def test_the_price_of_half_is_the_first_on_a_dense_grid(case: Case) -> None:
    """Below it steps have less than half, at it half; where there is none, none of the grid has it."""
    found = takeover_price(*case, "steps")
    grid = [i / 40 for i in range(400)] + [10.0, 100.0, 1000.0]
    first = next((price for price in grid if share_of_steps(case, price) >= 0.5 + 1e-9), None)
    if found is None:
        assert first is None
        return
    # Where half is approached but never met, it counts as met at rounding.
    assert all(share_of_steps(case, price) < 0.5 + 1e-9 for price in grid if price < found - 1e-9)
    assert first is None or found <= first + 1e-9
    if case[3] and found:
        assert share_of_steps(case, found) == pytest.approx(0.5, abs=1e-9)
    elif case[3]:
        assert share_of_steps(case, 0.0) >= 0.5 - 1e-9


def test_the_price_of_half_by_hand() -> None:
    """terse .6 to steps .4 and nobody pads: ln 1.5 beta = lambda (c_terse - c_steps)."""
    reference, value = {"terse": 0.6, "steps": 0.4, "padded": 0.0}, dict.fromkeys(STYLES, 1.0)
    cost = {"terse": 0.8, "steps": 0.3, "padded": 9.0}
    assert takeover_price(reference, value, cost, 0.1, "steps") == pytest.approx(0.1 * math.log(1.5) / 0.5)
    # Three of four: odds of 3 instead of 2/3.
    assert takeover_price(reference, value, cost, 0.1, "steps", 0.75) == pytest.approx(0.1 * math.log(4.5) / 0.5)
    assert takeover_price(reference, {**value, "terse": 0.9}, cost, 0.1, "steps") == 0.0
    assert takeover_price(reference, value, {**cost, "steps": 0.8}, 0.1, "steps") is None
    assert takeover_price({**reference, "steps": 0.0}, value, cost, 0.1, "steps") is None
    assert takeover_price({**reference, "terse": 0.0}, value, cost, 0.1, "steps") == 0.0
    assert takeover_price(reference, {**value, "terse": math.nan}, cost, 0.1, "steps") is None


def test_a_share_that_rises_to_half_and_falls_again_has_its_first_price() -> None:
    """Padding is deep and much written, terse answers are shallow and rare: steps win for a while, between the two."""
    reference, value = {"terse": 0.05, "steps": 0.35, "padded": 0.6}, dict.fromkeys(STYLES, 1.0)
    case = (reference, value, {"terse": 0.0, "steps": 0.5, "padded": 1.0}, 0.1)
    found = takeover_price(*case, "steps")
    assert found is not None and share_of_steps(case, found) == pytest.approx(0.5)
    assert share_of_steps(case, found - 0.01) < 0.5 < share_of_steps(case, found + 0.01)
    assert share_of_steps(case, 5.0) < 0.01
    # With more terse answers the summit is too low.
    other = ({"terse": 0.35, "steps": 0.05, "padded": 0.6}, *case[1:])
    assert takeover_price(*other, "steps") is None and max(share_of_steps(other, i / 100) for i in range(300)) < 0.5


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (Objective(0.1, "mean", 2.0, 4), 0.5),
        (Objective(0.1, "total", 2.0, 4), 0.6),
        (Objective(0.1, "max", 2.0, 4), 1.4),
        (Objective(0.1, "square", 2.0, 4), 0.26),
        (Objective(0.1, "mean", 0.0, 4, lambda_length=0.5), 0.5),
        (Objective(0.1, "max", 1.0, 4, lambda_length=0.5), 1.2),
        (Objective(0.1), 0.0),
    ],
)
def test_prices_of_an_answer_by_hand(objective: Objective, expected: float) -> None:
    figures = Figures(1, 1.0, mean_depth=0.25, total_depth=1.2, max_depth=0.7, square=0.13, length=4.0)
    assert price(objective, figures) == pytest.approx(expected)


def test_each_condition_is_forecast_from_its_own_exits() -> None:
    """Held to 2 layers, 3 hops are right .24 of the time when terse and .98 in steps; without exits, both .98."""
    free = record("lambda 0")
    e = math.exp((0.24 - 0.98) / BETA)
    cap, full, deepest = (record(name) for name in ("cap 2", "no exits", "max 1"))
    study = Study([free, cap, full, deepest])
    assert forecast(study, cap, "hop3")["steps"] == pytest.approx(0.4 / (0.4 + 0.6 * e))
    assert forecast(study, full, "hop3") == pytest.approx(WEIGHTS)
    # Own gates: the deepest token takes 5.1 of 6 layers, a step's 1.
    e = math.exp(-(5.1 - 1) / 6 / BETA)
    assert forecast(study, deepest, "hop3")["steps"] == pytest.approx(0.4 / (0.4 + 0.6 * e))
    assert forecast(study, deepest, "hop3", 0.0) == pytest.approx(forecast(study, free, "hop3"))


def test_it_uses_nothing_that_rl_made() -> None:
    free, run = record("lambda 0"), record("mean 1")
    other = replace(run, models={"reinforced": record("max 1").models["reinforced"]})
    assert forecast(Study([free, run]), run, "hop3") == forecast(Study([free, other]), other, "hop3")


def test_without_the_start_there_is_none_and_another_starts_doesnt_count() -> None:
    run, stranger = record("max 1"), record("lambda 0", base=2)
    assert forecast(Study([run, stranger]), run, "hop3") is None
    # Measured under a cap, the start says nothing of its gates.
    start = record("lambda 0")
    capped = replace(start, objective=OBJECTIVES["cap 2"])
    assert forecast(Study([run, capped]), run, "hop3") is None
    assert forecast(Study([run, capped]), capped, "hop3") is not None


def test_the_reference_is_the_teacher_as_it_writes_without_answers_in_no_style() -> None:
    run = record("lambda 0")
    found = run.models["teacher"]["hop3"]
    written = replace(found, share={"terse": 0.3, "steps": 0.45, "padded": 0.15, "other": 0.1})
    run = replace(run, models={**run.models, "teacher": {"hop3": written}})
    expected = {"terse": 1 / 3, "steps": 0.5, "padded": 1 / 6}
    assert reference_shares(Study([run]), run, "hop3") == pytest.approx(expected)
    alone = replace(run, models={"reinforced": run.models["reinforced"]})
    assert reference_shares(Study([alone]), alone, "hop3") == pytest.approx(WEIGHTS)
