"""The form that made the data wins, noise wins nothing, and what cannot be compared is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ee_megatron.scaling.compare import Comparison, coefficients, compare
from ee_megatron.scaling.table import ColumnNames, RunTable
from tests.covering import EXTENDED

SIZES = np.repeat(np.geomspace(1e7, 1e9, 6), 6)
PENALTY = np.tile([0.0, 0.1, 0.2, 0.4, 0.8, 1.2], 6)


def judged(metric, against=("params",), seed: int = 0, draws: int = 300, **columns) -> Comparison:
    cells = {"params": SIZES, "lambda": PENALTY, **columns, "metric": metric}
    table = RunTable("runs.csv", "", {name: list(values) for name, values in cells.items()})
    return compare(table, ColumnNames(), "metric", against, draws, seed)


def noise(seed: int, sd: float, count: int = 36) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, sd, count)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


X = np.log(SIZES / 1e8)
PLANTED = {
    "linear": 0.6 - 0.04 * X,
    "power": 0.3 * np.exp(-0.5 * X),
    "saturating": 0.3 + 0.1 * np.exp(-0.7 * X),
    "logistic": sigmoid(0.3 - 1.2 * X),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_the_form_that_made_the_data_is_among_the_best(name: str) -> None:
    found = judged(PLANTED[name] + noise(1, 0.004))
    assert found.winners and found.winners[0].error < 0.005
    tied = {r.form.name for r in found.winners if r.ties}
    assert name in tied, found.verdict()


@pytest.mark.parametrize(
    ("name", "rivals"),
    [("power", {"linear", "logistic"}), ("saturating", {"linear", "power"}), ("logistic", {"linear", "power"})],
)
def test_a_form_that_is_wrong_is_told_apart_from_the_right_one(name: str, rivals: set[str]) -> None:
    found = judged(PLANTED[name] + noise(2, 0.003))
    tied = {r.form.name for r in found.results if r.ties}
    assert not rivals & tied, found.verdict()


@pytest.mark.parametrize(
    ("name", "slope"), [("linear", -0.04), ("power", -0.5), ("saturating", -0.7), ("logistic", -1.2)]
)
def test_slopes_are_those_of_the_data_with_their_sign(name: str, slope: float) -> None:
    found = judged(PLANTED[name] + noise(3, 0.002))
    result = next(r for r in found.results if r.form.name == name)
    value = coefficients(found, result)["params"]
    assert value["low"] < value["value"] < value["high"]
    assert value["value"] == pytest.approx(slope, rel=0.06)


def test_an_interaction_with_lambda_is_found_where_there_is_one_and_only_there() -> None:
    crossed = 0.6 - 0.02 * X - 0.1 * PENALTY - 0.05 * X * PENALTY
    against = ("params", "lambda")
    found = judged(crossed + noise(4, 0.01), against)
    result = next(r for r in found.results if r.form.name == "linear × lambda")
    assert result.ties and result.beats, found.verdict()
    assert not any(r.ties for r in found.results if not r.form.name.endswith("× lambda")), found.verdict()
    value = coefficients(found, result)["params × lambda"]
    assert value["value"] == pytest.approx(-0.05, abs=0.01) and value["high"] < 0
    plain = judged(0.6 - 0.02 * X - 0.1 * PENALTY + noise(4, 0.01), against)
    result = next(r for r in plain.results if r.form.name == "linear × lambda")
    value = coefficients(plain, result)["params × lambda"]
    assert value["low"] < 0 < value["high"]


@EXTENDED
def test_noise_alone_beats_the_constant_in_at_most_a_few_per_cent() -> None:
    wins = [bool(judged(0.6 + noise(seed, 0.05), ("params", "lambda"), seed, 200).winners) for seed in range(30)]
    assert sum(wins) <= 4
    found = judged(0.6 + noise(0, 0.05))
    assert not found.winners


@EXTENDED
def test_a_faint_trend_is_not_lost() -> None:
    wins = [bool(judged(0.6 - 0.03 * X + noise(seed, 0.03)).winners) for seed in range(10)]
    assert sum(wins) >= 9


def test_rows_of_a_left_out_run_do_not_help_to_predict_it() -> None:
    # Every run has a level of its own, its rows are copies: seen rows would make the constant's rivals look right.
    runs = np.repeat(np.arange(12), 3)
    sizes, level = np.repeat(np.geomspace(1e7, 1e9, 12), 3), np.repeat(noise(5, 0.05, 12), 3)
    found = judged(0.6 + level, params=sizes, run=runs)
    assert "12 runs" in found.how and not found.winners
    assert found.constant.error == pytest.approx(np.std(level[::3]) * 12 / 11, rel=1e-6)


def test_a_form_that_does_not_fit_the_metric_is_refused_with_its_reason() -> None:
    found = judged(-0.5 + 0.1 * X)
    assert {"power", "logistic"} <= set(found.refused)
    assert "lambda" in found.refused["linear × lambda"]
    assert {r.form.name for r in found.results} == {"constant", "linear", "saturating"}


def test_two_values_do_not_make_a_curve() -> None:
    found = judged(PLANTED["linear"] + noise(0, 0.01), params=np.where(SIZES > 1e8, 1e9, 1e7))
    assert "2" in found.refused["saturating"]


@pytest.mark.parametrize(
    ("columns", "against", "message"),
    [
        ({"params": np.full(36, 1e8)}, ("params",), "column params"),
        ({"tokens": 20 * SIZES}, ("params", "tokens"), "params.*tokens.*collinear"),
        ({"run": np.repeat(np.arange(6), 6)}, ("params",), r"\b6 runs.*\b8\b"),
        ({}, ("parms",), "'parms'.*'params'"),
    ],
)
def test_what_cannot_be_compared_is_refused(columns, against, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judged(PLANTED["linear"], against, **columns)


def test_lambda_may_be_zero_and_other_columns_may_not() -> None:
    assert judged(0.6 - 0.2 * PENALTY + noise(0, 0.01), ("lambda",)).winners
    with pytest.raises(ValueError, match="row 1, column dose"):
        judged(PLANTED["linear"], ("dose",), dose=PENALTY)


def test_a_slope_that_the_data_do_not_hold_is_refused_and_not_a_number() -> None:
    # A step between the smallest size and the rest is the same under every exponent that is steep enough.
    found = judged(np.where(SIZES < 2e7, 0.8, 0.5) + noise(6, 0.01))
    result = next(r for r in found.results if r.form.name == "saturating")
    assert "not identified" in coefficients(found, result)["params"]["refused"]
