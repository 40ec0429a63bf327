"""What a step's rollouts teach: advantages and costs by hand, and which answers count."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ee_megatron.config.schema import (
    AccuracyTarget,
    DepthPenalty,
    ExitCredit,
    Importance,
    KLPenalty,
    Loss,
    RLConfig,
    RunConfig,
)
from ee_megatron.exits import ExitLayout
from ee_megatron.learner.batch import spread
from ee_megatron.learner.learner import Scores, Update
from ee_megatron.learner.packing import PackingStats
from ee_megatron.objectives.advantages import ADVANTAGES
from ee_megatron.objectives.depth import hazard_costs
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.objectives.schedules import LAMBDA_GAIN, LAMBDA_MAX
from ee_megatron.policy import PolicySpec
from ee_megatron.training import reinforce
from ee_megatron.training.advantages import StepScores, collate, compute_advantages, filter_groups, loss_included
from ee_megatron.training.reinforce import LambdaController
from ee_megatron.training.rl_metrics import advantage_metrics, rollout_metrics
from ee_megatron.training.update import LogprobDiff, objective_of
from ee_megatron.types import ExitReading
from tests.by_hand import a_group

LAYOUT = ExitLayout(6, (2, 4))
LONGEST = 10
QUICK = settings(suppress_health_check=[HealthCheck.too_slow])


def rl_of(depth=0.0, kl=0.0, loss=None, **fields) -> RLConfig:
    """`depth`, `kl`: the section, or its weight alone."""
    sections = [section if isinstance(section, dict) else {"weight": section} for section in (depth, kl)]
    return RLConfig(
        depth_penalty=DepthPenalty(**sections[0]),
        kl_penalty=KLPenalty(**sections[1]),
        loss=Loss(**loss or {}),
        **fields,
    )


def but(rl: RLConfig, **changed) -> RLConfig:
    """Other fields, or others of a section."""
    return replace(rl, **{k: replace(getattr(rl, k), **v) if isinstance(v, dict) else v for k, v in changed.items()})


def scores(batch, tokens=None, exits=None) -> Scores:
    zero = torch.zeros(batch.tokens.shape)
    tokens = torch.where(batch.loss_mask, -1.0, 0.0) if tokens is None else tokens
    return Scores(tokens, zero if exits is None else exits, zero, zero, zero, torch.zeros(*tokens.shape, 2))


def credit(batch, groups, first, reference, rl, lambda_depth):
    """-> (experience, metrics)"""
    found = compute_advantages(batch, groups, StepScores(first, reference), rl, LAYOUT, lambda_depth=lambda_depth)
    return found.experience, advantage_metrics(batch, found, lambda_depth)


def weights_of(groups, rl, now=None, reference=None):
    batch = collate(groups, 6)
    first = scores(batch)
    known = (reference or first).token_logprobs
    experience, values = credit(batch, groups, first, known, rl, rl.depth_penalty.weight)
    current = now(batch) if now else first
    weights, share = objective_of(rl, LONGEST).weights(batch, experience, current.token_logprobs, current.exit_logprobs)
    return batch, weights, experience, values | rollout_metrics(batch, groups, 6), share


def test_shallower_answers_of_equal_worth_are_pushed_up():
    """The gradient weights: with equal task reward the deep answer's tokens and exits go down, the shallow one's up."""
    groups = [a_group([6, 2, 2], [6, 6, 6])]
    _, weights, _, values, _ = weights_of(groups, rl_of(depth=0.5))
    gap = 0.5 * (18 - 10) / 18
    assert weights.token[0].sum().item() == pytest.approx(gap / 2)
    assert weights.token[1].sum().item() == pytest.approx(-gap / 2)
    assert weights.exit[0].sum().item() == pytest.approx(gap / 2 * 2 / 3)
    assert values["importance_ratio_mean"] == pytest.approx(1.0) and values["mean_depth"] == pytest.approx(28 / 36)
    assert not weights_of(groups, rl_of())[1].token.any()


@pytest.mark.parametrize("of_sums", [False, True])
def test_the_paper_s_reward_by_hand(of_sums):
    """R = r_task - beta * mean(log pi - log pi_ref) - lambda * mean(depth / L), and its leave-one-out advantage; or the
    sum of the log ratios, over three tokens and two."""
    groups = [a_group([6, 2, 2], [6, 6], rewards=[1, 0.5])]
    plain = collate(groups, 6)
    # log pi is -1 everywhere, so the two log ratios are 0.2 and 0.7.
    reference = scores(plain, tokens=torch.tensor([[-1.2], [-1.7]]).expand(plain.tokens.shape))
    rl = rl_of(depth=0.4, kl=dict(weight=0.1, kind="reward_sum" if of_sums else "reward"))
    _, _, experience, values, _ = weights_of(groups, rl, reference=reference)
    tokens = (3, 2) if of_sums else (1, 1)
    first, second = 1 - 0.1 * tokens[0] * 0.2 - 0.4 * 10 / 18, 0.5 - 0.1 * tokens[1] * 0.7 - 0.4
    assert values["reward"] == pytest.approx((first + second) / 2)
    # The metric stays a mean, comparable whatever the reward holds.
    assert values["kl_to_reference"] == pytest.approx(0.45)
    for advantage in (experience.token_advantage, experience.exit_advantage):
        assert advantage.amax(1)[0].item() == pytest.approx(first - second)
        assert advantage.amin(1)[1].item() == pytest.approx(second - first)


def test_where_all_are_told_where_to_leave_no_gate_learns():
    groups = [a_group([6, 2, 2], [6, 2], rewards=[1, 0])]
    batch = collate(groups, 6, gates=False)
    assert not batch.gate_mask.any() and batch.exit_depths.equal(collate(groups, 6).exit_depths)
    rl = rl_of(fixed_depth=2, depth=0.5)
    # What the gates would have said of the exits that were taken plays no part.
    for rollout in groups[0].rollouts:
        rollout.exit_logprobs[:] = -30.0
    experience, values = credit(batch, groups, scores(batch), None, rl, 0.0)
    assert values["importance_ratio_max"] == 1 and (experience.token_importance == 1).all()
    assert LogprobDiff.of(batch, groups[0].rollouts, scores(batch)).exit == 0
    weights, _ = objective_of(rl, LONGEST).weights(batch, experience, scores(batch).token_logprobs, torch.zeros(()))
    assert not weights.exit.any() and weights.token.any()


def test_the_exact_kl_is_weighed_once_and_not_charged_twice():
    """beta, each answer's tokens sharing 1/n of it; the reward then has no KL in it."""
    groups = [a_group([6, 2, 2], [6, 6])]
    plain = collate(groups, 6)
    far = scores(plain, tokens=torch.full(plain.tokens.shape, -9.0))
    rl = rl_of(kl=dict(weight=0.8, kind="exact"))
    batch, weights, experience, _, _ = weights_of(groups, rl, reference=far)
    assert objective_of(rl, LONGEST).kl.teacher is Teacher.REFERENCE
    assert weights.divergence is not None and weights.divergence.sum(1).tolist() == pytest.approx([0.4, 0.4])
    assert (weights.divergence > 0).equal(batch.loss_mask) and not experience.token_advantage.any()
    assert weights_of(groups, rl_of(kl=dict(weight=0.8, kind="reward")), reference=far)[1].divergence is None


