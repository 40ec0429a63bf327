"""Bootstrap intervals over whole runs, for functions that are fitted rather than averaged.

The resamples and the expanded interval are ours: scipy.stats.bootstrap calls a function per resample, where ours are
weights that `solver` takes together, and its BCa is the plain one.

Shape suffixes: S resamples, G runs, R rows, K quantities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from .refusal import Refused
from .solver import Array

LEVEL = 0.95
# A design that more than this share of resamples could not carry hangs on single runs.
MAX_REDRAWN = 0.1


class BootstrapInterval(NamedTuple):
    low: float
    high: float


def resample_runs(runs: Array, draws: int, seed: int, enough: Callable[[Array], bool] | None = None) -> Array:
    """Weights [S, R] of `draws` resamples of whole runs with replacement: how often each row's run was drawn.

    runs: int [R], the run 0..G-1 of each row. Rows of a run share its noise (its seed, its data), so they are drawn
    together (cluster bootstrap: Davison and Hinkley 1997, section 3.8). `enough` says of the rows drawn (bool [R])
    whether a fit is possible at all; others are drawn again. Raises Refused where that is more than a tenth of them.
    """
    rng = np.random.default_rng(seed)
    count = int(runs.max()) + 1
    kept: list[Array] = []
    redrawn = 0
    while len(kept) < draws:
        drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        if enough is None or enough(drawn[runs] > 0):
            kept.append(drawn)
            continue
        redrawn += 1
        if redrawn > max(10.0, MAX_REDRAWN * draws):
            raise Refused(
                f"of {redrawn + len(kept)} resamples of the {count} runs {redrawn} lost so many sizes or token counts "
                f"that nothing can be fitted to them; expected at most {MAX_REDRAWN:.0%}; add runs"
            )
    return np.stack(kept)[:, runs].astype(np.float64)


def leave_one_run_out(runs: Array) -> Array:
    """Weights [G, R]: 1, and 0 for the rows of the run left out."""
    return (np.arange(int(runs.max()) + 1)[:, None] != runs).astype(np.float64)


def bca_interval(
    estimate: float, draws: Array, jackknife: Array, fitted: int = 0, level: float = LEVEL
) -> BootstrapInterval:
    """Bias-corrected and accelerated bootstrap interval (Efron, JASA 82, 1987, 171-185).

    draws [S] of the resamples, jackknife [G] with one run left out each. `fitted` > 0: a least-squares fit of that many
    parameters leaves residuals that are smaller than the noise by √((G - fitted)/G), and its resamples are too close
    together by as much; the normal quantile is then replaced by √(G/(G - fitted)) times Student's with G - fitted
    degrees of freedom (the "expanded" interval of Hesterberg, The American Statistician 69, 2015, there for a mean).
    """
    below = (np.sum(draws < estimate) + 0.5 * np.sum(draws == estimate)) / len(draws)
    # All draws on one side: the correction is unknown, not infinite.
    bias = float(ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws))))
    pull = jackknife.mean() - jackknife
    spread = float((pull**2).sum())
    acceleration = float((pull**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    count = len(jackknife)
    z = ndtri((1 + level) / 2)
    if fitted:
        z = math.sqrt(count / (count - fitted)) * stdtrit(count - fitted, (1 + level) / 2)
    low, high = (_corrected(bias, acceleration, side) for side in (-z, z))
    ends = np.quantile(draws, [low, high])
    return BootstrapInterval(float(ends[0]), float(ends[1]))


def _corrected(bias: float, acceleration: float, z: float) -> float:
    shifted = bias + z
    scale = 1 - acceleration * shifted
    # Beyond the pole of the transformation there is no more of the distribution: take its end.
    return float(ndtr(bias + shifted / scale)) if scale > 0.05 else (0.0 if z < 0 else 1.0)


def percentile_interval(draws: Array, freedom: int = 0, level: float = LEVEL) -> BootstrapInterval:
    """Quantiles of draws [S] (Efron, Annals of Statistics 7, 1979); with `freedom`, those at Student's quantiles with
    as many degrees of freedom instead of the normal's (Hesterberg, The American Statistician 69, 2015)."""
    tail = (1 - level) / 2
    if freedom:
        tail = ndtr(-stdtrit(freedom, 1 - tail))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return BootstrapInterval(float(low), float(high))
