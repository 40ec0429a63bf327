"""L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, arXiv 2203.15556, equation 10), fitted in two ways.

Both work on ln N and ln D less their means, in which the terms' sizes and exponents are nearly independent; A and B are
turned back at the end. Shape suffixes: S problems (starts, resamples, folds), R rows, G grid points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .solver import Array, minimise

PARAMETERS = ("E", "A", "B", "alpha", "beta")
HUBER_DELTA = 1e-3
"""Hoffmann et al. 2022, section D.2."""
# Published exponents of loss lie between 0.05 and 0.6; what runs to these bounds is not an exponent of these data.
EXPONENT_LOW, EXPONENT_HIGH = 1e-3, 2.0
# ln of the least E, A/N^alpha or B/D^beta that counts, as a share of the least loss; below it a term is absent.
ABSENT = np.log(1e-4)
GRID = np.array([0.03, 0.08, 0.15, 0.22, 0.3, 0.38, 0.46, 0.6, 0.8, 1.1, 1.5])
# From least squares to nearly absolute values by stages: reweighting alone takes thousands of steps to get there.
STAGES = (0.03, 0.01, 0.003)


@dataclass(frozen=True)
class Design:
    """Rows of a table as the fits use them: centred ln N and ln D, ln loss (each float64 [R]), and the two means."""

    size: Array
    tokens: Array
    log_loss: Array
    mean_size: float
    mean_tokens: float

    @classmethod
    def of(cls, params: Array, tokens: Array, loss: Array) -> Design:
        n, d = np.log(params), np.log(tokens)
        return cls(n - n.mean(), d - d.mean(), np.log(loss), float(n.mean()), float(d.mean()))


class Fits(NamedTuple):
    """values_S5 in the order of PARAMETERS; objective_S; bound_S5, True where a parameter lies on its bound."""

    values: Array
    objective: Array
    bound: Array


def predict(values: Array, params: Array, tokens: Array) -> Array:
    """Loss [S, R] of values [S, 5] (PARAMETERS) at N [R] and D [R]."""
    e, a, b, alpha, beta = (column[:, None] for column in values.T)
    return np.asarray(e + a * params**-alpha + b * tokens**-beta)


def non_negative(gram: Array, moment: Array) -> Array:
    """argmin of c'Gc/2 - m'c over c >= 0 for gram [S, 3, 3] and moment [S, 3]: [S, 3].

    Every subset of the three terms is solved and the best feasible one taken: exact, and without a loop over problems,
    which the usual active-set method (Lawson and Hanson 1974) needs.
    """
    count = len(gram)
    best, value = np.zeros((count, 3)), np.zeros(count)
    for subset in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,)):
        index = list(subset)
        part = gram[:, index][:, :, index].copy()
        # Collinear terms (an exponent near 0 beside E) make the block singular: a share of 1e-12 keeps it solvable.
        part[:, range(len(index)), range(len(index))] *= 1 + 1e-12
        found = np.linalg.solve(part, moment[:, index][:, :, None])[:, :, 0]
        gained = -0.5 * (found * moment[:, index]).sum(axis=1)
        take = (found >= 0).all(axis=1) & (gained < value)
        whole = np.zeros((count, 3))
        whole[:, index] = found
        best, value = np.where(take[:, None], whole, best), np.where(take, gained, value)
    return best


def _terms(design: Design, exponents: Array) -> Array:
    """1, N^-alpha, D^-beta (centred), each over the row's loss: [S, 3, R]. Residuals are relative, like the noise."""
    falling = np.exp(-exponents[:, :, None] * np.stack([design.size, design.tokens]))
    ones = np.ones((len(exponents), 1, len(design.size)))
    return np.concatenate([ones, falling], axis=1) * np.exp(-design.log_loss)


def _linear_part(terms: Array, weights: Array) -> tuple[Array, Array]:
    """Coefficients [S, 3] of terms [S, 3, R] under weights [S, R], and the Gram matrix [S, 3, 3]."""
    weighted = terms * weights[:, None, :]
    gram = np.matmul(weighted, terms.transpose(0, 2, 1))
    return non_negative(gram, weighted.sum(axis=2)), gram