def test_a_token_answers_for_the_depth_from_it_on():
    """Per-token credit by hand: cost to go against the other answer's at the same token, nothing past an end."""
    rl = rl_of(
        group_size=2, depth=dict(weight=0.6, credit="token", cost="total", cost_tokens=2), loss=dict(advantage="mean")
    )
    _, _, experience, _, _ = weights_of([a_group([6, 2, 4], [6, 6])], rl)
    first, second = np.array([12, 6, 4]) / 12, np.array([12, 6, 0]) / 12
    found = experience.token_advantage
    assert torch.equal(found, experience.exit_advantage)
    assert found[0, 2:5].tolist() == pytest.approx((0.6 * (second - first)).tolist())
    assert found[1, 2:4].tolist() == pytest.approx((0.6 * (first - second))[:2].tolist())
    assert found[1, 4:].abs().sum() == 0 and found[:, :2].abs().sum() == 0


def test_kl_in_the_loss_pulls_towards_the_reference_and_leaves_the_reward_alone():
    groups = [a_group([6, 2], [6, 2], rewards=[1, 0])]
    higher = lambda batch: scores(batch, torch.where(batch.loss_mask, -0.5, 0.0))  # noqa: E731
    rl = rl_of(kl=dict(weight=0.3, kind="loss"), loss=dict(clip=0.0))
    batch, plain, _, _, _ = weights_of(groups, but(rl, kl_penalty=dict(weight=0.0)), now=higher)
    _, pulled, _, values, _ = weights_of(groups, rl, now=higher)
    slope = 0.3 * (1 - np.exp(-0.5)) / 4
    assert values["reward"] == pytest.approx(0.5)
    assert (plain.token - pulled.token)[batch.loss_mask].tolist() == pytest.approx([slope] * 4)


