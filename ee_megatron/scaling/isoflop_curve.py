"""Loss against model size at equal FLOPs: two exponentials in x = ln N whose steepness all budgets share.

With L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, arXiv 2203.15556, equation 10) and D = C/(6N), a budget's
losses are E + A e^(-αx) + B' e^(βx). Here each budget has a level, a tilt and a curvature of its own, as in approach 2,
so no law between budgets is assumed; only α and β, how steeply the loss rises to the left and to the right, are common.
As both go to 0 the curve becomes the parabola. That is too narrow a form as soon as sizes lie far from the minimum: on
a ladder of sizes that all budgets share it moves every minimum, and the exponent with them.

Shape suffixes: S problems, B budgets, W rows of a budget, padded to the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .solver import Array

# Published exponents lie between 0.05 and 0.6. At the lower end the curve is a parabola to within rounding.
STEEPNESS_LOW, STEEPNESS_HIGH = 1e-3, 1.5
_SIDES = STEEPNESS_HIGH * np.linspace(0.1, 1, 10) ** 2
STARTS = np.array([(STEEPNESS_LOW, STEEPNESS_LOW), *((a, b) for a in _SIDES for b in _SIDES)])
STEPS = 15
# Residuals of this size are rounding, not noise that a test could be made of.
EXACT = 1e-9
MISFIT_DRAWS = 2000


@dataclass(frozen=True)
class Ladder:
    """x - centre and weight [B, W] (weight 0: padding), and the budgets' centres [B]. Losses times weight are fitted:
    with weight 1/loss the residuals are relative."""

    offset: Array
    weight: Array
    centre: Array


@dataclass(frozen=True)
class CurveFits:
    """c0 + c1 f1 + c2 f2 of `_bases`: steepness α, β [S, 2], coefficients [S, B, 3], weighted residuals [S, B, W]."""

    steepness: Array
    coefficients: Array
    residuals: Array

    def minima(self) -> Array:
        """Offset of each budget's minimum from its centre [S, B]; NaN without one, ±inf where the curve only falls or
        rises."""
        total = self.steepness.sum(axis=-1)[:, None]
        _, c1, c2 = np.moveaxis(self.coefficients, -1, 0)
        right, left = 2 * c2 / total + c1 / 2, 2 * c2 / total - c1 / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.log(np.maximum(left, 0.0) / np.maximum(right, 0.0)) / total
        return np.where(c2 > 0, at, np.nan)


def curve(steepness: Array, coefficients: Array, offset: Array) -> Array:
    """Loss [W] of one budget's curve at offsets [W] from its centre."""
    f1, f2 = _bases(steepness, offset[None])
    c0, c1, c2 = coefficients
    return np.asarray(c0 + c1 * f1[0] + c2 * f2[0])


def fit_curves(ladder: Ladder, losses: Array) -> CurveFits:
    """Least squares for losses [S, B, W], which are weighted already: the best of a grid of α and β, then
    Levenberg-Marquardt over these two with all that is linear solved for (variable projection)."""
    best = np.full(len(losses), np.inf)
    steepness = np.empty((len(losses), 2))
    for start in STARTS:
        squares = (_project(ladder, start[None], losses)[1] ** 2).sum(axis=(1, 2))
        better = squares < best
        best[better], steepness[better] = squares[better], start
    damping = np.full(len(losses), 1e-3)
    _, residual = _project(ladder, steepness, losses)
    for _ in range(STEPS):
        step = _step(ladder, losses, steepness, residual, damping)
        tried = np.clip(steepness + step, STEEPNESS_LOW, STEEPNESS_HIGH)
        _, left = _project(ladder, tried, losses)
        squares = (left**2).sum(axis=(1, 2))
        better = squares < best
        steepness[better], residual[better], best[better] = tried[better], left[better], squares[better]
        damping *= np.where(better, 0.2, 5.0)
    coefficients, residual = _project(ladder, steepness, losses)
    return CurveFits(steepness, coefficients, residual)


