"""Advantages, rewards, schedules, patterns, batches and the trace store."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ee_megatron.config.schema import AccuracyTarget, CalibrateConfig, DepthPenalty, RLConfig, RunConfig
from ee_megatron.exits import ExitLayout, exit_distribution, target_hazards
from ee_megatron.learner.batch import pack, spread
from ee_megatron.learner.engine import OptimizerState
from ee_megatron.objectives.advantages import ADVANTAGES
from ee_megatron.objectives.depth import DEPTH_COSTS
from ee_megatron.objectives.distillation import GATE_TARGETS, Distillation, current_targets
from ee_megatron.objectives.divergences import Teacher
from ee_megatron.objectives.policy_gradient import IMPORTANCE, K3_GAP, k3_slope
from ee_megatron.objectives.schedules import learning_rate, price, schedule
from ee_megatron.objectives.weights import Weights, mean_weights
from ee_megatron.observe.rundir import RunDirectory
from ee_megatron.policy import PolicySpec, WeightSet, save_policy, sharpened
from ee_megatron.tasks import Verdict
from ee_megatron.tensors import HeldStream, collect
from ee_megatron.training import teacher as teacher_stage
from ee_megatron.training.calibrate import (
    Item,
    draw_exits,
    interpolated,
    make_batch,
    objective_of,
    plan,
    target_depth,
)
from ee_megatron.training.checkpoints import Checkpointing, TrainingStreams, damage, read_training, write_training
from ee_megatron.training.collect import WeightHistory, check_versions, step_prompts
from ee_megatron.training.ranks import Distributed
from ee_megatron.training.reinforce import LambdaController
from ee_megatron.training.serialization import load_traces, save_rollouts, save_traces
from ee_megatron.types import Prompt, Trace
from tests.by_hand import a_group, a_rollout

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
    every = np.ones((1, 4), bool)
    for k in range(4):
        others = np.delete(rewards[0], k).mean()
        assert ADVANTAGES["rloo"](rewards, every)[0, k] == pytest.approx(rewards[0, k] - others)
    assert ADVANTAGES["mean"](rewards, every)[0] == pytest.approx([0.5, -0.5, 0, 0])
    assert ADVANTAGES["grpo"](rewards, every)[0, 0] == pytest.approx(0.5 / (rewards.std() + 1e-4))
    assert ADVANTAGES["grpo"](np.ones((2, 3)), np.ones((2, 3), bool)) == pytest.approx(np.zeros((2, 3)))
    assert np.array_equal(ADVANTAGES["none"](rewards, every), rewards)


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=2, max_size=6))
def test_answers_that_don_t_count_change_nobody_s_advantage(answers):
    """As if they had not been there; alone among its kind an answer has nothing to be better than."""
    rewards, counted = (np.array([column]) for column in zip(*answers, strict=True))
    left = rewards[:, counted[0]]
    for name, function in ADVANTAGES.items():
        found = function(rewards, counted)
        assert not found[~counted].any()
        if left.size:
            assert found[0][counted[0]] == pytest.approx(function(left, left == left)[0], abs=1e-9)
        if left.size == 1 and name != "none":
            assert not found.any()


def test_depth_costs_by_hand():
    batch = pack([np.arange(3)] * 2, [np.arange(4), np.arange(2)], [np.array([6, 2, 4, 6]), np.array([6, 2])], 6)
    expected = {
        "mean": [18 / 24, 8 / 12],
        "total": [0.3, 8 / 60],
        "max": [1, 1 / 3],
    }
    for kind, costs in expected.items():
        assert DEPTH_COSTS[kind].of_answers(batch, 6, 10).tolist() == pytest.approx(costs), kind


def test_importance_ratios_are_cut_or_masked():
    raw = torch.tensor([1.0, 7.0, 0.1, 0.5, 2.0])
    assert IMPORTANCE["truncate"](raw, 0.5, 2.0).tolist() == pytest.approx([1.0, 2.0, 0.1, 0.5, 2.0])
    assert IMPORTANCE["mask"](raw, 0.5, 2.0).tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5, 2.0])


def test_pack_puts_each_exit_where_its_token_is_predicted():
    batch = pack([np.array([7, 8, 9])], [np.array([20, 21, 22])], [np.array([6, 2, 4])], 6)
    assert batch.tokens[0, :6].tolist() == [7, 8, 9, 20, 21, 22]
    assert batch.labels()[0][batch.loss_mask[0]].tolist() == [20, 21, 22]
    assert batch.exit_depths[0][batch.loss_mask[0]].tolist() == [6, 2, 4]
    assert batch.gate_mask[0].nonzero().flatten().tolist() == [3, 4]
    assert mean_weights(batch, batch.loss_mask).sum().item() == pytest.approx(1.0)
    placed = spread(batch, [np.array([0.5, 0.25, 0.125], dtype=np.float32)])
    assert placed[0, 2:5].tolist() == [0.5, 0.25, 0.125]
    with pytest.raises(ValueError, match="first generated token"):
        pack([np.array([7])], [np.array([20])], [np.array([2])], 6)


def test_where_first_tokens_may_exit_the_prompts_last_position_is_asked():
    batch = pack([np.array([7, 8, 9]), np.array([7])], [np.array([20, 21]), np.array([20])], [[2, 4], [4]], 6, True)
    assert batch.exit_depths.tolist() == [[6, 6, 2, 4, 0], [4, 0, 0, 0, 0]]
    assert torch.equal(batch.gate_mask, batch.loss_mask) and batch.shareable().tolist() == [2, 0]
    # The largest depth of an answer counts it.
    assert DEPTH_COSTS["max"].of_answers(batch, 6, 10).tolist() == pytest.approx([4 / 6, 4 / 6])


def test_every_trace_gets_every_pattern_once_an_epoch():
    c = CalibrateConfig(epochs=2, exit_samples=3, batch_size=4)
    updates = plan(5, c).updates
    items = [item for update in updates for item in update]
    assert len(items) == 30 and len(set(items)) == 30
    assert {i.trace for i in items[:15]} == set(range(5)) and max(i.pattern for i in items[:15]) == 2
    assert plan(5, c).updates == updates != plan(5, replace(c, seed=1)).updates


def test_gates_settle_last_with_patterns_not_seen_before():
    c = CalibrateConfig(epochs=2, exit_samples=1, batch_size=4, gate_only_fraction=0.25)
    planned = plan(20, c)
    before, after = planned.updates[: planned.settle_from], planned.updates[planned.settle_from :]
    assert sum(map(len, before)) == 30 and sum(map(len, after)) == 10
    assert len({item for update in planned.updates for item in update}) == 40
    never = plan(20, replace(c, gate_only_fraction=0.0))
    assert never.settle_from == never.student_from == len(never.updates)
    assert plan(20, replace(c, student_patterns=0.4)).student_from == len(planned.updates) - 4 == 7
    assert plan(20, replace(c, student_patterns=1.0)).student_from == 0


def test_sharpened_gates_turn_at_the_centre_and_nothing_else_changes():
    layer = torch.nn.Linear(6, 1)
    policy = {"gates.2.fc2.weight": layer.weight.detach(), "gates.2.fc2.bias": layer.bias.detach()}
    policy |= {"gates.2.fc1.weight": torch.randn(6, 3), "l.lora_B.weight": torch.randn(4, 2)}
    found, hidden = sharpened(policy, 0.95, 2.0), torch.randn(50, 6)
    before = layer(hidden)[:, 0]
    after = hidden @ found["gates.2.fc2.weight"][0] + found["gates.2.fc2.bias"]
    assert torch.allclose(after, 2 * (before - np.log(0.95 / 0.05)), atol=1e-5)
    assert torch.equal(torch.sigmoid(before) > 0.95, torch.sigmoid(after) > 0.5)
    assert all(found[name] is policy[name] for name in policy if "fc2" not in name)
    assert all(torch.equal(tensor, policy[name]) for name, tensor in sharpened(policy, 0.5, 1.0).items())


def test_interpolation_scales_the_change_of_the_weights_and_leaves_the_gates():
    a, b, base, w = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4, 5), torch.randn(4, 5)
    layers = [f"model.layers.{index}.mlp.up_proj." for index in range(2)]
    start = {"gates.2.fc2.bias": torch.zeros(1), "model.norm.weight": torch.ones(5)}
    policy = {"gates.2.fc2.bias": torch.ones(1), "model.norm.weight": torch.full((5,), 2.0)}
    for layer in layers:
        start |= {f"{layer}lora_A.weight": torch.randn(2, 5), f"{layer}lora_B.weight": torch.zeros(4, 2)}
        policy |= {f"{layer}lora_A.weight": a, f"{layer}lora_B.weight": b, f"{layer}weight": w}
        start[f"{layer}weight"] = base
    found = collect(interpolated(HeldStream(policy), start, 0.75))
    for layer in layers:
        torch.testing.assert_close(found[f"{layer}lora_B.weight"] @ found[f"{layer}lora_A.weight"], 0.75 * (b @ a))
        torch.testing.assert_close(found[f"{layer}weight"], base + 0.75 * (w - base))
    assert torch.equal(found["gates.2.fc2.bias"], policy["gates.2.fc2.bias"])
    assert torch.equal(found["model.norm.weight"], torch.full((5,), 1.75))


def test_patterns_follow_the_targets_and_repeat():
    trace, c = a_trace(length=40), CalibrateConfig()
    draws = np.stack([draw_exits(trace, Item(0, i), LAYOUT, c) for i in range(3000)])
    assert (draws[:, 0] == 6).all()
    early = replace(LAYOUT, first_token=True)
    free = np.stack([draw_exits(trace, Item(0, i), early, c) for i in range(3000)])
    assert (free[:, 1:] == draws[:, 1:]).all()
    q = exit_distribution(target_hazards(torch.from_numpy(trace.divergences), c.kl_factor))
    for outcome, depth in enumerate(LAYOUT.outcomes):
        assert (free == depth).mean(0) == pytest.approx(q[:, outcome].numpy(), abs=0.05)
    assert target_depth([trace], early, c.kl_factor) == pytest.approx(free.mean() / 6, abs=0.01)
    batch = make_batch([trace], [Item(0, 7)], early, c)
    assert batch.exit_depths[batch.gate_mask].tolist() == free[7].tolist()
    assert (draw_exits(trace, Item(0, 7), LAYOUT, c) == draws[7]).all()
    mean = (draws[:, 1:].mean() * 39 + 6) / 40 / 6
    assert target_depth([trace], LAYOUT, c.kl_factor) == pytest.approx(mean, abs=0.01)


def test_patterns_of_the_student_end_at_its_first_gate_above_a_threshold_that_varies():
    trace, c = a_trace(length=6), CalibrateConfig()
    hazards = torch.tensor([[1.0, 1.0], [0.4, 0.3], [1.0, 0.0], [0.3, 1.0], [0.75, 0.45], [0.45, 0.75]])
    draws = np.stack([draw_exits(trace, Item(0, i), LAYOUT, c, hazards) for i in range(400)])
    # The first token never exits; hazards below every threshold never do, those above every threshold always.
    assert (draws[:, :4] == [6, 6, 2, 4]).all()
    for column, depth in ((4, 2), (5, 4)):
        assert set(draws[:, column]) == {depth, 6} and (draws[:, column] == depth).mean() == pytest.approx(0.5, abs=0.1)
    # One threshold for the whole sequence.
    assert ((draws[:, 4] == 2) == (draws[:, 5] == 4)).all()
    assert (draw_exits(trace, Item(0, 7), LAYOUT, c, hazards) == draws[7]).all()
    mixed = replace(c, uniform_patterns=0.5)
    assert len({tuple(draw_exits(trace, Item(0, i), LAYOUT, mixed, hazards)) for i in range(50)}) > 10
    for held, own in ((replace(c, full_patterns=0.3), hazards), (replace(mixed, full_patterns=0.5), None)):
        # The rest leaves at 2 or 4 somewhere: no hazard of 1 and no uniform draw keeps all five to the end.
        full = [(draw_exits(trace, Item(0, i), LAYOUT, held, own) == 6).all() for i in range(400)]
        assert np.mean(full) == pytest.approx(held.full_patterns, abs=0.08)
    batch = make_batch([trace], [Item(0, 7)], LAYOUT, c, hazards=[hazards])
    assert batch.exit_depths[batch.loss_mask].tolist() == draws[7].tolist()


def test_calibration_batch_carries_the_teacher():
    traces = [a_trace("a", 5), a_trace("b", 3, seed=1)]
    batch = make_batch(traces, [Item(1, 0), Item(0, 2)], LAYOUT, CalibrateConfig())
    assert batch.teacher_ids[0][batch.loss_mask[0]].tolist() == traces[1].topk_ids.tolist()
    objective = Distillation(Teacher.STORED, GATE_TARGETS["soft"], gate_weight=1.0, depth_power=0.0, kl_scale=0.0)
    traced = torch.rand(*batch.tokens.shape, 2)

    def never(*_: object) -> torch.Tensor:
        raise AssertionError("the student was scored for nothing")

    weights = objective.weights(batch, LAYOUT, traced, never, never)
    assert weights.target_hazards is traced and weights.token is None
    assert weights.divergence.sum().item() == pytest.approx(1.0)


def test_within_reach_a_shallow_exit_counts_like_a_deep_one_and_the_student_is_scored_once():
    """Weights over those without depth_power: f + (1 - f) exp(-d / reach), f = (e / 6)^2, by hand at four positions."""
    batch = pack([np.arange(2)], [np.arange(4)], [np.array([2, 2, 2, 6], dtype=np.int32)], 6, first_token=True)
    given = torch.tensor([0.0, 0.5, 40.0, 3.0])
    asked: list[torch.Tensor] = []

    def divergence() -> torch.Tensor:
        asked.append(spread(batch, [given.numpy()]))
        return asked[-1]

    def weighed(**settings: float) -> torch.Tensor:
        made = {"depth_power": 2.0, "kl_scale": 0.5, **settings}
        objective = objective_of(CalibrateConfig(gate_targets="current", **made))
        weights = objective.weights(batch, LAYOUT, torch.zeros(()), divergence, lambda d: (-d).exp())
        # Gates learn from the same divergences, at the exit taken.
        assert weights.target_hazards[batch.loss_mask][:, 0].tolist() == pytest.approx([1.0, np.exp(-0.5), 0.0, -1.0])
        return weights.divergence[batch.loss_mask] * 4

    f = 1 / 9
    assert weighed().tolist() == pytest.approx([1.0, f + (1 - f) * np.exp(-1.0), f, 1.0], abs=1e-6)
    assert weighed(kl_scale=0.0).tolist() == pytest.approx([f, f, f, 1.0])
    assert weighed(depth_power=0.0).tolist() == pytest.approx([1.0] * 4)
    assert len(asked) == 3


def test_sequences_and_their_weights_are_cut_alike():
    batch = pack([np.arange(3)] * 3, [np.arange(n) for n in (4, 2, 3)], None, 6)
    weights = Weights(mean_weights(batch, batch.loss_mask), target_hazards=torch.rand(*batch.tokens.shape, 2))
    cut = [part.select(slice(1, 3)) for part in (batch, weights)]
    assert torch.equal(cut[0].tokens, batch.tokens[1:]) and torch.equal(cut[1].token, weights.token[1:])
    assert cut[1].target_hazards.shape == (2, *batch.tokens.shape[1:], 2) and cut[1].exit is None


def test_traces_come_back_as_they_were(tmp_path):
    traces = [a_trace("a", 5), a_trace("b", 3, seed=1)]
    save_traces(tmp_path / "set", traces)
    for saved, loaded in zip(traces, load_traces(tmp_path / "set"), strict=True):
        assert loaded.prompt_id == saved.prompt_id and loaded.correct and loaded.text == "x"
        for name in ("prompt_tokens", "tokens", "divergences", "topk_ids", "topk_logprobs", "entropy"):
            assert np.array_equal(getattr(loaded, name), getattr(saved, name)), name


def test_traces_say_which_answers_are_right(tmp_path, monkeypatch):
    """Of two answers to each of two prompts; right form is not enough."""
    prompts = [Prompt("a", "", "", "t"), Prompt("b", "", "", "t")]
    answers = [[replace(a_rollout([6, 2]), text=f"{prompt.id}{i}") for i in range(2)] for prompt in prompts]
    verdicts = {"a0": (True, True), "a1": (False, True), "b0": (False, False), "b1": (True, False)}
    pool = SimpleNamespace(trace=lambda rollouts, *_: [a_trace(rollout.text) for rollout in rollouts])
    verifier = SimpleNamespace(verify_many=lambda items: [Verdict(*verdicts[text], True) for _, text in items])

    class Stage:
        spec, path = None, tmp_path

        def __init__(self, *_, **__):
            self.make_task, self.finish = (lambda *_: None,) * 2
            self.make_verifier, self.make_pool = lambda *_: verifier, lambda *_: pool
            self.sample, self.progress = lambda *_: answers, lambda *_, **__: nullcontext()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(teacher_stage, "StageContext", Stage)
    monkeypatch.setattr(teacher_stage, "training_problems", lambda *_: prompts)
    teacher_stage.make_traces(RunConfig(), tmp_path)
    found = {trace.prompt_id: trace.correct for trace in load_traces(tmp_path / "dataset")}
    assert found == {name: right for name, (right, _) in verdicts.items()}


def test_prompts_of_the_steps_use_every_prompt_once_before_any_twice():
    prompts = [Prompt(str(i), "", "", "t") for i in range(10)]
    rl = RLConfig(prompts_per_step=4)
    seen = [p.id for step in range(5) for p in step_prompts(prompts, step, rl)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == sorted(p.id for p in prompts)
    assert seen[:10] != seen[10:20]


def test_rollouts_older_than_the_staleness_allows_are_refused():
    for version, staleness in ((3, 0), (2, 1)):
        old = replace(a_rollout([6, 2]), weight_version=version, weight_versions=None)
        check_versions([[old]], version + staleness, staleness)
        with pytest.raises(RuntimeError, match=r"rollout\.max_staleness"):
            check_versions([[old]], version + staleness + 1, staleness)


def test_weights_that_a_resumed_run_begins_rollouts_with_stay_on_disk(tmp_path):
    """Whatever version it goes back to, down to the oldest; none older is kept."""
    history = WeightHistory(tmp_path, PolicySpec(num_layers=6, exit_depths=(2,), rank=2))
    for number in range(1, 5):
        policy = {"gates.2.fc2.bias": torch.full((1,), float(number))}
        assert collect(history.keep(number, HeldStream(policy), oldest=max(1, number - 2))).keys() == policy.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_2", "version_3", "version_4"]
    for number in (2, 3):
        found = history.version(number, WeightSet(4, {}))
        assert found.version == number and found.tensors["gates.2.fc2.bias"].item() == number


@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20))
def test_far_from_the_reference_k3_goes_on_as_its_tangent(gaps):
    """The slope's reference: autograd through k3 up to the bound and the tangent there from it on, in float64."""
    gap = torch.tensor(gaps)
    policy = (-gap.double()).requires_grad_()
    beyond = math.exp(K3_GAP) - 1 - K3_GAP + (-policy - K3_GAP) * (math.exp(K3_GAP) - 1)
    torch.where(gap > K3_GAP, beyond, (-policy).exp() - 1 + policy).sum().backward()
    slope = k3_slope(-gap, torch.zeros_like(gap))
    torch.testing.assert_close(slope.double(), policy.grad, rtol=1e-5, atol=1e-5)
    assert float(slope.min()) >= 1 - math.exp(K3_GAP) * (1 + 1e-6)
    within = gap <= K3_GAP
    assert torch.equal(slope[within], (1 - gap.exp())[within])


