"""Every statistic against values that are known in closed form or by construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ee_megatron.evaluation.results import compared
from ee_megatron.statistics import (
    bootstrap_interval,
    clustered_difference,
    least_squares_line,
    sign_flip_test,
    spearman_interval,
    wilson_interval,
)


def test_wilson_against_a_published_table() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_sign_flips_of_single_items_are_mcnemars_exact_test() -> None:
    first = [True] * 6 + [False] * 1 + [True] * 50 + [False] * 20
    second = [False] * 6 + [True] * 1 + [True] * 50 + [False] * 20
    alone = [str(i) for i in range(77)]
    # b = 6, c = 1: 2 (C(7,0) + C(7,1)) / 2^7.
    assert sign_flip_test(first, second, alone) == (6, 1, 2 * 8 / 128)
    assert sign_flip_test(second, first, alone) == (1, 6, 2 * 8 / 128)
    assert sign_flip_test([True] * 5, [True] * 5, alone[:5]).p_value == 1.0
    # The six that were lost go or come together, against one: ±6 ±1 is as far from 0 half of the time.
    assert sign_flip_test(first, second, ["a"] * 6 + alone[6:]) == (6, 1, 1.0)


def test_sign_flips_of_clusters_hold_their_level_where_single_items_do_not() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 7).astype(str)
    below = {"clusters": 0, "items": 0}
    for _ in range(200):
        # A cluster's seven items are all lost, all won or all level: no difference on average.
        sign = np.repeat(rng.choice([-1, 0, 1], size=60, p=[0.3, 0.4, 0.3]), 7)
        sides = (sign < 0).tolist(), (sign > 0).tolist()
        below["clusters"] += sign_flip_test(*sides, clusters).p_value < 0.05
        below["items"] += sign_flip_test(*sides, [str(i) for i in range(420)]).p_value < 0.05
    assert below["clusters"] <= 20 and below["items"] > 80, below


def test_what_does_not_fit_together_is_refused() -> None:
    calls = (
        lambda: wilson_interval(11, 10), lambda: sign_flip_test([True] * 5, [True] * 4, ["a"] * 5),
        lambda: clustered_difference([True], [True, False], ["a", "b"]), lambda: least_squares_line([1], [1, 2]),
        lambda: spearman_interval([np.ones(2)], []),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError):
            call()
    assert np.isnan(clustered_difference([], [], []).value)


def test_bootstrap_of_a_mean_agrees_with_the_normal_theory() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    found = bootstrap_interval(values, resamples=2000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    # 400 clusters of five equal values are 400 values.
    few = values[:400]
    together = bootstrap_interval(np.repeat(few, 5), clusters=np.repeat(np.arange(400), 5).tolist())
    alone = bootstrap_interval(few)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert bootstrap_interval([4.0] * 9) == (4.0, 4.0, 4.0)
    assert math.isnan(bootstrap_interval([]).value)


def test_intervals_of_differences_cover_the_truth_where_items_of_a_cluster_go_together() -> None:
    rng = np.random.default_rng(3)
    inside, naive = 0, 0
    for _ in range(40):
        # 30 clusters of 20 items; the second model is right in a cluster or wrong in all of it.
        clusters = [str(c) for c in np.repeat(np.arange(30), 20)]
        first, second = [True] * 600, np.repeat(rng.random(30) < 0.8, 20).tolist()
        found = clustered_difference(first, second, clusters)
        assert found.value == pytest.approx(np.mean(second) - 1)
        inside += found.low <= -0.2 <= found.high
        each = clustered_difference(first, second, [str(i) for i in range(600)])
        naive += each.low <= -0.2 <= each.high
    assert inside >= 33 and naive <= 26, (inside, naive)


def test_changes_of_depth_and_length_resample_groups_as_that_of_accuracy_does() -> None:
    """A right answer is one token longer than a wrong one, so that the change of length is that of accuracy, and the 20
    problems of a group are right or wrong together."""

    def answers(right: list[bool], group: bool) -> list[dict[str, Any]]:
        return [
            {
                "id": f"p{i}", "group": str(i // 20) if group else "", "correct": r, "model": "m", "exits": "e",
                "tokens": [{"depth": 5}, *[{"depth": 0}] * r],
            }
            for i, r in enumerate(right)
        ]  # fmt: skip

    right = np.repeat(np.random.default_rng(3).random(30) < 0.8, 20).tolist()
    grouped, alone = (compared(answers([True] * 600, g), answers(right, g), 10) for g in (True, False))
    assert grouped is not None and alone is not None and (grouped["groups"], alone["groups"]) == (30, 600)
    assert grouped["accuracy"]["high"] - grouped["accuracy"]["low"] > 0.15
    for found in (grouped, alone):
        assert found["length"] == pytest.approx(found["accuracy"])
    for kind in ("depth", "length"):
        wide, narrow = (found[kind]["high"] - found[kind]["low"] for found in (grouped, alone))
        assert wide > 3 * narrow


def test_a_line_by_hand() -> None:
    """Through (1, 1), (2, 3), (3, 4): slope (1 · 1.667 + 1 · 1.333) / 2; a point that isn't known is none."""
    assert least_squares_line([1, 2, 3], [1, 3, 4]) == pytest.approx((1.5, -1 / 3))
    assert least_squares_line([1, 9, 3, 2], [1, math.nan, 4, 3]) == pytest.approx((1.5, -1 / 3))
    for nothing in (([], []), ([1], [2]), ([1, 1], [2, 3]), ([1, math.nan], [2, 3])):
        assert all(map(math.isnan, least_squares_line(*nothing)))


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    return spearman_interval([np.asarray(x)], [np.asarray(y)], resamples=1).value


def test_spearman_of_planted_orders() -> None:
    x = np.arange(50.0)
    assert spearman(x, -(x**3)) == pytest.approx(-1.0)
    # No ties: 1 - 6 Σ d² / n(n² - 1), with d = (1, -1, 0, 0, 0).
    assert spearman([1, 2, 3, 4, 5], [2, 1, 3, 4, 5]) == pytest.approx(1 - 6 * 2 / 120)
    # Ties: ranks (1.5, 1.5, 3) and (1, 2, 3) have r = 1.5 / sqrt(1.5 · 2).
    assert spearman([7, 7, 9], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3.0))
    assert math.isnan(spearman(np.ones(5), x[:5])) and math.isnan(spearman(x[:1], x[:1]))


def test_the_interval_is_that_of_resampled_answers_put_together() -> None:
    rng = np.random.default_rng(3)
    xs = [rng.integers(0, 4, size=n).astype(float) for n in rng.integers(1, 12, size=40)]
    ys = [x + rng.integers(0, 3, size=len(x)) for x in xs]
    draws, generator = [], np.random.default_rng(7)
    for _ in range(50):
        chosen = generator.integers(40, size=40)
        draws.append(spearman(np.concatenate([xs[i] for i in chosen]), np.concatenate([ys[i] for i in chosen])))
    found = spearman_interval(xs, ys, resamples=50, seed=7)
    assert found[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-12)
