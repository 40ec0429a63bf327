"""The statistics behind every reported figure.

Ranks are scipy's. Wilson's interval and McNemar's test stay written here: their values stand in stored results, which
stay equal to the last bit, and scipy's differ there (by 2e-15 and 8e-14 of themselves). So do the bootstraps: scipy's
draws its resamples in another order and knows no clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054
"""The 0.975 quantile of the standard normal distribution."""


class Interval(NamedTuple):
    low: float
    high: float


class Estimate(NamedTuple):
    """A value with its interval; NaN where the data do not define it."""

    value: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """only_first, only_second: items that one of the two got right and the other did not; p_value, two-sided."""

    only_first: int
    only_second: int
    p_value: float


def wilson_interval(successes: int, n: int, z: float = Z_95) -> Interval:
    """Score interval of a proportion; (0, 1) for n = 0.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), p = successes/n: Wilson, JASA 22 (1927), 209-212.
    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n")
    if n == 0:
        return Interval(0.0, 1.0)
    p, square = successes / n, z * z
    centre = p + square / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    low, high = (centre - half) / (1 + square / n), (centre + half) / (1 + square / n)
    # At the ends the formula is exact in theory only.
    return Interval(0.0 if successes == 0 else low, 1.0 if successes == n else high)


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Whether two models differ in accuracy on the same items (bool [n] each), by the discordant pairs alone.

    p = min(1, 2 Σ_{i <= min(b, c)} C(b+c, i) / 2^(b+c)): McNemar, Psychometrika 12 (1947), with the binomial
    distribution instead of its chi-square approximation. Raises ValueError for unequal lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"paired test of {len(first)} and {len(second)} items; give both models the same items")
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    return PairedTest(only_first, only_second, discordant_p(only_first, only_second))


def discordant_p(only_first: int, only_second: int) -> float:
    """The p of `mcnemar_exact`, from the discordant pairs alone."""
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    # Integers: 2**discordant overflows a float from 1024 on.
    return min(1.0, (2 * tail) / (1 << discordant))


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda sample: float(np.mean(sample)),
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A statistic of values [n] with its percentile bootstrap interval: Efron, Annals of Statistics 7 (1979).

    Rows of a 2-D array [n, ...] are resampled as wholes. NaN for n = 0.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(data[rng.integers(len(data), size=len(data))]) for _ in range(resamples)])
    return Estimate(float(statistic(data)), *_percentiles(draws, level))


def t_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of values [n] with Student's interval, mean ± t s/√n (Student, Biometrika 6 (1908)): for a handful of
    trainings, of which a bootstrap's percentiles would be too narrow. No interval (NaN) for n < 2."""
    n = len(values)
    if n < 2:
        return Estimate(float(values[0]) if n else math.nan, math.nan, math.nan)
    # Late: scipy.special takes a third of a second to import.
    from scipy.special import stdtrit

    data = np.asarray(values, dtype=np.float64)
    half = float(stdtrit(n - 1, (1 + level) / 2) * data.std(ddof=1) / math.sqrt(n))
    return Estimate(float(data.mean()), float(data.mean()) - half, float(data.mean()) + half)


def clustered_difference(first: Sequence[bool], second: Sequence[bool], clusters: Sequence[str]) -> Estimate:
    """Accuracy of `second` minus that of `first` on the same items (bool [n] each), with the percentile bootstrap
    interval of whole clusters: items that share one (their operands, say) are right or wrong together.

    Davison and Hinkley, Bootstrap Methods (1997), section 3.8, without resampling within. Raises ValueError for unequal
    lengths; NaN for n = 0.
    """
    if not len(first) == len(second) == len(clusters):
        raise ValueError(
            f"difference of {len(first)} and {len(second)} items in {len(clusters)} clusters; expected as many of each"
        )
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    gains = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    sums = np.stack([np.bincount(index, weights=gains), np.bincount(index)], axis=1)
    return bootstrap_interval(sums, lambda sample: float(sample[:, 0].sum() / sample[:, 1].sum()))


def least_squares_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the line that minimises Σ (y - intercept - slope x)², values [n] each: slope =
    cov(x, y) / var(x). Points of which a value isn't finite are left out; NaN unless two of the rest differ in x."""
    if len(x) != len(y):
        raise ValueError(f"a line through {len(x)} and {len(y)} values; expected as many of each")
    points = np.array([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)])
    if len(points) < 2 or not np.ptp(points[:, 0]) > 0:
        return math.nan, math.nan
    (a, b), (da, db) = points.mean(0), (points - points.mean(0)).T
    slope = float(da @ db / (da @ da))
    return slope, float(b) - slope * float(a)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of x [n] and y [n]: Pearson's r of the ranks, ties sharing their mean rank; Spearman (1904).

    NaN if n < 2 or one side is constant.
    """
    if len(x) != len(y):
        raise ValueError(f"rank correlation of {len(x)} and {len(y)} values; expected as many of each")
    if len(x) < 2:
        return math.nan
    # Late: scipy.stats takes a second to import.
    from scipy.stats import rankdata

    a, b = (ranks - ranks.mean() for ranks in (rankdata(x), rankdata(y)))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def spearman_interval(
    xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], resamples: int = 300, seed: int = 0
) -> Estimate:
    """Rank correlation over the tokens of many answers (xs[i], ys[i]: [T_i]) with a 95 % bootstrap interval.

    Whole answers are resampled, since tokens of one answer are not independent (cluster bootstrap: Davison and
    Hinkley 1997, section 3.8).
    """
    if len(xs) != len(ys):
        raise ValueError(f"rank correlation of {len(xs)} and {len(ys)} answers; expected as many of each")
    if not xs:
        return Estimate(math.nan, math.nan, math.nan)
    x, y = np.concatenate(xs), np.concatenate(ys)
    value = spearman(x, y)
    if math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    # A resample is the same tokens with other weights: values are sorted once, not once per resample.
    x, y = (np.unique(side, return_inverse=True)[1] for side in (x, y))
    answer = np.repeat(np.arange(len(xs)), [len(part) for part in xs])
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(len(xs), size=len(xs)), minlength=len(xs))
        draws.append(_weighted_spearman(x, y, drawn[answer].astype(np.float64)))
    return Estimate(value, *_percentiles(np.array(draws)))


def _weighted_spearman(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    """`spearman` of a sample in which value i occurs weight[i] times; x, y int [n]: places among the sorted values."""
    a, b = (_weighted_ranks(side, weight) for side in (x, y))
    scale = math.sqrt(float(weight @ (a * a)) * float(weight @ (b * b)))
    return float(weight @ (a * b)) / scale if scale > 0 else math.nan


def _weighted_ranks(places: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean ranks minus their mean."""
    counts = np.bincount(places, weights=weight)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks - (weight.sum() + 1) / 2


def _percentiles(draws: np.ndarray, level: float = 0.95) -> Interval:
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