def test_price_and_learning_rate_schedules():
    assert [price(s, 10, 0.5, 0.4) for s in (0, 3, 4, 9)] == pytest.approx([0.1, 0.4, 0.5, 0.5])
    assert price(0, 10, 0.5, 0.0) == 0.5
    assert [learning_rate(u, 10, 2, "constant") for u in range(4)] == [0.5, 1.0, 1.0, 1.0]
    cosine = [learning_rate(u, 11, 0, "cosine") for u in range(11)]
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.55) and cosine[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(cosine))
    linear = [schedule(i, 20, 0.2) for i in range(20)]
    assert linear[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1]) and linear[-1] == pytest.approx(0.1)


def test_rollouts_are_kept_end_to_end_with_a_line_for_each(tmp_path):
    groups = [a_group([6, 2, 2], [6, 4], rewards=[1, 0]), a_group([6], [6, 2])]
    groups[1] = replace(groups[1], prompt=Prompt("q", "text", "4", "t", "g"), correct=np.array([False, True]))
    save_rollouts(tmp_path / "step_1", groups)
    arrays = load_file(tmp_path / "step_1" / "rollouts.safetensors")
    assert arrays["exit_depths"].tolist() == [6, 2, 2, 6, 4, 6, 6, 2] and arrays["rewards"].tolist() == [1, 0, 1, 1]
    assert arrays["lengths"].tolist() == [[3, 3], [3, 2], [3, 1], [3, 2]]
    lines = list(map(json.loads, (tmp_path / "step_1" / "rollouts.jsonl").read_text().splitlines()))
    assert [(line["prompt"]["id"], line["correct"]) for line in lines] == [
        ("p", True), ("p", True), ("q", False), ("q", True),
    ]  # fmt: skip