def test_positions_far_from_the_step_s_start_no_longer_count():
    groups = [a_group([6, 2], [6, 2], rewards=[1, 0])]
    moved = lambda batch: scores(batch, torch.where(batch.loss_mask, -0.5, 0.0))  # noqa: E731
    batch, weights, _, _, share = weights_of(
        groups,
        rl_of(loss=dict(clip=0.2)),
        now=moved,
    )
    assert not weights.token[0].any() and weights.token[1][batch.loss_mask[1]].abs().min() > 0
    assert share == pytest.approx(0.5)


def learned(groups, rl, first=True, **changed):
    """-> (batch, experience, metrics) at rl.depth_penalty.weight; `changed`: scores that are not the
    rollouts' own."""
    batch = collate(groups, 6)
    seen = replace(scores(batch), **changed) if first else None
    rl = replace(rl, group_size=len(groups[0].rollouts))
    return batch, *credit(batch, groups, seen, None, rl, rl.depth_penalty.weight)


def per_answer(batch, advantage) -> list[float]:
    """The advantage that all tokens of an answer share."""
    rows = [row[counted] for row, counted in zip(advantage, batch.loss_mask, strict=True)]
    assert all((row == row[0]).all() for row in rows)
    return [float(row[0]) for row in rows]


def test_with_charge_right_wrong_answers_neither_pay_nor_are_what_right_ones_are_compared_with():
    groups = [a_group([6, 2, 2], [6, 4, 4], [6, 6, 6], [6, 6], rewards=[1, 0.5, 0, 0], right=[1, 1, 0, 0])]
    groups += [a_group([6, 2], [6, 6], [6, 4], [6, 4], rewards=[0, 1, 0, 0], right=[0, 1, 0, 0])]
    rl = rl_of(depth=dict(weight=0.6, penalize="right"))
    batch, experience, values = learned(groups, rl)
    task = [1 - 0.5 / 3, 0.5 - 1 / 3, -0.5, -0.5, -1 / 3, 1, -1 / 3, -1 / 3]
    saved = 0.6 * (14 / 18 - 10 / 18)
    expected = [task[0] + saved, task[1] - saved, *task[2:]]
    assert per_answer(batch, experience.token_advantage) == pytest.approx(expected)
    assert torch.equal(experience.token_advantage, experience.exit_advantage)
    paid = 0.6 * np.mean([10 / 18, 14 / 18, 0, 0, 0, 1, 0, 0])
    assert values["reward"] == pytest.approx(2.5 / 8 - paid) and values["charged"] == pytest.approx(3 / 8)
    assert per_answer(
        batch, learned(groups, but(rl, depth_penalty=dict(penalize="all")))[1].token_advantage
    ) != pytest.approx(expected)


depths_of_wrong = st.lists(st.lists(st.sampled_from([2, 4, 6]), min_size=0, max_size=5), min_size=2, max_size=2)


