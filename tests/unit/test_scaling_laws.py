"""The laws of the loss: recovered from data that follow them, intervals, and refusals of what is not determined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ee_megatron.scaling import laws
from ee_megatron.scaling.bootstrap import Refused, percentile_interval, resample
from ee_megatron.scaling.laws import PARAMETERS, ScalingFit, fit_isoflop, fit_loss_law, predict
from ee_megatron.scaling.table import observations, read_table
from tests.scaling_samples import CHINCHILLA, EXPONENT_A, grid, isoflop_runs, noisy, observed, table


def value(fit: ScalingFit, name: str = "exponent_a") -> tuple[float, float, float]:
    estimate, low, high = fit.table.loc[name]
    return low, estimate, high


@pytest.mark.parametrize("law", [CHINCHILLA[0], [2.2, 30.0, 3000.0, 0.2, 0.45], [0.5, 5e4, 60.0, 0.6, 0.15]])
def test_a_law_without_noise_is_recovered(law) -> None:
    n, d = grid(6, 6)
    found = fit_loss_law(observed(n, d, predict(np.array([law]), n, d)[0]), 10, 0)
    assert found.table["value"][list(PARAMETERS)].to_numpy() == pytest.approx(law, rel=1e-3)


def test_huber_withstands_a_diverged_run() -> None:
    obs = noisy(5, 6, 6, 0.003)
    obs.loc[[8, 22], "loss"] *= 1.6
    assert fit_loss_law(obs, 10, 0).theta[0, 3:] == pytest.approx(CHINCHILLA[0, 3:], abs=0.04)


def test_exponent_a_and_g_are_where_the_loss_is_least_at_given_flops() -> None:
    found = fit_loss_law(noisy(8), 200, 0)
    n = np.geomspace(1e7, 1e11, 200001)
    for flops in (1e19, 1e21):
        best = n[predict(found.theta[:1], n, flops / (6 * n))[0].argmin()]
        formula = found.table["value"]["coefficient_G"] * (flops / 6) ** found.table["value"]["exponent_a"]
        assert best == pytest.approx(formula, rel=1e-3) and found.optima(flops)[0] == pytest.approx(best, rel=1e-3)
    low, _, high = value(found)
    assert low < EXPONENT_A < high


def test_intervals_contain_the_estimate_shrink_with_the_noise_and_follow_the_seed() -> None:
    wide, narrow, again = (fit_loss_law(noisy(9, 6, 6, sd), 60, 0) for sd in (0.02, 0.004, 0.02))
    for name in PARAMETERS:
        low, estimate, high = value(wide, name)
        assert low < estimate < high and high - low > 2 * np.ptp([value(narrow, name)[0], value(narrow, name)[2]])
    assert wide.table.equals(again.table)


def test_rows_of_a_run_take_the_residuals_of_one_run_in_their_order_enlarged_by_what_the_fit_took() -> None:
    runs, residual = np.array([1, 0, 1, 0, 2, 3]), np.array([1.0, 10.0, 2.0, 20.0, 300.0, 4000.0])
    drawn = resample(np.zeros(6), residual, runs, 0, 400, 0)
    pairs = {tuple(pair) for pair in drawn[:, [0, 2]].tolist()} | {tuple(pair) for pair in drawn[:, [1, 3]].tolist()}
    assert pairs == {(1.0, 2.0), (10.0, 20.0), (300.0, 300.0), (4000.0, 4000.0)}
    assert set(drawn[:, 4].tolist()) == {1.0, 10.0, 300.0, 4000.0}
    assert resample(np.zeros(6), residual, runs, 3, 400, 0) == pytest.approx(2 * drawn)


def test_few_runs_widen_an_interval_as_students_distribution_does() -> None:
    draws = np.random.default_rng(0).normal(size=200_000)
    assert percentile_interval(draws, 10**6)[1] == pytest.approx(1.96, abs=0.02)
    assert percentile_interval(draws, 5)[1] == pytest.approx(2.571, abs=0.05)


def test_published_isoflop_runs_give_the_published_exponent() -> None:
    """Six of the twelve budgets of an experiment of Porian et al. 2024 (arXiv 2406.19146; data from
    github.com/formll/resolving-scaling-law-discrepancies, MIT licence: RefinedWeb, short warmup, cosine decay, FLOPs
    with attention), where their analysis of all twelve gives 0.577."""
    obs, _ = observations(read_table(Path(__file__).parent.parent / "published_isoflop.csv"), {})
    found = fit_isoflop(obs, 400, 0)
    low, estimate, high = value(found)
    assert estimate == pytest.approx(0.577, abs=0.006) and low < 0.577 < high and len(found.budgets) == 6
    assert 0.0005 < found.details["noise_log"] < 0.01


@pytest.mark.parametrize("common", [False, True])
def test_isoflop_minima_agree_with_the_law_behind_the_runs(common: bool) -> None:
    exact = fit_isoflop(isoflop_runs(0, 6, 16, 0.0, common), 200, 0)
    assert value(exact)[1] == pytest.approx(EXPONENT_A, abs=0.003)
    low, _, high = value(fit_isoflop(isoflop_runs(0, 6, 16, 0.001, common), 400, 0))
    assert low < EXPONENT_A < high < low + 0.2


def test_the_noise_of_isoflop_losses_is_that_of_the_runs() -> None:
    found = [fit_isoflop(isoflop_runs(seed, 6, 9, 0.001), 20, seed).details["noise_log"] for seed in range(20)]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(0.001, rel=0.1)


def test_seeds_of_one_size_are_averaged_and_their_noise_is_that_of_a_row() -> None:
    obs = pd.concat([isoflop_runs(seed, 5, 8, 0.002) for seed in range(4)], ignore_index=True).assign(run=range(160))
    found = fit_isoflop(obs, 200, 0)
    alone = fit_isoflop(obs[:40], 200, 0)
    assert found.details["noise_log"] == pytest.approx(0.002, rel=0.3)
    assert np.ptp(found.table.loc["exponent_a", ["low", "high"]]) < np.ptp(
        alone.table.loc["exponent_a", ["low", "high"]]
    )


def test_budgets_are_found_in_flops_or_named() -> None:
    obs = isoflop_runs(0, 4, 7)
    drift = np.tile(np.linspace(0.98, 1.02, 7), 4) * obs["flops"]
    columns = {"params": obs["params"], "flops": drift, "loss": obs["loss"], "planned": obs["budget"]}
    for names in ({}, {"budget": "planned"}):
        assert observations(table(columns), names)[0]["budget"].tolist() == obs["budget"].tolist()
    scattered = {**columns, "flops": obs["flops"] * np.tile(np.geomspace(1, 3, 7), 4)}
    assert observations(table(scattered), {})[0]["budget"].nunique() > 4
    assert observations(table(scattered), {"budget": "planned"})[0]["budget"].nunique() == 4


def test_a_budget_without_a_minimum_is_left_out_by_name() -> None:
    obs = isoflop_runs(0, 5, 7, 0.0)
    obs.loc[obs["budget"] == 0, "loss"] = 3 - 0.01 * np.arange(7.0)
    found = fit_isoflop(obs, 200, 0)
    assert len(found.budgets) == 4 and len(found.details["left_out"]) == 1
    assert found.details["left_out"][0].startswith("1e+18 FLOPs")
    assert value(found)[1] == pytest.approx(EXPONENT_A, abs=0.005)


def falling() -> pd.DataFrame:
    return isoflop_runs(0).assign(loss=lambda obs: 9 - np.log(obs["params"]) / 10)


def rising_law() -> pd.DataFrame:
    n, d = grid(6, 6)
    return observed(n, d, 1.7 + 0.05 * np.log(n / 1e7) + 400 * d**-0.28)


def law_without_size() -> pd.DataFrame:
    n, d = grid(6, 6)
    return observed(n, d, (1.7 + 400 * d**-0.28) * np.exp(np.random.default_rng(0).normal(0, 0.01, 36)))


def tokens_in_proportion() -> pd.DataFrame:
    n = np.geomspace(1e7, 1e10, 16)
    return observed(n, 20 * n, predict(CHINCHILLA, n, 20 * n)[0])


@pytest.mark.parametrize(
    ("fit", "obs", "says"),
    [
        (fit_loss_law, noisy(0, 2, 8), "counts N"),
        (fit_loss_law, noisy(0, 8, 2), "counts D"),
        (fit_loss_law, noisy(0, 3, 3), "9 runs"),
        (fit_loss_law, tokens_in_proportion(), "collinear"),
        (fit_loss_law, law_without_size(), "not identified"),
        (fit_loss_law, rising_law(), "not identified"),
        (fit_isoflop, isoflop_runs(0, 2), "2 compute budgets"),
        (fit_isoflop, isoflop_runs(0, 4, 4), "4 distinct sizes"),
        (fit_isoflop, falling(), "0 compute budgets"),
        (fit_isoflop, isoflop_runs(2, 3, 6, sd=0.04), "minimum"),
    ],
)
def test_what_the_data_do_not_determine_is_refused(fit, obs: pd.DataFrame, says: str) -> None:
    with pytest.raises(Refused, match=says):
        fit(obs, 200, 0)


def test_minima_lost_in_resamples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "_noise", lambda rows: np.full(len(rows), 0.1) * (-1) ** np.arange(len(rows)))
    with pytest.raises(Refused, match="resamples"):
        fit_isoflop(isoflop_runs(0, 3, 6, 0.0), 200, 0)
