"""Weighted least squares and Huber regression of many data sets at once, in numpy.

One data set with 1000 resamples is a batch of 1000 problems that differ in their weights only, and so are the starts of
a grid and the folds of a cross-validation. Solved together they cost array operations, not 1000 calls of an optimiser.

Shape suffixes: S problems, P parameters, R rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
# theta_SP, weights_SR -> prediction_SR, jacobian_SPR
Curve = Callable[[Array, Array], tuple[Array, Array]]

MIN_DAMPING, MAX_DAMPING = 1e-12, 1e8


class Minimum(NamedTuple):
    """theta_SP; objective_S, the weighted sum of losses."""

    theta: Array
    objective: Array


def minimise(
    curve: Curve,
    observed: Array,
    weights: Array,
    start: Array,
    low: Array,
    high: Array,
    *,
    delta: float | None = None,
    steps: int = 200,
    tolerance: float = 1e-9,
) -> Minimum:
    """argmin over theta_SP in [low_P, high_P] of Σ_R weights_SR · ρ(curve(theta) - observed_R), for each problem S.

    ρ(r) = r²/2 without `delta`; else Huber's, r²/2 for |r| <= delta and delta·(|r| - delta/2) beyond (Huber, Annals of
    Mathematical Statistics 35, 1964). Levenberg–Marquardt (Marquardt, SIAM J. 11, 1963), for Huber's loss on its
    iteratively reweighted squares, which lie above it and touch it where the step starts: a step that lowers one lowers
    the other. A parameter on a bound that the gradient pushes outwards is held there. A problem is done when two
    accepted steps in a row change the objective by less than `tolerance` of itself, or none is accepted any more.
    """
    theta = np.clip(np.array(start, dtype=np.float64), low, high)
    count, size = theta.shape
    damping, calm = np.full(count, 1e-3), np.zeros(count, dtype=int)
    active = np.arange(count)
    prediction, jacobian = curve(theta, weights)
    residual = prediction - observed
    objective = _total(residual, weights, delta)
    eye = np.arange(size)
    for _ in range(steps):
        if not len(active):
            break
        w = weights[active]
        pull = w if delta is None else w * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        weighted = jacobian * pull[:, None, :]
        gradient = np.matmul(weighted, residual[:, :, None])[:, :, 0]
        hessian = np.matmul(weighted, jacobian.transpose(0, 2, 1))
        at = theta[active]
        held = ((at <= low) & (gradient > 0)) | ((at >= high) & (gradient < 0))
        gradient = np.where(held, 0.0, gradient)
        hessian = np.where(held[:, :, None] | held[:, None, :], 0.0, hessian)
        diagonal = hessian[:, eye, eye]
        # A parameter without influence (its rows weigh 0, its term vanished) gets no step instead of an endless one.
        floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-30
        hessian[:, eye, eye] = diagonal * (1 + damping[active, None]) + np.where(held | (diagonal < floor), 1.0, floor)
        step = -np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        tried = np.clip(at + step, low, high)
        new_prediction, new_jacobian = curve(tried, w)
        new_residual = new_prediction - observed
        new_objective = _total(new_residual, w, delta)
        better = new_objective < objective[active]
        gain = np.where(better, objective[active] - new_objective, 0.0)
        small = gain <= tolerance * np.abs(objective[active])
        calm[active] = np.where(better & ~small, 0, calm[active] + (better & small))
        theta[active] = np.where(better[:, None], tried, at)
        objective[active] = np.where(better, new_objective, objective[active])
        residual = np.where(better[:, None], new_residual, residual)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        damping[active] = np.where(better, np.maximum(damping[active] / 5, MIN_DAMPING), damping[active] * 6)
        done = (calm[active] >= 2) | (damping[active] > MAX_DAMPING)
        active, residual, jacobian = active[~done], residual[~done], jacobian[~done]
    return Minimum(theta, objective)


def _total(residual: Array, weights: Array, delta: float | None) -> Array:
    # An infinite prediction (a step far out) is a bad step, not an error.
    with np.errstate(over="ignore"):
        loss = 0.5 * residual * residual
    if delta is not None:
        size = np.abs(residual)
        loss = np.where(size <= delta, loss, delta * (size - 0.5 * delta))
    return np.nan_to_num((weights * loss).sum(axis=1), nan=np.inf, posinf=np.inf)