@pytest.mark.parametrize("credit_kind", ["answer", "token", "exit"])
@QUICK
@given(wrong=depths_of_wrong)
def test_with_charge_right_nobody_s_advantage_depends_on_how_deep_wrong_answers_are(credit_kind, wrong):
    def found(depths, charge):
        answers = [[6, 2, 2], [6, *depths[0]], [6, 4, 4, 6], [6, *depths[1]]]
        group = a_group(*answers, rewards=[1, 0, 1, 0], right=[1, 0, 1, 0])
        rl = rl_of(
            depth=dict(weight=0.6, credit="answer" if credit_kind == "exit" else credit_kind, penalize=charge),
            exit_credit=ExitCredit() if credit_kind == "exit" else None,
        )
        batch, experience, _ = learned([group], rl)
        rows = zip(experience.token_advantage, batch.loss_mask, strict=True)
        return [row[counted].tolist() for row, counted in rows]

    full = [[6] * len(depths) for depths in wrong]
    one, two = found(wrong, "right"), found(full, "right")
    assert one == two and all(value == pytest.approx(-2 / 3) for row in (one[1], one[3]) for value in row)
    if wrong != full:
        assert found(wrong, "all") != found(full, "all")


def test_under_grpo_task_and_depth_are_each_measured_by_their_own_spread():
    """So the unit that depth costs are in doesn't matter, and depth counts as much where all answers are right."""
    depths = ([6, 2, 2], [6, 6, 6], [6, 4, 4], [6, 6, 4])
    rl = rl_of(depth=dict(weight=0.5, cost="total"), loss=dict(advantage="grpo"))
    found = {}
    for unit in (1, 10):
        group = a_group(*depths, rewards=[1, 0, 1, 0])
        batch, experience, _ = learned([group], but(rl, depth_penalty=dict(cost_tokens=unit)))
        found[unit] = per_answer(batch, experience.token_advantage)
    assert found[1] == pytest.approx(found[10], abs=5e-3)
    costs = np.array([[10, 18, 14, 16]]) / 6
    every = np.ones((1, 4), bool)
    task, depth = (ADVANTAGES["grpo"](values, every)[0] for values in (np.array([[1.0, 0, 1, 0]]), -costs))
    assert found[1] == pytest.approx((task + 0.5 * depth).tolist())
    batch, experience, _ = learned([a_group(*depths)], but(rl, depth_penalty=dict(cost_tokens=1)))
    assert per_answer(batch, experience.token_advantage) == pytest.approx((0.5 * depth).tolist())


def test_with_overlong_filter_a_cut_answer_counts_for_nobody():
    rl = rl_of(depth=0.5, loss=dict(overlong="filter"))
    rows = ([6, 2, 2], [6, 4], [6, 6, 6])
    whole = a_group(*rows[:2], rewards=[1, 0])
    for cut, reward in (([6, 2, 6, 2], 1), ([6, 6], 0)):
        groups = [a_group(*rows[:2], cut, rewards=[1, 0, reward], finished=[True, True, False])]
        batch, experience, values = learned(groups, rl)
        alone, without, _ = learned([whole], rl)
        expected = per_answer(alone, without.token_advantage)
        assert per_answer(batch, experience.token_advantage) == pytest.approx([*expected, 0])
        assert loss_included(groups, rl).tolist() == [True, True, False]
        assert values["filtered"] == pytest.approx(1 / 3) and values["charged"] == pytest.approx(2 / 3)
        assert loss_included(groups, but(rl, loss=dict(overlong="verdict"))).all()
        kept = per_answer(batch, learned(groups, but(rl, loss=dict(overlong="verdict")))[1].token_advantage)
        assert kept != pytest.approx([*expected, 0])


@pytest.mark.parametrize(("charge", "expected"), [("all", [0.7, 0.9, -0.2]), ("right", [0.7, 0.9, 0.0])])
def test_length_costs_its_price_per_cost_length_tokens(charge, expected):
    rl = rl_of(depth=dict(weight=0.0, length_weight=0.2, cost_tokens=2, penalize=charge), loss=dict(advantage="none"))
    groups = [a_group([6, 2, 2], [6], [6, 4], rewards=[1, 1, 0], right=[1, 1, 0])]
    batch, experience, _ = learned(groups, rl)
    assert per_answer(batch, experience.token_advantage) == pytest.approx(expected)


