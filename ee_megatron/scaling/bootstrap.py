"""Intervals for every fit by one bootstrap: residuals of whole runs are resampled, and fits to them give quantiles.

Shape suffixes: S resamples, R rows, G runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit

from .table import Array

LEVEL = 0.95


class Refused(ValueError):
    """Error: the data do not determine the requested quantity; says what they contain, what is needed, what to do."""


def resample(fitted: Array, residual: Array, runs: Array, parameters: int, draws: int, seed: int) -> Array:
    """Resampled data [S, R]: fitted values [R] plus residuals [R] of runs drawn at random, as if from other seeds.

    runs: int [R], 0..G-1. The rows of a run take, in their order, the residuals of one drawn run (from the first again
    if it has fewer), so rows of a run still share its noise (Davison and Hinkley 1997, sections 3.8 and 6.3).
    Residuals are smaller than the noise by √((G - P)/G), since the P fitted parameters took their part of it, and are
    enlarged by as much.
    """
    counts = np.bincount(runs)
    order = np.argsort(runs, kind="stable")
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.empty(len(runs), dtype=int)
    place[order] = np.arange(len(runs)) - first[runs[order]]
    noise = residual * np.sqrt(len(counts) / max(len(counts) - parameters, 1))
    donor = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))[:, runs]
    return np.asarray(fitted + noise[order][first[donor] + place % counts[donor]])


def percentile_interval(draws: Array, freedom: int, level: float = LEVEL) -> tuple[float, float]:
    """Quantiles of draws [S] at Student's instead of the normal distribution's levels, since the noise of few runs is
    itself uncertain (Hesterberg, The American Statistician 69, 2015). `freedom`: runs less fitted parameters."""
    tail = float(ndtr(-stdtrit(max(freedom, 1), (1 + level) / 2)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def interval_table(values: Mapping[str, Array], freedom: int) -> pd.DataFrame:
    """Columns value, low and high (95 %); a row for each of `values` [1 + S]: an estimate, then its resamples."""
    rows = {name: (each[0], *percentile_interval(each[1:], freedom)) for name, each in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"], dtype=float)


def are_collinear(x: Array, y: Array) -> bool:
    """Whether x [R] and y [R] have a squared correlation above 0.99, so that their effects cannot be separated."""
    return float(np.corrcoef(x, y)[0, 1]) ** 2 > 0.99
