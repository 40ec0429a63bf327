"""The form that made the data wins, noise wins nothing, and what cannot be compared is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ee_megatron.scaling.bootstrap import Refused
from ee_megatron.scaling.compare import FormComparison, compare
from tests.covering import EXTENDED
from tests.scaling_samples import table

SIZES = np.repeat(np.geomspace(1e7, 1e9, 6), 6)
PENALTY = np.tile([0.0, 0.1, 0.2, 0.4, 0.8, 1.2], 6)
X = np.log(SIZES / 1e8)
PLANTED = {
    "linear": (0.6 - 0.04 * X, -0.04),
    "power": (0.3 * np.exp(-0.5 * X), -0.5),
    "logistic": (1 / (1 + np.exp(1.2 * X - 0.3)), -1.2),
}


def judged(metric, against=("params",), seed: int = 0, draws: int = 200, **columns) -> FormComparison:
    cells = {"params": SIZES, "lambda": PENALTY, **columns, "metric": metric}
    return compare(table(cells), {}, "metric", against, draws, seed)


def noise(seed: int, sd: float, count: int = 36) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, sd, count)


@pytest.mark.parametrize("name", list(PLANTED))
def test_the_form_that_made_the_data_wins_with_its_slope(name: str) -> None:
    values, slope = PLANTED[name]
    found = judged(values + noise(3, 0.002))
    rivals = {"linear", "power", "logistic"} - ({name, "logistic"} if name == "linear" else {name})
    assert found.best == name and not rivals & set(found.near), found.verdict()
    value, low, high = found.slopes(name).loc["params"]
    assert low < value < high and value == pytest.approx(slope, rel=0.06)


@EXTENDED
def test_noise_alone_beats_the_constant_in_at_most_a_few_per_cent() -> None:
    found = [judged(0.6 + noise(seed, 0.05), ("params", "lambda"), seed) for seed in range(30)]
    assert sum(one.best != "constant" for one in found) <= 4


@EXTENDED
def test_a_faint_trend_is_not_lost() -> None:
    assert sum(judged(0.6 - 0.03 * X + noise(seed, 0.03)).best != "constant" for seed in range(10)) >= 9


def test_rows_of_a_left_out_run_do_not_help_to_predict_it() -> None:
    # Every run has a level of its own, its rows are copies: seen rows would make the constant's rivals look right.
    runs = np.repeat(np.arange(12), 3)
    sizes, level = np.repeat(np.geomspace(1e7, 1e9, 12), 3), np.repeat(noise(5, 0.05, 12), 3)
    found = judged(0.6 + level, params=sizes, run=runs)
    assert found.run_count == 12 and found.best == "constant"
    assert found.forms["held_out_rms"]["constant"] == pytest.approx(np.std(level[::3]) * 12 / 11, rel=1e-6)


def test_a_form_that_does_not_fit_the_metric_is_refused_with_its_reason() -> None:
    found = judged(-0.5 + 0.1 * X)
    assert {"power", "logistic"} == set(found.refused) and list(found.fits) == ["constant", "linear"]


@pytest.mark.parametrize(
    ("columns", "against", "error", "names"),
    [
        ({"params": np.full(36, 1e8)}, ("params",), Refused, "params"),
        ({"tokens": 20 * SIZES}, ("params", "tokens"), Refused, "tokens"),
        ({"run": np.repeat(np.arange(6), 6)}, ("params",), Refused, "6 runs"),
        ({}, ("parms",), ValueError, "'params'"),
        ({"dose": PENALTY}, ("dose",), ValueError, "dose"),
    ],
)
def test_what_cannot_be_compared_is_refused(columns, against, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        judged(PLANTED["linear"][0], against, **columns)


def test_lambda_may_be_zero() -> None:
    assert judged(0.6 - 0.2 * PENALTY + noise(0, 0.01), ("lambda",)).best != "constant"
