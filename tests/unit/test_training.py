"""Advantages, rewards, schedules, patterns, batches and the trace store."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ee_megatron.config.schema import CalibrateConfig, RLConfig
from ee_megatron.exits import ExitLayout, exit_distribution, target_hazards
from ee_megatron.learner.batch import mean_weights, pack, spread
from ee_megatron.learner.learner import Scores
from ee_megatron.training.advantages import ADVANTAGES
from ee_megatron.training.calibrate import Item, current_targets, draw_exits, make_batch, plan, target_depth
from ee_megatron.training.losses import depth_cost, rollout_reward, schedule, truncated_ratio
from ee_megatron.training.reinforce import replay, step_prompts, weigh
from ee_megatron.training.trace_store import load_traces, save_traces
from ee_megatron.types import Group, Prompt, Rollout, Trace

LAYOUT = ExitLayout(6, (2, 4))


def a_trace(name="p", length=5, seed=0) -> Trace:
    g = np.random.default_rng(seed)
    return Trace(
        prompt_id=name,
        prompt_tokens=g.integers(0, 50, 4),
        tokens=g.integers(0, 50, length),
        divergences=g.exponential(1.0, (length, 2)).astype(np.float32),
        topk_ids=g.integers(0, 50, (length, 3)).astype(np.int32),
        topk_logprobs=np.log(np.full((length, 3), 0.3, dtype=np.float32)),
        entropy=g.random(length).astype(np.float32),
        correct=True,
        text="x",
    )


def test_advantages_by_hand():
    rewards = np.array([[1.0, 0.0, 0.5, 0.5]])
    for k in range(4):
        others = np.delete(rewards[0], k).mean()
        assert ADVANTAGES["rloo"](rewards)[0, k] == pytest.approx(rewards[0, k] - others)
    assert ADVANTAGES["mean"](rewards)[0] == pytest.approx([0.5, -0.5, 0, 0])
    assert ADVANTAGES["grpo"](rewards)[0, 0] == pytest.approx(0.5 / (rewards.std() + 1e-4))
    assert ADVANTAGES["grpo"](np.ones((2, 3))) == pytest.approx(np.zeros((2, 3)))
    assert ADVANTAGES["none"](rewards) is rewards


def test_reward_and_depth_cost_by_hand():
    batch = pack([np.arange(3)] * 2, [np.arange(4), np.arange(2)], [np.array([6, 2, 4, 6]), np.array([6, 2])], 6)
    assert depth_cost(batch, 6, "mean", 10).tolist() == pytest.approx([18 / 24, 8 / 12])
    assert depth_cost(batch, 6, "total", 10).tolist() == pytest.approx([0.3, 8 / 60])
    reward = rollout_reward(torch.tensor([1.0]), torch.tensor([0.2]), torch.tensor([0.5]), beta=0.1, lambda_exit=0.4)
    assert reward.item() == pytest.approx(1 - 0.02 - 0.2)


def test_ratio_is_cut_from_above_only():
    raw, cut = truncated_ratio(torch.tensor([0.0, 2.0, -2.0]), torch.zeros(3), cap=2.0)
    assert raw[1] > 7 and cut.tolist() == pytest.approx([1.0, 2.0, float(np.exp(-2))])


def test_schedule_rises_then_falls_to_a_tenth():
    values = [schedule(i, 20, 0.2) for i in range(20)]
    assert values[0] == pytest.approx(0.25) and values[3] == values[4] == 1.0 and values[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(values[4:]))


def test_pack_puts_each_exit_where_its_token_is_predicted():
    batch = pack([np.array([7, 8, 9])], [np.array([20, 21, 22])], [np.array([6, 2, 4])], 6)
    assert batch.tokens[0, :6].tolist() == [7, 8, 9, 20, 21, 22]
    assert batch.labels()[0][batch.counts[0]].tolist() == [20, 21, 22]
    assert batch.depths[0][batch.counts[0]].tolist() == [6, 2, 4]
    assert batch.asked[0].nonzero().flatten().tolist() == [3, 4]
    assert mean_weights(batch, batch.counts).sum().item() == pytest.approx(1.0)
    placed = spread(batch, [np.array([0.5, 0.25, 0.125], dtype=np.float32)])
    assert placed[0, 2:5].tolist() == [0.5, 0.25, 0.125]
    with pytest.raises(ValueError, match="first generated token"):
        pack([np.array([7])], [np.array([20])], [np.array([2])], 6)


def test_every_trace_gets_every_pattern_once_an_epoch():
    c = CalibrateConfig(epochs=2, patterns=3, batch_size=4)
    updates = plan(5, c)
    items = [item for update in updates for item in update]
    assert len(items) == 30 and len(set(items)) == 30
    assert {i.trace for i in items[:15]} == set(range(5)) and max(i.pattern for i in items[:15]) == 2
    assert plan(5, c) == updates != plan(5, replace(c, seed=1))


def test_patterns_follow_the_targets_and_repeat():
    trace, c = a_trace(length=40), CalibrateConfig()
    draws = np.stack([draw_exits(trace, Item(0, i), LAYOUT, c) for i in range(3000)])
    assert (draws[:, 0] == 6).all()
    q = exit_distribution(target_hazards(torch.from_numpy(trace.divergences), c.kl_factor))
    for outcome, depth in enumerate(LAYOUT.outcomes):
        assert (draws[:, 1:] == depth).mean(0) == pytest.approx(q[1:, outcome].numpy(), abs=0.05)
    assert (draw_exits(trace, Item(0, 7), LAYOUT, c) == draws[7]).all()
    mean = (draws[:, 1:].mean() * 39 + 6) / 40 / 6
    assert target_depth([trace], LAYOUT, c.kl_factor) == pytest.approx(mean, abs=0.01)


def test_calibration_batch_carries_the_teacher():
    traces = [a_trace("a", 5), a_trace("b", 3, seed=1)]
    batch = make_batch(traces, [Item(1, 0), Item(0, 2)], LAYOUT, CalibrateConfig(gate_targets="soft"))
    assert batch.teacher_ids[0][batch.counts[0]].tolist() == traces[1].topk_ids.tolist()
    assert batch.soft_targets.shape[-1] == 2
    assert batch.token_weight.sum().item() == pytest.approx(1.0)


def test_traces_come_back_as_they_were(tmp_path):
    traces = [a_trace("a", 5), a_trace("b", 3, seed=1)]
    save_traces(tmp_path / "set", traces)
    for saved, loaded in zip(traces, load_traces(tmp_path / "set"), strict=True):
        assert loaded.prompt_id == saved.prompt_id and loaded.correct and loaded.text == "x"
        for name in ("prompt_tokens", "tokens", "divergences", "topk_ids", "topk_logprobs", "entropy"):
            assert np.array_equal(getattr(loaded, name), getattr(saved, name)), name
    with pytest.raises(FileNotFoundError, match="ee-megatron traces"):
        load_traces(tmp_path / "none")
    with pytest.raises(ValueError, match="no traces"):
        save_traces(tmp_path / "empty", [])


def test_prompts_of_the_steps_use_every_prompt_once_before_any_twice():
    prompts = [Prompt(str(i), "", "", "t") for i in range(10)]
    rl = RLConfig(prompts_per_step=4)
    seen = [p.id for step in range(5) for p in step_prompts(prompts, step, rl)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == sorted(p.id for p in prompts)
    assert seen[:10] != seen[10:20]


def a_rollout(depths, logprob=-1.0) -> Rollout:
    n = len(depths)
    return Rollout(
        "p", np.arange(3), np.arange(n), np.array(depths, dtype=np.int32), np.full(n, logprob, dtype=np.float32),
        np.zeros(n, dtype=np.float32), "", True, 1,
    )  # fmt: skip


def test_shallower_answers_of_equal_worth_are_pushed_up():
    """The gradient weights: with equal task reward the deep answer's tokens and exits go down, the shallow one's up."""
    group = Group(
        Prompt("p", "", "", "t"), [a_rollout([6, 2, 2]), a_rollout([6, 6, 6])], np.ones(2, np.float32), np.ones(2, bool)
    )
    batch = replay([group], 6)
    same = Scores(
        torch.where(batch.counts, -1.0, 0.0), torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape)
    )
    values = weigh(batch, [group], same, same, RLConfig(lambda_exit=0.5, beta=0.0), 6)
    gap = 0.5 * (18 - 10) / 18
    assert batch.token_weight[0].sum().item() == pytest.approx(gap / 2)
    assert batch.token_weight[1].sum().item() == pytest.approx(-gap / 2)
    assert batch.exit_weight[0].sum().item() == pytest.approx(gap / 2 * 2 / 3)
    assert values["importance_ratio_mean"] == pytest.approx(1.0) and values["mean_depth"] == pytest.approx(28 / 36)
    weigh(batch, [group], same, same, RLConfig(lambda_exit=0.0, beta=0.0), 6)
    assert not batch.token_weight.any()


def test_current_targets_stand_at_the_exit_that_was_taken():
    batch = pack([np.arange(3)], [np.arange(4)], [np.array([6, 2, 4, 6])], 6)
    kl = torch.where(batch.counts, 0.7, 0.0)
    targets = current_targets(batch, kl, LAYOUT, 2.0)[0][batch.counts[0]]
    s = 1 - np.tanh(0.7)
    assert targets.flatten().tolist() == pytest.approx([-1, -1, s, -1, -1, s, -1, -1])
