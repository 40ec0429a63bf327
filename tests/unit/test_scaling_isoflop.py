"""isoFLOP minima and their power law, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from ee_megatron.scaling.isoflop_law import _drawn_residuals, fit_isoflop, group_budgets
from ee_megatron.scaling.refusal import Refused
from ee_megatron.scaling.table import Observations
from tests.scaling_samples import EXPONENT_A, isoflop_runs


def parabolas(exponent: float, budgets: int = 4, curvature: float = 0.05, at: float = 0.0) -> Observations:
    """Exact parabolas with minima at 2 C^exponent, seven sizes each, their centre moved by `at`."""
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), 7)
    offset = np.tile(np.linspace(-1.5, 1.5, 7), budgets)
    n = 2 * flops**exponent * np.exp(offset + at)
    loss = 3 - 0.05 * np.log(flops / 1e18) + curvature * (offset + at) ** 2
    return Observations(n, flops / (6 * n), flops, loss, np.arange(len(n)))


@pytest.mark.parametrize("exponent", [0.46, 0.5, 0.73])
def test_minima_of_exact_parabolas_give_their_power_law(exponent: float) -> None:
    found = fit_isoflop(parabolas(exponent), 200, 0)
    assert found.exponent == pytest.approx(exponent, abs=1e-9) and found.coefficient == pytest.approx(2, rel=1e-6)
    assert found.interval.low == pytest.approx(exponent, abs=1e-6) == found.interval.high
    assert [b.loss for b in found.budgets] == pytest.approx([3 - 0.05 * np.log(10) * k for k in range(4)])


def test_the_exponent_agrees_with_the_law_behind_the_runs() -> None:
    found = fit_isoflop(isoflop_runs(0), 500, 0)
    assert (
        found.interval.low < EXPONENT_A < found.interval.high and 0.01 < found.interval.high - found.interval.low < 0.06
    )


def test_budgets_a_few_per_cent_apart_are_one() -> None:
    flops = np.array([1e20, 1.03e19, 1e19, 0.98e19, 1.02e20])
    assert group_budgets(flops).tolist() == [1, 0, 0, 0, 1]


def test_a_parabola_upside_down_is_no_minimum() -> None:
    with pytest.raises(Refused, match=r"0 compute budgets with a minimum; expected at least 3.*opens downwards"):
        fit_isoflop(parabolas(0.5, curvature=-0.05), 200, 0)


def test_a_minimum_outside_the_sizes_is_not_extrapolated_to() -> None:
    with pytest.raises(Refused, match="the minimum lies below the sizes"):
        fit_isoflop(parabolas(0.5, at=2.0), 200, 0)


def test_two_budgets_are_no_law() -> None:
    with pytest.raises(Refused, match=r"2 compute budgets .* two always lie on"):
        fit_isoflop(parabolas(0.5, budgets=2), 200, 0)


def test_a_budget_without_a_minimum_is_left_out_by_name() -> None:
    obs = parabolas(0.5, budgets=5)
    loss = obs.loss.copy()
    loss[:7] = 3 - 0.01 * np.arange(7.0)
    found = fit_isoflop(Observations(obs.params, obs.tokens, obs.flops, loss, obs.runs), 200, 0)
    assert len(found.budgets) == 4 and len(found.left_out) == 1 and found.left_out[0].startswith("1e+18 FLOPs")
    assert found.exponent == pytest.approx(0.5)


def test_noise_that_moves_minima_out_of_their_sizes_is_refused() -> None:
    obs = isoflop_runs(2, budgets=3, sizes=6, sd=0.04)
    with pytest.raises(Refused, match=r"of the resamples have fewer|compute budgets with a minimum"):
        fit_isoflop(obs, 300, 0)


def test_rows_of_a_run_take_the_residuals_of_one_other_run_in_their_order() -> None:
    runs = np.array([4, 7, 4, 7, 9])
    residual = np.array([1.0, 10.0, 2.0, 20.0, 300.0])
    drawn = _drawn_residuals(runs, residual, 400, 0)
    pairs = {(float(a), float(b)) for a, b in drawn[:, [0, 2]]} | {(float(a), float(b)) for a, b in drawn[:, [1, 3]]}
    assert pairs == {(1.0, 2.0), (10.0, 20.0), (300.0, 300.0)}
    assert set(drawn[:, 4].tolist()) == {1.0, 10.0, 300.0}


def test_budgets_that_share_their_runs_have_a_wider_interval_than_independent_ones() -> None:
    obs = isoflop_runs(3, budgets=5, sizes=9, sd=0.0)
    # Noise that tilts all parabolas alike moves all minima alike: a run per size carries it through every budget.
    noise = np.tile(np.random.default_rng(3).normal(0, 0.004, 9), 5) * np.repeat(np.linspace(-1, 1, 5), 9)
    loss = obs.loss * (1 + noise)
    shared = Observations(obs.params, obs.tokens, obs.flops, loss, np.tile(np.arange(9), 5))
    alone = Observations(obs.params, obs.tokens, obs.flops, loss, np.arange(45))
    widths = [f.interval.high - f.interval.low for f in (fit_isoflop(o, 400, 0) for o in (shared, alone))]
    assert widths[0] > 1.2 * widths[1]
