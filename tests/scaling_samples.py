"""Tables of synthetic runs whose law is known."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ee_megatron.scaling.loss_law import predict
from ee_megatron.scaling.table import Observations

# The fit that Hoffmann et al. 2022 report: E, A, B, alpha, beta.
CHINCHILLA = np.array([[1.69, 406.4, 410.7, 0.34, 0.28]])
EXPONENT_A = 0.28 / (0.34 + 0.28)


def grid(sizes: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Every size with every token count, 40M to 10B parameters and 1B to 400B tokens."""
    n, d = np.meshgrid(np.geomspace(4e7, 1e10, sizes), np.geomspace(1e9, 4e11, tokens), indexing="ij")
    return n.ravel(), d.ravel()


def noisy(seed: int, sizes: int = 7, tokens: int = 7, sd: float = 0.015, rows: int = 1, run_sd: float = 0.0):
    """Observations with log-normal noise: `sd` per row, `run_sd` shared by the `rows` checkpoints of a run."""
    rng = np.random.default_rng(seed)
    n, d = grid(sizes, tokens)
    runs = np.repeat(np.arange(len(n)), rows)
    n, d = n[runs], d[runs] * np.tile(np.linspace(1.0, 0.8, rows), len(n))
    noise = rng.normal(0, sd, len(n)) + (rng.normal(0, run_sd, runs.max() + 1)[runs] if run_sd else 0.0)
    return Observations(n, d, 6 * n * d, predict(CHINCHILLA, n, d)[0] * np.exp(noise), runs)


def isoflop_runs(seed: int, budgets: int = 6, sizes: int = 9, sd: float = 0.005, ladder: str = "own") -> Observations:
    """Runs at each of `budgets` from 1e18 to 1e21 FLOPs. Sizes, by `ladder`: a sixth to six times the optimum of each
    budget (own), 4e7 to 1.6e10 for all (common), or scattered at random from a twelfth to nine times the optimum,
    further up at larger budgets (uneven)."""
    rng = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    _, a, b, alpha, beta = CHINCHILLA[0]
    optimum = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** EXPONENT_A
    if ladder == "own":
        n = optimum * np.tile(np.geomspace(1 / 6, 6, sizes), budgets)
    elif ladder == "common":
        n = np.tile(np.geomspace(4e7, 1.6e10, sizes), budgets)
    else:
        up = np.repeat(np.linspace(0, 1, budgets), sizes)
        n = optimum * np.exp(rng.uniform(-2.5 + up, 1.2 + up, len(flops)))
    d = flops / (6 * n)
    loss = predict(CHINCHILLA, n, d)[0] * np.exp(rng.normal(0, sd, len(n)))
    return Observations(n, d, flops, loss, np.arange(len(n)))


def write_csv(path: Path, columns: Mapping[str, object]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))  # type: ignore[call-overload]
    return path