def test_with_credit_exit_tokens_answer_for_task_and_depth_and_exits_for_a_share_of_the_task():
    groups = [a_group([6, 2, 2], [6, 6, 6], rewards=[1, 0])]
    rl = rl_of(depth=0.6, exit_credit=ExitCredit(task_weight=0.25))
    batch, experience, _ = learned(groups, rl)
    saved = 0.6 * 8 / 18
    assert per_answer(batch, experience.token_advantage) == pytest.approx([1 + saved, -1 - saved])
    assert per_answer(batch, experience.exit_advantage) == pytest.approx([0.25, -0.25])
    assert learned(groups, replace(rl, exit_credit=None))[1].firing_cost is None


# Of two answers of three tokens, asked outcomes: depths 2 and 4, 6 and 2.
TWO = ([6, 2, 4], [6, 6, 2])
# What firing costs more than going on, by gate, in units of a layer. Going on at 2 leads to 4 and 6 alike often.
LAYERS_SAVED = [[-3, 0], [-2, -2], [-4, -2], [-3, 0]]


@pytest.mark.parametrize("skip", [False, True])
def test_with_credit_exit_gates_pay_for_the_layers_of_their_own_token(skip):
    """mean over the tokens of an answer: what the loss divides by is multiplied in."""
    rl = rl_of(depth=0.6, exit_credit=ExitCredit())
    batch, experience, _ = learned([a_group(*TWO)], rl, first=not skip)
    expected = 0.6 / 6 * torch.tensor(LAYERS_SAVED)
    torch.testing.assert_close(experience.firing_cost[batch.gate_mask], expected, rtol=1e-5, atol=1e-6)
    assert not experience.firing_cost[~batch.gate_mask].any()
    objective = objective_of(rl, LONGEST)
    weights, _ = objective.weights(batch, experience, experience.old_tokens, experience.old_exits)
    torch.testing.assert_close(weights.hazard[batch.gate_mask], expected / 6, rtol=1e-5, atol=1e-6)


def test_with_charge_right_gates_of_wrong_answers_pay_for_divergence_alone():
    rl = rl_of(
        depth=dict(weight=0.6, penalize="right"),
        kl=dict(weight=0.5, kind="exact"),
        exit_credit=ExitCredit(kl_weight=2.0),
    )
    group = a_group(*TWO, right=[1, 0])
    batch = collate([group], 6)
    kl = torch.zeros(batch.tokens.shape)
    kl[batch.gate_mask] = torch.tensor([0.8, 0.1, 0.0, 0.4])
    hazards = torch.full((*kl.shape, 2), 0.5)
    _, experience, _ = learned([group], rl, kl=kl, hazards=hazards)
    # Gate 2 fired at 0.8 and 0.4, 0.6 on average, and went on at 0.1 and 0, 0.05; gate 4 fired at 0.1 and went on at 0.
    caused = torch.tensor([[0.75, 0], [0.5, 0.1], [0.6, 0.1], [0.35, 0]])
    price = 0.6 / 6 * torch.tensor(LAYERS_SAVED) * torch.tensor([[1], [1], [0], [0]])
    torch.testing.assert_close(experience.firing_cost[batch.gate_mask], price + caused, rtol=1e-5, atol=1e-6)
    # Read at every exit that was come by, gate 2 diverges by .5 more than what was taken, gate 4 by .2 more.
    for rollout, row in zip(group.rollouts, range(2), strict=True):
        taken = kl[row][batch.loss_mask[row]].numpy()[:, None]
        behind = np.array([2, 4, 6]) > rollout.exit_depths[:, None]
        more = np.array([0.5, 0.2, 0.0]) * (np.array([2, 4, 6]) < rollout.exit_depths[:, None])
        divergences = np.where(behind, np.nan, taken + more).astype(np.float32)
        rollout.exits = ExitReading(divergences, np.full((rollout.length, 2), 0.5, np.float32))
    caused = torch.tensor([[0.75, 0], [0.5, 0.1], [0.5, 0.2], [0.35, 0]])
    _, read, _ = learned([group], but(rl, exit_credit=dict(divergence="all")), kl=kl, hazards=hazards)
    torch.testing.assert_close(read.firing_cost[batch.gate_mask], price + caused, rtol=1e-5, atol=1e-6)
    _, free, _ = learned([group], but(rl, exit_credit=dict(kl_weight=0.0)), kl=kl, hazards=hazards)
    torch.testing.assert_close(free.firing_cost[batch.gate_mask], price, rtol=1e-5, atol=1e-6)


