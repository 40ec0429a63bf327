"""isoFLOP minima and their power law, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from ee_megatron.scaling import isoflop_law
from ee_megatron.scaling.isoflop_curve import fit_curves
from ee_megatron.scaling.isoflop_law import _drawn_residuals, _ladder, _nearby, fit_isoflop, group_budgets
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


def test_a_ladder_over_three_decades_that_all_budgets_share_gives_the_exponent_exactly() -> None:
    found = fit_isoflop(isoflop_runs(0, budgets=6, sizes=16, sd=0.0, ladder="common"), 200, 0)
    assert found.exponent == pytest.approx(EXPONENT_A, abs=1e-9) and len(found.budgets) == 6
    assert found.steepness == pytest.approx((0.34, 0.28), abs=1e-6) and found.window == np.inf
    # Parabolas would give .436 on this table, without a word of warning.
    for budget in found.budgets:
        assert 4e7 < budget.params < 1.6e10


def test_the_curve_passes_through_its_minimum_and_its_rows() -> None:
    obs = isoflop_runs(0, budgets=4, sizes=8, sd=0.0, ladder="uneven")
    found = fit_isoflop(obs, 200, 0)
    for budget in found.budgets:
        assert budget.at(obs.params[budget.rows]) == pytest.approx(obs.loss[budget.rows], rel=1e-9)
        assert budget.at(np.array([budget.params]))[0] == pytest.approx(budget.loss)
        assert (budget.at(budget.params * np.array([0.99, 1.01])) > budget.loss).all()


def test_losses_of_another_form_are_fitted_near_their_minima_only_or_refused() -> None:
    obs = isoflop_runs(0, budgets=6, sizes=16, sd=0.0, ladder="common")
    # Sizes beyond 3e9 parameters were trained badly: a kink that no smooth curve follows.
    kink = obs.loss * np.where(obs.params > 3e9, 1 + 0.3 * np.log(obs.params / 3e9) ** 2, 1.0)
    rng = np.random.default_rng(0)
    loss = kink * np.exp(rng.normal(0, 0.002, len(kink)))
    found = fit_isoflop(Observations(obs.params, obs.tokens, obs.flops, loss, obs.runs), 200, 0)
    assert found.window < np.inf and max(len(b.rows) for b in found.budgets) < 16
    for step, says in (
        (0.1, r"^2 compute budgets with a minimum.*opens downwards"),
        (0.02, "of the resamples"),
    ):
        jagged = obs.loss * (1 + step * (np.log(obs.params).round() % 2))
        with pytest.raises(Refused, match=says):
            fit_isoflop(Observations(obs.params, obs.tokens, obs.flops, jagged, obs.runs), 200, 0)


def test_a_window_keeps_five_sizes_also_where_they_lie_in_pairs_round_the_minimum() -> None:
    offset = np.array([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    rows, flops = [np.arange(7)], np.full(7, 1e18)
    obs = Observations(np.exp(offset), flops, flops, 3 + offset**2, np.arange(7))
    fits = fit_curves(_ladder(obs, rows), np.ones((1, 1, 7)))
    (near,) = _nearby(obs, rows, fits, 1.1)
    assert sorted(near.tolist()) == [1, 2, 3, 4, 5]


def test_budgets_can_be_named_or_given_a_width() -> None:
    flops = np.geomspace(1e18, 1e21, 40)
    assert group_budgets(flops).max() == 39 and group_budgets(flops, 1.0).max() < 20
    within = group_budgets(flops, 1.0)
    assert all(flops[within == k].max() <= 2 * flops[within == k].min() for k in range(within.max() + 1))
    obs = isoflop_runs(0, budgets=4, sizes=7)
    # Rows that drift without a gap are one chain; names tell them apart.
    drift = obs.flops * np.tile(np.geomspace(1, 1.5, 7), 4)
    moved = Observations(obs.params, obs.tokens, drift, obs.loss, obs.runs)
    with pytest.raises(Refused, match="--budget"):
        fit_isoflop(moved, 200, 0)
    named = Observations(obs.params, obs.tokens, drift, obs.loss, obs.runs, budgets=np.repeat(np.arange(4), 7))
    assert len(fit_isoflop(named, 200, 0).budgets) == 4


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


def test_resampled_noise_of_curves_is_that_of_the_runs_not_what_the_fit_left_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """24 runs carry 10 fitted numbers: their residuals are smaller than their noise by a quarter."""
    drawn: list[np.ndarray] = []

    def watched(runs: np.ndarray, residual: np.ndarray, draws: int, seed: int) -> np.ndarray:
        drawn.append(residual)
        return _drawn_residuals(runs, residual, draws, seed)

    monkeypatch.setattr(isoflop_law, "_drawn_residuals", watched)
    for seed in range(20):
        fit_isoflop(isoflop_runs(seed, budgets=4, sizes=6, sd=0.002), 20, 0)
    assert len(drawn[0]) == 24
    assert np.sqrt((np.concatenate(drawn) ** 2).mean()) == pytest.approx(0.002, rel=0.1)