def streams_of(policy, state) -> TrainingStreams:
    return TrainingStreams(
        state.updates, HeldStream(policy), {kind: HeldStream(tensors) for kind, tensors in state.tensors.items()}
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog):
    """Of the right size, but one byte is another: found by contents, named, and the previous checkpoint is used."""
    spec = PolicySpec(6, (2, 4), rank=0)
    tensors = {name: torch.randn(3, 4) for name in ("a", "b")}
    state = OptimizerState(7, {"exp_avg": tensors, "exp_avg_sq": tensors})
    with RunDirectory(tmp_path) as run:
        for step in (1, 2):
            with run.write_checkpoint(step) as directory:
                write_training(directory, spec, streams_of(tensors, state), {"best_step": step})
        assert run.latest_checkpoint(damage) == run.checkpoint_dir(2)
        found, counters = read_training(run.checkpoint_dir(2))
        assert (
            found.updates == 7
            and counters == {"best_step": 2}
            and torch.equal(found.tensors["exp_avg"]["a"], tensors["a"])
        )
        file = run.checkpoint_dir(2) / "optimizer" / "exp_avg.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
        assert run.latest_checkpoint(damage) == run.checkpoint_dir(1)
    assert "step_2" in caplog.text and "exp_avg.safetensors: not what was written" in caplog.text