def variable_projection(design: Design, weights: Array, start: Array) -> Fits:
    """Least squares of relative residuals, Σ w (L(N, D)/loss - 1)², by variable projection.

    For given exponents E, A, B are a non-negative linear problem with an exact solution, so the search is over
    alpha and beta only (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973), with Kaufman's approximate Jacobian (BIT 15,
    1975).
    weights [S, R]; start [S, 2].
    """

    def curve(exponents: Array, w: Array) -> tuple[Array, Array]:
        terms = _terms(design, exponents)
        c, gram = _linear_part(terms, w)
        prediction = np.matmul(c[:, None, :], terms)[:, 0]
        slopes = -c[:, 1:, None] * terms[:, 1:] * np.stack([design.size, design.tokens])
        absent = c <= 0
        gram = np.where(absent[:, :, None] | absent[:, None, :], 0.0, gram)
        index = np.arange(3)
        gram[:, index, index] = np.where(absent, 1.0, gram[:, index, index] * (1 + 1e-12))
        cross = np.matmul(terms * w[:, None, :], slopes.transpose(0, 2, 1))
        cross = np.where(absent[:, :, None], 0.0, cross)
        kept = np.linalg.solve(gram, cross)
        return prediction, slopes - np.matmul(kept.transpose(0, 2, 1), terms)

    low, high = np.full(2, EXPONENT_LOW), np.full(2, EXPONENT_HIGH)
    found = minimise(curve, np.ones(len(design.size)), weights, start, low, high)
    c, _ = _linear_part(_terms(design, found.theta), weights)
    least = np.exp(design.log_loss.min() + ABSENT)
    bound = np.concatenate([c <= least, (found.theta <= low) | (found.theta >= high)], axis=1)
    return Fits(_uncentred(design, np.maximum(c, 0), found.theta), found.objective, bound)


def huber(design: Design, weights: Array, start: Array, steps: int = 150) -> Fits:
    """Huber's loss (delta 1e-3) of ln L(N, D) - ln loss, ln L as log-sum-exp(a - alpha ln N, b - beta ln D, e).

    Approach 3 of Hoffmann et al. 2022 (section D.2), which minimises by L-BFGS; the minimum is the same.
    weights [S, R]; start [S, 5], values in the order of PARAMETERS.
    """

    def curve(theta: Array, w: Array) -> tuple[Array, Array]:
        first = np.exp(theta[:, 1:2] - theta[:, 3:4] * design.size)
        second = np.exp(theta[:, 2:3] - theta[:, 4:5] * design.tokens)
        total = np.exp(theta[:, :1]) + first + second
        first, second = first / total, second / total
        slopes = [1 - first - second, first, second, -first * design.size, -second * design.tokens]
        return np.log(total), np.stack(slopes, axis=1)

    least = float(design.log_loss.min()) + ABSENT
    low = np.array([least, least, least, EXPONENT_LOW, EXPONENT_LOW])
    top = float(design.log_loss.max()) + 1.0
    high = np.array([top, top, top, EXPONENT_HIGH, EXPONENT_HIGH])
    theta = np.concatenate([np.log(np.maximum(_centred(design, start), np.exp(least))), start[:, 3:]], axis=1)
    for delta in STAGES:
        theta = minimise(
            curve, design.log_loss, weights, theta, low, high, delta=delta, steps=25, tolerance=1e-4
        ).theta  # fmt: skip
    found = minimise(curve, design.log_loss, weights, theta, low, high, delta=HUBER_DELTA, steps=steps, tolerance=1e-7)
    bound = (found.theta <= low) | (found.theta >= high)
    return Fits(_uncentred(design, np.exp(found.theta[:, :3]), found.theta[:, 3:]), found.objective, bound)


def grid_starts(design: Design, weights: Array, count: int) -> Array:
    """The `count` best of all pairs of GRID as alpha and beta, E, A, B by least squares: [count, 5]. weights [R]."""
    exponents = np.stack(np.meshgrid(GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 2)
    terms = _terms(design, exponents)
    w = np.broadcast_to(weights, (len(exponents), len(weights)))
    c, _ = _linear_part(terms, w)
    error = (w * (np.matmul(c[:, None, :], terms)[:, 0] - 1) ** 2).sum(axis=1)
    best = np.argsort(error, kind="stable")[:count]
    return _uncentred(design, c[best], exponents[best])


def _uncentred(design: Design, c: Array, exponents: Array) -> Array:
    shift = np.exp(exponents * np.array([design.mean_size, design.mean_tokens]))
    return np.concatenate([c[:, :1], c[:, 1:] * shift, exponents], axis=1)


def _centred(design: Design, values: Array) -> Array:
    shift = np.exp(-values[:, 3:] * np.array([design.mean_size, design.mean_tokens]))
    return np.concatenate([values[:, :1], values[:, 1:3] * shift], axis=1)