def test_hazards_that_the_pool_has_read_tell_tokens_apart_whether_a_step_is_scored_or_not():
    """What going on costs at a gate is asked of tokens with about the same hazard: here the even ones fire, and have
    much to lose there, the odd ones little."""
    rng, length = np.random.default_rng(0), 40
    depths = [[6, *rng.choice([2, 4, 6], length - 1)] for _ in range(2)]
    group = a_group(*depths, right=[1, 1])
    for rollout in group.rollouts:
        behind = np.array([2, 4, 6]) > rollout.exit_depths[:, None]
        behind[0] = True  # no gate is asked there
        even = np.arange(length) % 2 == 0
        divergences = np.where(behind, np.nan, (even[:, None] + rng.random((length, 3)))).astype(np.float32)
        hazards = np.where(behind[:, :2], np.nan, np.where(even, 0.8, 0.1)[:, None]).astype(np.float32)
        rollout.exits = ExitReading(divergences, hazards)
    rl = rl_of(depth=0.6, kl=dict(weight=0.5, kind="exact"), exit_credit=ExitCredit(divergence="all"))
    batch, scored, _ = learned([group], rl, hazards=torch.rand(2, 50, 2))
    _, skipped, _ = learned([group], but(rl, skip_scoring=True, loss=dict(importance=None)), first=False)
    assert torch.equal(scored.firing_cost, skipped.firing_cost)
    price = 0.6 * torch.tensor([2 / 6, 4 / 6, 1.0]).expand(*batch.tokens.shape, 3)
    divergence = 0.5 * spread(batch, [r.exits.divergences for r in group.rollouts])
    apart, alike = (
        hazard_costs(batch, LAYOUT, price, divergence, hazards)
        for hazards in (spread(batch, [r.exits.hazards for r in group.rollouts]), None)
    )
    torch.testing.assert_close(skipped.firing_cost, apart, rtol=1e-5, atol=1e-6)
    assert (apart - alike)[batch.gate_mask].abs().max() > 0.1
    group.rollouts[1].exits = None
    with pytest.raises(ValueError, match="exits are not scored"):
        learned([group], rl)


@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_without_an_exact_divergence_gates_pay_for_the_log_ratio_of_the_token(kl):
    rl = rl_of(kl=dict(weight=0.5, kind=kl), exit_credit=ExitCredit())
    group = a_group(*TWO)
    batch = collate([group], 6)
    ratio = torch.zeros(batch.tokens.shape)
    ratio[batch.gate_mask] = torch.tensor([1.6, 0.2, 0.0, 0.8])
    first = scores(batch)
    experience, values = credit(batch, [group], first, first.token_logprobs - ratio, rl, 0.0)
    expected = torch.tensor([[0.75, 0], [0.5, 0.1], [0.6, 0.1], [0.35, 0]])
    torch.testing.assert_close(experience.firing_cost[batch.gate_mask], expected, rtol=1e-5, atol=1e-6)
    assert values["kl_to_reference"] == pytest.approx((1.8 / 3 + 0.8 / 3) / 2)


def test_without_scores_what_the_rollouts_brought_along_is_where_the_step_starts():
    groups = [a_group([6, 2, 2], [6, 6], rewards=[1, 0], logprob=-0.7)]
    batch, experience, values = learned(groups, rl_of(skip_scoring=True, loss=dict(importance=None)), first=False)
    assert experience.old_tokens[batch.loss_mask].tolist() == pytest.approx([-0.7] * 5)
    assert not experience.old_exits.any() and values["importance_ratio_max"] == 1.0
    scored = learned(groups, rl_of())[1]
    assert scored.old_tokens[batch.loss_mask].tolist() == [-1.0] * 5


