"""Quantiles and resamples are what their definitions say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtri, stdtrit

from ee_megatron.scaling.intervals import (
    bca_interval,
    leave_one_run_out,
    percentile_interval,
    resample_runs,
)
from ee_megatron.scaling.refusal import Refused


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (31, 2.0395), (400, 1.9659)],
)
def test_percentiles_are_taken_at_students_quantiles_of_the_tables(freedom: int, expected: float) -> None:
    # The quantile of these draws at p is p: which p was taken is seen, as a normal quantile.
    low, high = percentile_interval(np.linspace(0, 1, 101), freedom)
    assert -ndtri(low) == pytest.approx(expected, abs=1e-4) and high == pytest.approx(1 - low)


def test_rows_of_a_run_are_drawn_together_and_runs_with_replacement() -> None:
    runs = np.array([0, 0, 1, 2, 2, 2])
    weights = resample_runs(runs, 500, 0)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert (weights == 0).any() and (weights == 3).any()
    assert np.allclose(weights.mean(axis=0), 1, atol=0.12)


def test_resamples_that_cannot_be_fitted_are_drawn_again_or_refused() -> None:
    runs = np.arange(8)
    weights = resample_runs(runs, 300, 0, enough=lambda rows: rows.sum() >= 4)
    assert len(weights) == 300 and ((weights > 0).sum(axis=1) >= 4).all()
    with pytest.raises(Refused, match="8 runs"):
        resample_runs(runs, 300, 0, enough=lambda rows: rows.all())


def test_each_run_is_left_out_once() -> None:
    assert leave_one_run_out(np.array([0, 1, 1])).tolist() == [[0, 1, 1], [1, 0, 0]]


def bootstrap_of_mean(sample: np.ndarray, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
    count = len(sample)
    draws = sample[np.random.default_rng(seed).integers(count, size=(4000, count))].mean(axis=1)
    return sample.mean(), draws, (sample.sum() - sample) / (count - 1)


def test_the_expanded_interval_of_a_mean_is_students() -> None:
    sample = np.random.default_rng(0).normal(size=12)
    sample = sample - np.flip(sample)  # symmetric: no bias, no acceleration
    interval = bca_interval(*bootstrap_of_mean(sample, 0), fitted=1)
    half = stdtrit(11, 0.975) * sample.std(ddof=1) / np.sqrt(12)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.06)
    plain = bca_interval(*bootstrap_of_mean(sample, 0))
    assert plain.high - plain.low < interval.high - interval.low


def test_bca_leans_the_way_the_statistic_is_skewed() -> None:
    sample = np.random.default_rng(1).exponential(size=40)
    mean, draws, jackknife = bootstrap_of_mean(sample, 1)
    corrected, plain = bca_interval(mean, draws, jackknife), percentile_interval(draws)
    assert corrected.low > plain.low and corrected.high > plain.high


def test_bca_takes_a_median_bias_back() -> None:
    draws = np.random.default_rng(2).normal(1.0, 1.0, 20000)
    flat = np.arange(5.0)
    interval = bca_interval(0.5, draws, flat)
    # z0 = -0.5: the interval is centred two z0 below the draws' centre.
    assert np.mean(interval) == pytest.approx(0.0, abs=0.06)


def test_percentiles_widen_with_few_degrees_of_freedom() -> None:
    draws = np.random.default_rng(3).normal(size=50000)
    assert percentile_interval(draws).high == pytest.approx(1.96, abs=0.04)
    assert percentile_interval(draws, freedom=10).high == pytest.approx(2.228, abs=0.05)
    assert percentile_interval(draws, level=0.9).high == pytest.approx(1.645, abs=0.04)
