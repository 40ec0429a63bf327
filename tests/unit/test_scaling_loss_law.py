"""The loss law is recovered from data that follow it; both estimators reach the minimum that other methods reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ee_megatron.scaling import fit as fitting
from ee_megatron.scaling.fit import LawFit, best_of_grid, fit_law, held_out_errors
from ee_megatron.scaling.loss_law import HUBER_DELTA, Design, huber, non_negative, predict, variable_projection
from ee_megatron.scaling.table import Observations
from tests.scaling_samples import CHINCHILLA, EXPONENT_A, grid, noisy


def point(obs: Observations, method: str) -> np.ndarray:
    design = Design.of(obs.params, obs.tokens, obs.loss)
    return best_of_grid(design, fitting._solver(design, method), np.ones(len(obs.loss))).values[0]


@pytest.mark.parametrize("method", ["huber", "varpro"])
@pytest.mark.parametrize("law", [CHINCHILLA[0], [2.2, 30.0, 3000.0, 0.2, 0.45], [0.5, 5e4, 60.0, 0.6, 0.15]])
def test_a_law_without_noise_is_recovered(method: str, law) -> None:
    n, d = grid(6, 6)
    loss = predict(np.array([law]), n, d)[0]
    found = point(Observations(n, d, 6 * n * d, loss, np.arange(36)), method)
    assert np.allclose(found, law, rtol=0.02), found


def test_loss_falls_with_size_and_tokens_towards_e() -> None:
    n, d = np.array([1e8, 1e9, 1e8, 1e40]), np.array([1e10, 1e10, 1e11, 1e40])
    small, larger, longer, limit = predict(CHINCHILLA, n, d)[0]
    assert larger < small and longer < small and limit == pytest.approx(1.69, abs=1e-6)
    assert small == pytest.approx(1.69 + 406.4 / 1e8**0.34 + 410.7 / 1e10**0.28)


def test_variable_projection_reaches_the_minimum_of_a_dense_grid_of_exponents() -> None:
    obs = noisy(3, 6, 5, 0.02)
    alpha, beta = point(obs, "varpro")[3:]

    def error(a: float, b: float) -> float:
        terms = np.stack([np.ones(30), (obs.params / 1e9) ** -a, (obs.tokens / 1e10) ** -b]) / obs.loss
        c = np.linalg.lstsq(terms.T, np.ones(30), rcond=None)[0]
        return float(((c @ terms - 1) ** 2).sum()) if (c >= 0).all() else np.inf

    axis = np.arange(0.05, 0.9, 0.01)
    table = np.array([[error(a, b) for b in axis] for a in axis])
    i, j = np.unravel_index(table.argmin(), table.shape)
    fine = [
        (error(a, b), a, b)
        for a in axis[i] + np.linspace(-0.01, 0.01, 21)
        for b in axis[j] + np.linspace(-0.01, 0.01, 21)
    ]
    least, a, b = min(fine)
    assert error(alpha, beta) <= least * (1 + 1e-9)
    assert alpha == pytest.approx(a, abs=2e-3) and beta == pytest.approx(b, abs=2e-3)


def test_huber_reaches_the_minimum_that_lbfgs_finds_from_many_starts() -> None:
    obs = noisy(4, 6, 5, 0.02)
    n, d, y = (torch.tensor(np.log(v)) for v in (obs.params, obs.tokens, obs.loss))

    def objective(theta: torch.Tensor) -> torch.Tensor:
        a, b, e, alpha, beta = theta
        terms = torch.stack([a - alpha * n, b - beta * d, e.expand(len(n))])
        return torch.nn.functional.huber_loss(terms.logsumexp(0), y, delta=HUBER_DELTA, reduction="sum")

    def lbfgs(start: list[float]) -> float:
        theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [theta], max_iter=300, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            value = objective(theta) * 1e3
            value.backward()
            return value

        optimiser.step(closure)
        return float(objective(theta.detach()))

    starts = [[a, b, 0.5, x, z] for a in (5.0, 8.0) for b in (5.0, 8.0) for x in (0.3, 0.5) for z in (0.3, 0.5)]
    e, a, b, alpha, beta = point(obs, "huber")
    ours = float(objective(torch.tensor([np.log(a), np.log(b), np.log(e), alpha, beta])))
    assert ours <= min(lbfgs(start) for start in starts) * (1 + 1e-3)


def test_huber_withstands_a_diverged_run_that_moves_least_squares() -> None:
    obs = noisy(5, 6, 6, 0.003)
    loss = obs.loss.copy()
    loss[[8, 22]] *= 1.6
    broken = Observations(obs.params, obs.tokens, obs.flops, loss, obs.runs)
    robust, squares = (point(broken, m)[3:] - CHINCHILLA[0, 3:] for m in ("huber", "varpro"))
    assert np.abs(robust).max() < 0.04 < np.abs(squares).max()


def test_other_units_change_the_coefficients_and_nothing_else() -> None:
    obs = noisy(6)
    e, a, b, alpha, beta = point(obs, "varpro")
    millions = Observations(obs.params / 1e6, obs.tokens / 1e9, obs.flops, obs.loss, obs.runs)
    assert np.allclose(point(millions, "varpro"), [e, a * 1e6**-alpha, b * 1e9**-beta, alpha, beta], rtol=1e-4)


def test_non_negative_least_squares_satisfies_the_optimality_conditions() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(300, 3, 5))
    gram, moment = root @ root.transpose(0, 2, 1), rng.normal(size=(300, 3))
    c = non_negative(gram, moment)
    slope = (gram @ c[:, :, None])[:, :, 0] - moment
    assert (c >= 0).all() and (slope >= -1e-6).all() and np.abs(slope * c).max() < 1e-6
    assert (c == 0).any() and (c > 0).all(axis=1).any(), "both kinds of solution occur"


def test_weights_mean_repeated_rows() -> None:
    obs = noisy(7, 5, 5)
    design = Design.of(obs.params, obs.tokens, obs.loss)
    counts = np.random.default_rng(1).integers(0, 4, 25)
    rows = np.repeat(np.arange(25), counts)
    again = Design(design.size[rows], design.tokens[rows], design.log_loss[rows], design.mean_size, design.mean_tokens)
    start = CHINCHILLA.copy()
    for solve, begin in ((variable_projection, start[:, 3:]), (huber, start)):
        weighted = solve(design, counts[None].astype(float), begin).values
        assert np.allclose(weighted, solve(again, np.ones((1, len(rows))), begin).values, rtol=2e-3)


def test_exponent_a_and_g_are_where_the_loss_is_least_at_given_flops() -> None:
    found = fit_law(noisy(8), "varpro", 200, 0)
    law = np.array([[found.values[k] for k in ("E", "A", "B", "alpha", "beta")]])
    n = np.geomspace(1e7, 1e11, 200001)
    for flops in (1e19, 1e21):
        best = n[predict(law, n, flops / (6 * n))[0].argmin()]
        formula = found.values["coefficient_G"] * (flops / 6) ** found.values["exponent_a"]
        assert best == pytest.approx(formula, rel=1e-3)
    assert found.intervals["exponent_a"].low < EXPONENT_A < found.intervals["exponent_a"].high


@pytest.mark.parametrize("method", ["huber", "varpro"])
def test_intervals_contain_the_estimate_and_shrink_with_the_noise(method: str) -> None:
    loud, quiet = (fit_law(noisy(9, sd=sd), method, 200, 0) for sd in (0.02, 0.002))
    for found in (loud, quiet):
        for name, value in found.values.items():
            assert found.intervals[name].low < value < found.intervals[name].high
    width = {id(f): f.intervals["alpha"].high - f.intervals["alpha"].low for f in (loud, quiet)}
    assert 4 < width[id(loud)] / width[id(quiet)] < 25


def test_runs_with_shared_noise_have_wider_intervals_than_their_rows_would_claim() -> None:
    shared = noisy(10, 6, 6, sd=0.002, rows=4, run_sd=0.015)
    rows = Observations(shared.params, shared.tokens, shared.flops, shared.loss, np.arange(len(shared.loss)))
    widths = [_width(fit_law(obs, "varpro", 300, 0)) for obs in (shared, rows)]
    assert widths[0] > 1.5 * widths[1]


def _width(found: LawFit) -> float:
    return found.intervals["alpha"].high - found.intervals["alpha"].low


def test_the_same_seed_gives_the_same_intervals_and_another_gives_others() -> None:
    obs = noisy(11, 5, 5)
    first, again, other = (fit_law(obs, "varpro", 200, seed) for seed in (1, 1, 2))
    assert first.intervals == again.intervals != other.intervals


def test_held_out_rows_are_not_fitted() -> None:
    obs = noisy(12, 6, 6, 0.001)
    loss = np.where(obs.params == obs.params.max(), obs.loss * 1.2, obs.loss)
    shifted = Observations(obs.params, obs.tokens, obs.flops, loss, obs.runs)
    design = Design.of(shifted.params, shifted.tokens, shifted.loss)
    largest, folds = held_out_errors(shifted, design, fitting._solver(design, "varpro"), 0)
    assert largest.error == pytest.approx(np.log(1.2), abs=0.02) and "largest" in largest.how
    assert (
        folds.error is not None
        and folds.constant is not None
        and folds.error < 0.6 * largest.error < folds.constant * 2
    )


def test_a_held_out_error_that_cannot_be_had_says_why() -> None:
    obs = noisy(13, 3, 6)
    design = Design.of(obs.params, obs.tokens, obs.loss)
    largest, folds = held_out_errors(obs, design, fitting._solver(design, "varpro"), 0)
    assert largest.error is None and "sizes" in largest.how and folds.error is not None