@pytest.mark.parametrize("ratios", ["together", "apart"])
def test_importance_masks_by_the_ratio_of_token_and_exit_together_or_of_each_apart(ratios):
    groups = [a_group([6, 2, 2], [6, 6, 6], rewards=[1, 0], logprob=0.0)]
    batch = collate(groups, 6)
    tokens, exits = torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape)
    tokens[batch.loss_mask] = torch.tensor([0.0, 1.5, 0.4, 0.4, 0.0, 0.0])
    exits[batch.loss_mask] = torch.tensor([0.0, 0.0, 0.6, 0.0, -1.0, -0.5])
    rl = rl_of(loss=dict(ratios=ratios, importance=Importance(kind="mask", low=0.5, high=2.0)))
    _, experience, values = learned(groups, rl, token_logprobs=tokens, exit_logprobs=exits)
    token, exit_ = experience.token_importance[batch.loss_mask], experience.exit_importance[batch.loss_mask]
    e = math.exp
    if ratios == "together":
        expected = [1, 0, 0, e(0.4), 0, e(-0.5)]
        assert token.tolist() == exit_.tolist() == pytest.approx(expected)
        assert values["importance_left_out"] == pytest.approx(3 / 6)
    else:
        assert token.tolist() == pytest.approx([1, 0, e(0.4), e(0.4), 1, 1])
        assert exit_.tolist() == pytest.approx([1, 1, e(0.6), 1, 0, e(-0.5)])
        assert values["importance_left_out"] == pytest.approx(2 / 6)


def test_groups_of_equal_answers_are_dropped_unless_right_ones_may_become_shallower():
    differing, right, wrong = (
        a_group([6, 2], [6, 6], rewards=rewards, right=[r > 0 for r in rewards]) for rewards in ([1, 0], [1, 1], [0, 0])
    )
    groups, rl = [differing, right, wrong], rl_of(loss=dict(drop_equal_groups=True))
    assert filter_groups(groups, rl, lambda_depth=0.5) == [0, 1]
    assert filter_groups(groups, rl, lambda_depth=0.0) == [0]
    assert filter_groups(groups, but(rl, loss=dict(drop_equal_groups=False)), lambda_depth=0.0) == [
        0,
        1,
        2,
    ]


def test_the_learning_rate_goes_by_updates_over_all_minibatches(monkeypatch):
    """Three steps of two minibatches are six updates, the last at a tenth."""
    rl = rl_of(steps=3, minibatches=2, decay="linear", group_size=2, adapter_lr=1e-3, gate_lr=1e-2)
    groups = [a_group([6, 2], [6, 6], rewards=rewards) for rewards in ([1, 0], [0, 1])]
    rates: list[tuple[float, float]] = []

    def step(part, weights, teacher, *, adapter_lr, gate_lr) -> Update:
        rates.append((adapter_lr, gate_lr))
        return Update(scores(part.batch), dict.fromkeys(("body", "gates", "all"), 0.0), applied=True)

    def pack(batch):
        return SimpleNamespace(batch=batch, stats=PackingStats(0, 0, 0, 0))

    learner = SimpleNamespace(pack=pack, score=lambda packed, **_: scores(packed.batch), step=step)
    session = SimpleNamespace(
        cfg=RunConfig(rl=rl), spec=PolicySpec(6, LAYOUT.depths, rank=2), check_finite=lambda *_: None,
        source=SimpleNamespace(dims=None),
    )  # fmt: skip
    monkeypatch.setattr(reinforce, "cost_metrics", lambda *_: {})
    for number in range(3):
        metrics, _ = reinforce.learn(session, learner, groups, number, LambdaController(rl, None, {}))
        assert metrics["updates"] == 2
    assert [adapter for adapter, _ in rates] == pytest.approx(np.linspace(1e-3, 1e-4, 6).tolist())
    assert [gate for _, gate in rates] == pytest.approx(np.linspace(1e-2, 1e-3, 6).tolist())


