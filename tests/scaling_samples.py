"""Tables of synthetic runs whose law is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ee_megatron.scaling.laws import predict
from ee_megatron.scaling.table import RunTable

# The fit that Hoffmann et al. 2022 report: E, A, B, alpha, beta.
CHINCHILLA = np.array([[1.69, 406.4, 410.7, 0.34, 0.28]])
EXPONENT_A = 0.28 / (0.34 + 0.28)


def grid(sizes: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Every size with every token count, 40M to 10B parameters and 1B to 400B tokens."""
    n, d = np.meshgrid(np.geomspace(4e7, 1e10, sizes), np.geomspace(1e9, 4e11, tokens), indexing="ij")
    return n.ravel(), d.ravel()


def observed(params: Any, tokens: Any, loss: Any, runs: Any = None, budget: Any = 0) -> pd.DataFrame:
    frame = pd.DataFrame({"params": params, "tokens": tokens, "loss": loss}).assign(budget=budget)
    return frame.assign(flops=6 * frame["params"] * frame["tokens"], run=range(len(frame)) if runs is None else runs)


def noisy(
    seed: int, sizes: int = 7, tokens: int = 7, sd: float = 0.015, rows: int = 1, run_sd: float = 0.0
) -> pd.DataFrame:
    """Observations with log-normal noise: `sd` per row, `run_sd` shared by the `rows` checkpoints of a run."""
    rng = np.random.default_rng(seed)
    n, d = grid(sizes, tokens)
    runs = np.repeat(np.arange(len(n)), rows)
    n, d = n[runs], d[runs] * np.tile(np.linspace(1.0, 0.8, rows), len(n))
    noise = rng.normal(0, sd, len(n)) + (rng.normal(0, run_sd, runs.max() + 1)[runs] if run_sd else 0.0)
    return observed(n, d, predict(CHINCHILLA, n, d)[0] * np.exp(noise), runs)


def isoflop_runs(seed: int, budgets: int = 6, sizes: int = 9, sd: float = 0.001, common: bool = False) -> pd.DataFrame:
    """Runs at each of `budgets` from 1e18 to 1e21 FLOPs, a sixth to six times each optimum or from 4e7 to 1.6e10."""
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    _, a, b, alpha, beta = CHINCHILLA[0]
    optimum = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** EXPONENT_A
    n = optimum * np.tile(np.geomspace(1 / 6, 6, sizes), budgets)
    if common:
        n = np.tile(np.geomspace(4e7, 1.6e10, sizes), budgets)
    loss = predict(CHINCHILLA, n, flops / (6 * n))[0] * np.exp(np.random.default_rng(seed).normal(0, sd, len(n)))
    return observed(n, flops / (6 * n), loss, budget=np.repeat(np.arange(budgets), sizes))


def table(columns: Mapping[str, Sequence[Any]]) -> RunTable:
    return RunTable("runs.csv", "", pd.DataFrame(dict(columns)))


def write_csv(path: Path, columns: Mapping[str, Any]) -> Path:
    pd.DataFrame(dict(columns)).to_csv(path, index=False)
    return path
