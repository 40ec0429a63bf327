"""95 % intervals hold the truth in about 95 % of synthetic tables, on seeds that no choice was made by."""

from __future__ import annotations

import numpy as np
import pytest

from ee_megatron.scaling.laws import fit_isoflop, fit_loss_law
from tests.scaling_samples import EXPONENT_A, isoflop_runs, noisy

FIRST_SEED = 10_000
# E, alpha, beta as in tests.scaling_samples.CHINCHILLA.
TRUTH = {"E": 1.69, "alpha": 0.34, "beta": 0.28, "exponent_a": EXPONENT_A}


@pytest.mark.parametrize("rows", [1, 3])
def test_intervals_of_the_loss_law_cover_at_their_rate(rows: int) -> None:
    """36 runs; with 3 checkpoints each that share most of their run's noise, rows alone would cover about 70 %."""
    held = np.zeros(len(TRUTH))
    for seed in range(FIRST_SEED, FIRST_SEED + 60):
        noise = (0.015, 0.0) if rows == 1 else (0.005, 0.015)
        table = fit_loss_law(noisy(seed, 6, 6, noise[0], rows, noise[1]), 200, seed).table.loc[list(TRUTH)]
        held += (table["low"] < list(TRUTH.values())) & (table["high"] > list(TRUTH.values()))
    print(f"{rows} rows a run: {held / 60}")
    # 95 % of 60, within binomial error (99 %).
    assert held.min() >= 52


@pytest.mark.parametrize(("budgets", "sizes", "common"), [(6, 9, False), (4, 7, False), (3, 5, False), (6, 16, True)])
def test_the_interval_of_the_isoflop_exponent_covers(budgets: int, sizes: int, common: bool) -> None:
    held = 0
    for seed in range(FIRST_SEED, FIRST_SEED + 200):
        obs = isoflop_runs(seed, budgets, sizes, 0.001, common)
        _, low, high = fit_isoflop(obs, 400, seed).table.loc["exponent_a"]
        held += low <= EXPONENT_A <= high
    print(f"{budgets} x {sizes}: {held / 200}")
    # At least 90 %, within binomial error (99 %).
    assert held >= 170
