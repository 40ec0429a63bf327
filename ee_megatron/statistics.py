"""Statistics of every reported figure: scipy's tests and intervals, and bootstraps that resample clusters.

scipy.stats takes a second to import and is imported where it is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    low: float
    high: float


class Estimate(NamedTuple):
    """A value with its interval; NaN where the data do not define it."""

    value: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """A paired test. only_first, only_second: items that only one of the two got right; p_value, two-sided."""

    only_first: int
    only_second: int
    p_value: float


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a proportion; (0, 1) for n = 0: Wilson, JASA 22 (1927), 209-212.

    Raises ValueError unless 0 <= successes <= n.
    """
    if n == successes == 0:
        return Interval(0.0, 1.0)
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def sign_flip_test(first: Sequence[bool], second: Sequence[bool], clusters: Sequence[str]) -> PairedTest:
    """Test whether two models differ in accuracy on the same items (bool [n] each), which are right or wrong together
    within a cluster: the sum of the differences, where each cluster's may as well have the other sign. Exact for up to
    13 clusters that differ, else 9,999 draws. With a cluster for each item it is McNemar's exact test.

    Fisher, The Design of Experiments (1935), section 21; for clusters: Canay, Romano and Shaikh, Econometrica 85
    (2017). Raises ValueError for unequal lengths.
    """
    gains = np.array([float(b) - float(a) for a, b, _ in zip(first, second, clusters, strict=True)])
    sums = np.bincount(np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1], weights=gains)
    sums = sums[sums != 0]
    if exact := len(sums) <= 13:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))), dtype=np.int8)
    else:
        signs = np.random.default_rng(0).choice(np.array((-1, 1), dtype=np.int8), size=(9999, len(sums)))
    as_far = int((np.abs(signs @ sums) >= abs(sums.sum())).sum())
    # What was observed is one of the draws: Phipson and Smyth 2010 (arXiv 1603.05766).
    p_value = as_far / len(signs) if exact else (as_far + 1) / (len(signs) + 1)
    return PairedTest(int((gains < 0).sum()), int((gains > 0).sum()), p_value)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda sample: float(np.mean(sample)),
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """A statistic of values [n] with its percentile bootstrap interval: Efron, Annals of Statistics 7 (1979).

    Rows of a 2-D array [n, ...] are resampled as wholes; with clusters [n] those that share one, together (Davison and
    Hinkley 1997, section 3.8). NaN for n = 0.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    members: dict[Hashable, list[int]] = {}
    for i, (cluster, _) in enumerate(zip(range(len(data)) if clusters is None else clusters, data, strict=True)):
        members.setdefault(cluster, []).append(i)
    groups = [np.array(rows) for rows in members.values()]

    def drawn() -> np.ndarray:
        chosen = rng.integers(len(groups), size=len(groups))
        return data[chosen if len(groups) == len(data) else np.concatenate([groups[i] for i in chosen])]

    draws = np.array([statistic(drawn()) for _ in range(resamples)])
    return Estimate(float(statistic(data)), *_percentiles(draws, level))


def t_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of values [n] with Student's interval (Biometrika 6 (1908)): for a handful of trainings, of which a
    bootstrap's percentiles would be too narrow. No interval (NaN) for n < 2."""
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean()) if len(data) else math.nan
    if len(data) < 2:
        return Estimate(mean, math.nan, math.nan)
    from scipy.special import stdtrit

    half = float(stdtrit(len(data) - 1, (1 + level) / 2) * data.std(ddof=1) / math.sqrt(len(data)))
    return Estimate(mean, mean - half, mean + half)


def clustered_difference(first: Sequence[bool], second: Sequence[bool], clusters: Sequence[str]) -> Estimate:
    """Accuracy of `second` minus that of `first` on the same items (bool [n] each), with the percentile bootstrap
    interval of whole clusters: items that share one (their operands, say) are right or wrong together.

    Raises ValueError for unequal lengths; NaN for n = 0.
    """
    gains = [float(b) - float(a) for a, b, _ in zip(first, second, clusters, strict=True)]
    return bootstrap_interval(gains, clusters=clusters)


def least_squares_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the line that minimises Σ (y - intercept - slope x)², values [n] each. Points of which a
    value isn't finite are left out; NaN unless two of the rest differ in x."""
    points = np.array([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)])
    if len(points) < 2 or not np.ptp(points[:, 0]) > 0:
        return math.nan, math.nan
    slope, intercept = np.polyfit(points[:, 0], points[:, 1], 1)
    return float(slope), float(intercept)


def spearman_interval(
    xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], resamples: int = 300, seed: int = 0
) -> Estimate:
    """Spearman's (1904) rank correlation over the tokens of many answers (xs[i], ys[i]: [T_i]), ties sharing their mean
    rank, with a 95 % interval over resampled answers, since tokens of one are not independent (cluster bootstrap:
    Davison and Hinkley 1997, section 3.8). NaN if there are fewer than two tokens or one side is constant."""
    if not xs:
        return Estimate(math.nan, math.nan, math.nan)
    answer = np.repeat(np.arange(len(xs)), [len(x) for x, _ in zip(xs, ys, strict=True)])
    # A resample is the same tokens with other weights: values are sorted once, not once per resample.
    places = [np.unique(np.concatenate(side), return_inverse=True)[1] for side in (xs, ys)]

    def correlation(times: np.ndarray) -> float:
        """Of a sample in which answer i occurs times[i] times: Pearson's r of the ranks."""
        weight = times[answer].astype(np.float64)
        x, y = (_weighted_ranks(side, weight) for side in places)
        scale = math.sqrt(float(weight @ (x * x)) * float(weight @ (y * y)))
        return float(weight @ (x * y)) / scale if scale > 0 else math.nan

    value = correlation(np.ones(len(xs)))
    if math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(len(xs), size=len(xs)), minlength=len(xs)) for _ in range(resamples))
    return Estimate(value, *_percentiles(np.array([correlation(times) for times in drawn])))


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