def test_a_resumed_stage_goes_on_with_the_depth_penalty_of_its_checkpoint(tmp_path):
    """The checkpoint's state reaches what the loop makes its lambda of, and the checkpoints to come."""
    spec = PolicySpec(num_layers=6, exit_depths=(2,), rank=2)
    rl = RLConfig(depth_penalty=DepthPenalty(weight=0.5, target=AccuracyTarget(margin=2.0)))
    cost = LambdaController(rl, {"p": 0.6}, {})
    cost.update(0, 0.9, ["p"])
    assert cost.at(1) != 0.5
    (tmp_path / "step_1").mkdir()
    state = streams_of({"gates.2.fc2.bias": torch.ones(1)}, OptimizerState(1, {}))
    write_training(tmp_path / "step_1", spec, state, cost.state)

    loaded: list[int] = []
    learner = SimpleNamespace(load_optimizer=lambda state: loaded.append(state.updates))
    checkpoints = Checkpointing(tmp_path, spec, Distributed(), RunDirectory(tmp_path / "run"))
    checkpoints.restore(learner, tmp_path / "step_1")
    assert loaded == [1]
    assert LambdaController(rl, {"p": 0.6}, checkpoints.state).at(1) == cost.at(1)
    assert checkpoints.state == cost.state


def test_a_checkpoint_has_the_bytes_that_safetensors_own_writer_gives_it(tmp_path, monkeypatch):
    """As checkpoints always had them, also where a tensor is written in several blocks."""
    monkeypatch.setattr("ee_megatron.tensors.BLOCK_BYTES", 100)
    spec = PolicySpec(6, (2, 4), rank=0)
    tensors = {name: torch.randn(shape) for name, shape in {"b": (31, 4), "a.10": (3,), "a.2": (5, 7)}.items()}
    state = OptimizerState(7, {kind: {n: t.square() for n, t in tensors.items()} for kind in ("exp_avg", "exp_avg_sq")})
    for folder in ("new", "old"):
        (tmp_path / folder / "optimizer").mkdir(parents=True)
    (tmp_path / "new" / "optimizer").rmdir()
    write_training(tmp_path / "new", spec, streams_of(tensors, state), {"best_step": 3})
    save_policy(tmp_path / "old", spec, tensors)
    for kind, held in state.tensors.items():
        save_file(held, tmp_path / "old" / "optimizer" / f"{kind}.safetensors")
    digests = {kind: sha256_in_name_order(held) for kind, held in state.tensors.items()}
    (tmp_path / "old" / "training.json").write_text(
        json.dumps({"updates": 7, "counters": {"best_step": 3}, "sha256": digests})
    )
    files = [path.relative_to(tmp_path / "old") for path in (tmp_path / "old").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "old" / file).read_bytes(), file
    assert json.loads((tmp_path / "new" / "policy.json").read_text())["sha256"] == sha256_in_name_order(tensors)
    assert damage(tmp_path / "new") is None


def sha256_in_name_order(tensors):
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)} torch.float32\n".encode())
        total.update(tensors[name].numpy().tobytes())
    return total.hexdigest()


def test_current_targets_stand_at_the_exit_that_was_taken():
    batch = pack([np.arange(3)], [np.arange(4)], [np.array([6, 2, 4, 6])], 6)
    kl = torch.where(batch.loss_mask, 0.7, 0.0)
    none = torch.zeros(*batch.tokens.shape, 2)
    targets = current_targets(batch, LAYOUT, none, lambda: target_hazards(kl, 2.0))[0][batch.loss_mask[0]]
    s = 1 - np.tanh(0.7)
    assert targets.flatten().tolist() == pytest.approx([-1, -1, s, -1, -1, s, -1, -1])
