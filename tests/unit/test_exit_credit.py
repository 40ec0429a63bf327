"""What an exit costs, against enumeration: the expected cost of outcomes is differentiated by every hazard, by autograd
through the exit distribution, and the depth of one position is replaced and the whole answer's cost computed anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ee_megatron.exits import ExitLayout, exit_distribution
from ee_megatron.learner.batch import ReplayBatch, pack
from ee_megatron.objectives.depth import DEPTH_COSTS, hazard_costs

LAYOUT = ExitLayout(8, (2, 4, 6))
EXITS = len(LAYOUT.depths)
COST_LENGTH = 5
QUICK = settings(suppress_health_check=[HealthCheck.too_slow])
SUMS = ("mean", "total")


def batch_of(answers: list[list[int]], prompts: list[int] | None = None) -> ReplayBatch:
    """Answers by the outcomes of their tokens after the first, which always has full depth."""
    depths = [np.array([LAYOUT.num_layers, *(LAYOUT.outcomes[i] for i in outcomes)]) for outcomes in answers]
    lengths = prompts or [3] * len(answers)
    return pack([np.arange(n) for n in lengths], [np.arange(len(d)) for d in depths], depths, LAYOUT.num_layers)


def at_gates(batch: ReplayBatch, values: Tensor) -> Tensor:
    """One value per token at which gates decide, in order, put where its position is; 0 elsewhere."""
    placed = values.new_zeros(*batch.gate_mask.shape, *values.shape[1:])
    placed[batch.gate_mask] = values
    return placed


def outcomes_of(batch: ReplayBatch) -> Tensor:
    """Of every position at which gates decide, in order."""
    depths = batch.exit_depths[batch.gate_mask]
    return (depths.unsqueeze(-1) == depths.new_tensor(LAYOUT.outcomes)).int().argmax(-1)


def slope_of_expected_cost(hazards: Tensor, costs: Tensor) -> Tensor:
    """d/ds of sum_i q_i(s) C_i, [..., M]: by autograd through all outcomes."""
    leaf = hazards.double().clone().requires_grad_()
    (exit_distribution(leaf) * costs.double()).sum().backward()
    assert leaf.grad is not None
    return leaf.grad.float()


drawn_answers = st.lists(st.lists(st.integers(0, EXITS), min_size=0, max_size=6), min_size=1, max_size=6)
with_a_decision = drawn_answers.filter(any)
drawn_costs = st.sampled_from(sorted(DEPTH_COSTS))


def of_outcomes(batch: ReplayBatch, costs: Tensor) -> Tensor:
    """Costs [gated, M + 1] as far as a position came, NaN behind its outcome and where no gate decides."""
    behind = torch.arange(EXITS + 1) > outcomes_of(batch).unsqueeze(-1)
    return at_gates(batch, costs.masked_fill(behind, torch.nan)).where(batch.gate_mask.unsqueeze(-1), torch.nan)


def priced(batch: ReplayBatch, kind: str) -> Tensor:
    return DEPTH_COSTS[kind].of_outcomes(batch, LAYOUT, COST_LENGTH)


def drawn_numbers(batch: ReplayBatch, seed: int, *last: int) -> Tensor:
    return torch.rand(*batch.tokens.shape, *last, generator=torch.Generator().manual_seed(seed))


# Hazards 1/2, 1/4 and 1/3: of eight positions four, one, one and two take the outcomes, which is their distribution.
EXACT_HAZARDS = torch.tensor([1 / 2, 1 / 4, 1 / 3])
EXACT_OUTCOMES = [[0, 0, 3, 1], [3, 0, 2, 0]]


@pytest.mark.parametrize("hazards_known", [False, True])
@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("divergences", [None, (0.9, 0.1, -0.3, 0.05)])
def test_with_outcomes_in_proportion_the_weights_add_up_to_the_slope_of_the_expected_cost(
    hazards_known, divergences, of_all
):
    """No sampling is left, so exactly, whatever an outcome costs."""
    batch = batch_of(EXACT_OUTCOMES)
    price = torch.tensor([0.1, 0.7, 0.4, 1.0])
    by_outcome = torch.tensor(divergences or [0.0] * 4)
    own = None if divergences is None else at_gates(batch, by_outcome[outcomes_of(batch)])
    if of_all and own is not None:
        own = of_outcomes(batch, by_outcome.expand(8, -1))
    hazards = at_gates(batch, EXACT_HAZARDS.expand(8, -1)) if hazards_known else None
    found = hazard_costs(batch, LAYOUT, price.expand(*batch.tokens.shape, -1), own, hazards)
    expected = slope_of_expected_cost(EXACT_HAZARDS, price + by_outcome)
    torch.testing.assert_close(found.sum((0, 1)) / 8, expected, rtol=1e-5, atol=1e-6)


def test_positions_are_compared_with_those_of_about_the_same_hazard():
    """What going on costs is taken from the same kind of position, not from all of them alike."""
    outcomes = torch.tensor([0, 1] * 200 + [0, 3] * 200)
    hazards = torch.tensor([[0.2, 0.5, 0.5]] * 400 + [[0.8, 0.5, 0.5]] * 400)
    batch = batch_of(outcomes.view(20, 40).tolist())
    costs = torch.tensor([0.0, 0.5, 0.75, 1.0]).expand(*batch.tokens.shape, -1)
    apart = hazard_costs(batch, LAYOUT, costs, None, at_gates(batch, hazards))[batch.gate_mask][:, 0]
    alike = hazard_costs(batch, LAYOUT, costs, None, None)[batch.gate_mask][:, 0]
    first, second = apart[:400][outcomes[:400] == 0], apart[400:][outcomes[400:] == 0]
    assert first.mean().item() == pytest.approx(-0.5, abs=0.02) and second.mean().item() == pytest.approx(-1, abs=0.02)
    torch.testing.assert_close(alike[outcomes == 0], torch.full((400,), -0.75))


@pytest.mark.parametrize("broken", [slice(None), slice(0, 7)], ids=["all", "some"])
def test_hazards_of_a_policy_that_has_diverged_are_no_error_here(broken):
    """Its update says so, by a gradient that is not finite; what exits cost stays a number."""
    outcomes = torch.tensor([0, 1, 3, 3] * 10)
    batch = batch_of(outcomes.view(10, 4).tolist())
    hazards = torch.linspace(0.1, 0.9, 40).unsqueeze(-1).repeat(1, EXITS)
    hazards[broken] = torch.nan
    costs = torch.tensor([0.0, 0.5, 0.75, 1.0]).expand(*batch.tokens.shape, -1)
    found = hazard_costs(batch, LAYOUT, costs, None, at_gates(batch, hazards))
    assert found.isfinite().all()
    assert (found[batch.gate_mask][:, 0] < 0).all()


@QUICK
@given(with_a_decision, drawn_costs, st.booleans(), st.booleans(), st.integers(0, 99))
def test_gates_that_a_position_does_not_come_by_cost_nothing(answers, kind, with_divergence, known, seed):
    batch = batch_of(answers, prompts=[2 + i for i in range(len(answers))])
    own = drawn_numbers(batch, seed) if with_divergence else None
    hazards = drawn_numbers(batch, seed + 1, EXITS) if known else None
    of_all = of_outcomes(batch, drawn_numbers(batch, seed, EXITS + 1)[batch.gate_mask])
    reached = batch.gate_mask.unsqueeze(-1) & (batch.exit_depths.unsqueeze(-1) >= torch.tensor(LAYOUT.depths))
    for divergence in (own, of_all):
        found = hazard_costs(batch, LAYOUT, priced(batch, kind), divergence, hazards)
        assert not found[~reached].any() and found.isfinite().all()


def test_a_gate_that_never_fired_is_taught_by_the_price_but_not_beside_a_divergence():
    """Nothing is known of what its exit does to the next token."""
    batch = batch_of([[1, 3], [3, 1, 3]])
    own = at_gates(batch, torch.tensor([0.3, 0.1, 0.2, 0.6, 0.0]))
    costs = priced(batch, "mean")
    price_only, both = (hazard_costs(batch, LAYOUT, costs, d, None)[batch.gate_mask] for d in (None, own))
    assert (price_only[:, 0] < 0).all() and not both[:, 0].any()
    # Unless it is read: 1 nat at every exit, and going on costs what it did.
    read = hazard_costs(batch, LAYOUT, costs, of_outcomes(batch, torch.ones(5, EXITS + 1)), None)[batch.gate_mask]
    torch.testing.assert_close(read, price_only)
    went_on = outcomes_of(batch) == 3
    assert (price_only[went_on, 2] < 0).all() and not both[:, 2].any()
    assert both[:, 1].all()


@pytest.mark.parametrize("kind", sorted(DEPTH_COSTS))
@QUICK
@given(answers=with_a_decision)
def test_the_cost_of_an_outcome_is_the_answer_s_with_the_position_s_depth_replaced(kind, answers):
    """Up to what doesn't depend on the outcome."""
    batch, cost = batch_of(answers), DEPTH_COSTS[kind]
    found, before = priced(batch, kind), cost.of_answers(batch, LAYOUT.num_layers, COST_LENGTH)
    taken = outcomes_of(batch)
    for (row, position), now in zip(batch.gate_mask.nonzero().tolist(), taken.tolist(), strict=True):
        for outcome, depth in enumerate(LAYOUT.outcomes):
            depths = batch.exit_depths.clone()
            depths[row, position] = depth
            after = cost.of_answers(replace(batch, exit_depths=depths), LAYOUT.num_layers, COST_LENGTH)
            difference = found[row, position, outcome] - found[row, position, now]
            assert difference.item() == pytest.approx(float(after[row] - before[row]), abs=1e-6)


@pytest.mark.parametrize("kind", SUMS)
@QUICK
@given(answers=drawn_answers)
def test_the_first_token_bears_the_whole_cost_and_each_of_the_others_what_is_left(kind, answers):
    batch, cost = batch_of(answers, prompts=[2 + i for i in range(len(answers))]), DEPTH_COSTS[kind]
    to_go = cost.to_go(batch, LAYOUT.num_layers, COST_LENGTH)
    first = batch.loss_mask.int().argmax(1, keepdim=True)
    whole = cost.of_answers(batch, LAYOUT.num_layers, COST_LENGTH)
    torch.testing.assert_close(to_go.gather(1, first).squeeze(1), whole)
    for row, counted in enumerate(batch.loss_mask):
        mine = to_go[row][counted].tolist()
        share = [d / LAYOUT.num_layers for d in batch.exit_depths[row][counted]]
        divisor = COST_LENGTH if kind == "total" else len(mine)
        for here, after, own in zip(mine, [*mine[1:], 0.0], share, strict=True):
            assert here - after == pytest.approx(float(own) / divisor, abs=1e-5)