def misfit(ladder: Ladder, fits: CurveFits) -> float:
    """Probability of neighbouring residuals as alike as those of the first fit if the form is right.

    The statistic is von Neumann's, squared differences of neighbours in size over squares (The Annals of Mathematical
    Statistics 12, 1941), summed over the budgets; its distribution that of normal noise from which the curves took what
    they take of any noise, by MISFIT_DRAWS draws. 1 where residuals are rounding or too few to say.
    """
    there = ladder.weight > 0
    rows, budgets = int(there.sum()), len(ladder.centre)
    if rows - parameters(budgets) < 4 or np.sqrt((fits.residuals[0] ** 2).sum() / rows) < EXACT:
        return 1.0
    taken, _ = np.linalg.qr(_tangents(ladder, fits)[there.ravel()])
    noise = np.random.default_rng(0).normal(size=(MISFIT_DRAWS, rows))
    drawn = np.zeros((1 + MISFIT_DRAWS, *there.shape))
    drawn[0] = fits.residuals[0]
    drawn[1:, there] = noise - (noise @ taken) @ taken.T
    order = np.argsort(np.where(there, ladder.offset, np.inf), axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order[None], axis=2)
    # Padding comes last: a difference counts where its right neighbour is no padding.
    counts = np.take_along_axis(there, order, axis=1)[:, 1:]
    ratio = (np.diff(ordered, axis=2) ** 2 * counts).sum(axis=(1, 2)) / (drawn**2).sum(axis=(1, 2))
    return float((1 + (ratio[1:] <= ratio[0]).sum()) / (1 + MISFIT_DRAWS))


def _tangents(ladder: Ladder, fits: CurveFits) -> Array:
    """Columns [B W, 3 B + 2] of what small changes of coefficients and steepness add to the weighted losses."""
    budgets, width = ladder.offset.shape
    f1, f2 = (f[0] for f in _bases(fits.steepness, ladder.offset))
    own = np.stack([np.ones_like(f1), f1, f2], axis=-1) * ladder.weight[..., None]
    columns = np.zeros((budgets, width, parameters(budgets)))
    for index in range(budgets):
        columns[index, :, 3 * index : 3 * index + 3] = own[index]
    for side in range(2):
        moved = fits.steepness.copy()
        moved[:, side] *= 1 + 1e-5
        bent = (a[0] - b for a, b in zip(_bases(moved, ladder.offset), (f1, f2), strict=True))
        change = sum(c[:, None] * f for c, f in zip(fits.coefficients[0].T[1:], bent, strict=True))
        columns[..., side - 2] = change / (fits.steepness[0, side] * 1e-5) * ladder.weight
    return columns.reshape(budgets * width, -1)


def parameters(budgets: int) -> int:
    """Numbers that are fitted to that many budgets."""
    return 3 * budgets + 2


def _step(ladder: Ladder, losses: Array, steepness: Array, residual: Array, damping: Array) -> Array:
    slopes = []
    for side in range(2):
        moved = steepness.copy()
        width = 1e-5 * np.maximum(moved[:, side], 0.01)
        moved[:, side] += width
        slopes.append(((_project(ladder, moved, losses)[1] - residual) / width[:, None, None]).reshape(len(losses), -1))
    jacobian = np.stack(slopes, axis=-1)
    normal = np.einsum("snk,snl->skl", jacobian, jacobian)
    gradient = np.einsum("snk,sn->sk", jacobian, residual.reshape(len(losses), -1))
    diagonal = np.einsum("skk->sk", normal) + 1e-300
    normal = normal + (damping[:, None] * diagonal + 1e-30)[:, :, None] * np.eye(2)
    return np.asarray(-np.linalg.solve(normal, gradient[..., None])[..., 0])


def _bases(steepness: Array, offset: Array) -> tuple[Array, Array]:
    """Two functions [S, B, W] of offsets [B, W] that go to u and u² as α, β [S, 2] go to 0: of the exponentials'
    (e^(βu) - 1)/β and (1 - e^(-αu))/α half the sum, and the difference over half of α + β."""
    alpha, beta = steepness[..., 0, None, None], steepness[..., 1, None, None]
    left, right = -np.expm1(-alpha * offset) / alpha, np.expm1(beta * offset) / beta
    return (left + right) / 2, 2 * (right - left) / (alpha + beta)


def _project(ladder: Ladder, steepness: Array, losses: Array) -> tuple[Array, Array]:
    """Coefficients [S, B, 3] and weighted residuals [S, B, W] of the linear problem, by Gram-Schmidt."""

    def along(a: Array, b: Array) -> Array:
        return np.asarray((a * b).sum(axis=-1, keepdims=True))

    q0 = ladder.weight
    f1, f2 = (f * q0 for f in _bases(steepness, ladder.offset))
    n0 = along(q0, q0)
    g10, g20 = along(f1, q0) / n0, along(f2, q0) / n0
    q1 = f1 - g10 * q0
    n1 = along(q1, q1)
    q2 = f2 - g20 * q0
    g21 = along(q2, q1) / n1
    q2 = q2 - g21 * q1
    y0 = along(losses, q0) / n0
    residual = losses - y0 * q0
    y1 = along(residual, q1) / n1
    residual = residual - y1 * q1
    c2 = along(residual, q2) / along(q2, q2)
    residual = residual - c2 * q2
    c1 = y1 - g21 * c2
    return np.concatenate([y0 - g10 * c1 - g20 * c2, c1, c2], axis=-1), residual
