"""The batched solver finds what an exact or an exhaustive method finds, problem by problem."""

from __future__ import annotations

import numpy as np

from ee_megatron.scaling.solver import minimise

FREE = (np.full(2, -np.inf), np.full(2, np.inf))
X = np.linspace(-1, 1, 15)
DESIGN = np.stack([np.ones_like(X), X])


def line(theta, weights):
    return theta @ DESIGN, np.broadcast_to(DESIGN, (len(theta), *DESIGN.shape))


def exponential(theta, weights):
    value = np.exp(theta @ DESIGN)
    return value, value[:, None] * DESIGN


def test_weighted_least_squares_of_many_problems_are_each_problems_own() -> None:
    rng = np.random.default_rng(0)
    y, weights = rng.normal(size=15), rng.integers(0, 3, (20, 15)).astype(float)
    found = minimise(line, y, weights, np.zeros((20, 2)), *FREE).theta
    for w, theta in zip(weights, found, strict=True):
        root = np.sqrt(w)
        assert np.allclose(theta, np.linalg.lstsq((DESIGN * root).T, y * root, rcond=None)[0], atol=1e-6)


def test_a_curved_problem_is_solved_from_afar() -> None:
    y = np.exp(0.5 - 1.5 * X)
    found = minimise(exponential, y, np.ones((3, 15)), np.array([[0.0, 0.0], [3.0, 2.0], [-4.0, 1.0]]), *FREE)
    assert np.allclose(found.theta, [0.5, -1.5], atol=1e-6)


def test_huber_ignores_outliers_as_an_exhaustive_search_does() -> None:
    y = 1 + 2 * X + np.random.default_rng(1).normal(0, 0.02, 15)
    y[[2, 9]] += 5
    delta = 0.05
    found = minimise(line, y, np.ones((1, 15)), np.zeros((1, 2)), *FREE, delta=delta, steps=2000, tolerance=1e-12)
    axes = np.linspace(0.9, 1.1, 401), np.linspace(1.8, 2.2, 401)
    a, b = (m.ravel()[:, None] for m in np.meshgrid(*axes, indexing="ij"))
    size = np.abs(a + b * X - y)
    loss = np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=1)
    best = loss.argmin()
    assert found.objective[0] <= loss[best] + 1e-12
    assert np.allclose(found.theta[0], [a[best, 0], b[best, 0]], atol=2e-3)
    assert abs(np.polyfit(X, y, 1)[1] - 1) > 0.3, "least squares is pulled away, so the test can tell"


def test_a_bound_holds_and_the_other_parameter_takes_its_best_value_there() -> None:
    y = 1 - 2 * X
    low, high = np.array([-np.inf, 0.0]), np.full(2, np.inf)
    found = minimise(line, y + X**2, np.ones((1, 15)), np.array([[0.0, 1.0]]), low, high)
    assert found.theta[0, 1] == 0 and np.isclose(found.theta[0, 0], (y + X**2).mean())


def test_a_start_that_overflows_is_an_error_of_that_problem_only() -> None:
    y = np.exp(0.5 - 1.5 * X)
    with np.errstate(over="ignore", invalid="ignore"):
        found = minimise(exponential, y, np.ones((2, 15)), np.array([[0.0, 0.0], [400.0, 0.0]]), *FREE)
    assert np.allclose(found.theta[0], [0.5, -1.5], atol=1e-6) and found.objective[1] > found.objective[0]