FLOOR = rl_of(depth=dict(weight=0.5, target=AccuracyTarget(margin=2.0, rate=2.0, window=3)))
accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_price_by_hand_under_an_accuracy_floor():
    """The goal is the reference's accuracy on the prompts of the same steps, a running mean as the policy's is; of the
    first steps a share of it counts."""
    cost = LambdaController(FLOOR, {"easy": 1.0, "middling": 0.6, "hard": 0.24}, {})
    assert cost.at(0) == cost.at(99) == 0.5
    running = [0.7, 0.65, 0.55, 0.55 * 2 / 3 + 0.9 / 3]
    prompts = [["easy", "hard"], ["easy", "middling"], ["middling", "hard"], ["easy"]]
    theirs = [0.62, (0.62 + 0.8) / 2, (0.62 + 0.8 + 0.42) / 3, (0.62 + 0.8 + 0.42) / 3 * 2 / 3 + 1 / 3]
    value, steps = 0.5, zip((0.7, 0.6, 0.35, 0.9), prompts, running, theirs, (1 / 3, 2 / 3, 1, 1), strict=True)
    for accuracy, ids, mean, goal, share in steps:
        found = cost.update(0, accuracy, ids)
        assert found == pytest.approx((mean, goal - 0.02))
        left = share * (mean - goal + 0.02)
        value = min(max(value + 2 * left, 0), LAMBDA_MAX)
        assert cost.at(1) == pytest.approx(min(max(value + LAMBDA_GAIN * left, 0), LAMBDA_MAX))


def test_where_the_reference_has_not_answered_its_mean_stands():
    cost = LambdaController(
        but(FLOOR, depth_penalty=dict(target=replace(FLOOR.depth_penalty.target, window=1))),
        {"of the first steps": 0.4, "and another": 0.8},
        {},
    )
    for prompts, goal in ((["of the first steps"], 0.38), (["of the first steps", "never seen before"], 0.58)):
        assert cost.update(0, 0.5, prompts).goal == pytest.approx(goal)


@QUICK
@given(accuracies, st.integers(1, 12), st.integers(0, 10))
def test_what_is_lost_while_the_price_rises_is_not_held_against_it(seen, rise, lost):
    """The schedule leads up to `lambda_exit`, whatever accuracy does; from there a price goes on as if it began."""
    rl = but(FLOOR, steps=40, depth_penalty=dict(warmup=rise / 40))
    cost, begun = (
        LambdaController(rl, {"p": 0.6}, {}),
        LambdaController(but(rl, depth_penalty=dict(warmup=0.0)), {"p": 0.6}, {}),
    )
    for step in range(rise):
        assert cost.at(step) == pytest.approx(rl.depth_penalty.weight * (step + 1) / (rise + 1))
        assert cost.update(step, lost / 10, ["p"]) is None
    assert cost.state == {}
    for step, accuracy in enumerate(seen):
        assert cost.at(rise + step) == begun.at(step)
        assert cost.update(rise + step, accuracy, ["p"]) == begun.update(step, accuracy, ["p"])


@QUICK
@given(accuracies, st.integers(0, 30))
def test_a_price_made_from_another_s_counters_goes_on_as_that_one_would(seen, at):
    whole = LambdaController(FLOOR, {"p": 0.6}, {})
    for accuracy in seen[:at]:
        whole.update(0, accuracy, ["p"])
    resumed = LambdaController(FLOOR, {"p": 0.6}, dict(whole.state))
    for step, accuracy in enumerate(seen[at:]):
        assert resumed.at(step) == whole.at(step)
        assert resumed.update(step, accuracy, ["p"]) == whole.update(step, accuracy, ["p"])
    assert resumed.state == whole.state


def test_without_an_accuracy_floor_the_price_keeps_to_its_schedule_whatever_is_right():
    cost = LambdaController(rl_of(steps=10, depth=dict(weight=0.5, warmup=0.4)), None, {})
    for step, expected in ((0, 0.1), (3, 0.4), (4, 0.5), (9, 0.5)):
        assert cost.at(step) == pytest.approx(expected) and cost.update(step, 0.0, ["p"]) is None
    assert cost.state == {}
