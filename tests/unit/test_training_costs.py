"""What an RL step cost: FLOPs by the lengths and exits that there were, and what a device made of its time."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ee_megatron.config.schema import RunConfig, VllmConfig
from ee_megatron.families import dims_from_config
from ee_megatron.planning import devices
from ee_megatron.planning.flops import (
    PassMode,
    answer_cost,
    decode_cost,
    phase_flops,
    prefill_cost,
    step_flops,
    whole_pass,
)
from ee_megatron.planning.layout import Layout
from ee_megatron.planning.plan import published_config
from ee_megatron.planning.workload import Load, Workload
from ee_megatron.training.rl_metrics import cost_metrics, peak_flops, step_timings
from ee_megatron.types import Group, Rollout

DIMS = dims_from_config(published_config("SmolLM2-135M"))
OUTCOMES = (10, 20, 30)


def config(**settings) -> RunConfig:
    cfg = RunConfig(name="x")
    cfg.exits.depths = list(OUTCOMES[:-1])
    for key, value in settings.items():
        *path, name = key.split("__")
        setattr(functools.reduce(getattr, path, cfg), name, value)
    return cfg


LAYOUT = Layout.of(config(), DIMS)
EARLY = Layout.of(config(exits__first_token=True), DIMS)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(1, 300), st.lists(st.sampled_from(OUTCOMES), max_size=40)), min_size=1))
def test_generation_is_counted_as_the_answers_are_one_by_one(answers) -> None:
    prompts = [prompt for prompt, _ in answers]
    for layout, first in ((LAYOUT, 30), (EARLY, 10), (EARLY, 30)):
        depths, early = [np.array([first, *taken], dtype=np.int32) for _, taken in answers], layout.spec.first_token
        found = decode_cost(layout, Load.counted(prompts, depths, 30, first_token=early))
        found += sum(prefill_cost(DIMS, prompt - early) for prompt in prompts)
        each = [
            answer_cost(DIMS, OUTCOMES[:-1], 2, p, d.tolist(), first_token=early)
            for p, d in zip(prompts, depths, strict=True)
        ]
        assert found == pytest.approx(sum(each), rel=1e-12)


@pytest.mark.parametrize("how", [PassMode(train=False), PassMode(train=False, policy=False), PassMode(train=True)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("layout", [LAYOUT, EARLY], ids=["prompts never exit", "first token exits"])
def test_equal_answers_cost_what_is_planned_of_them(layout: Layout, how: PassMode, group: int) -> None:
    later, first = [10, 20, 20, 30] * 5, layout.spec.first_token
    taken = [np.array([*[30] * (not first), *np.roll(later, i)]) for i in range(8)]
    made = Load.counted([50] * 8, taken, 30, group, first_token=first)
    load = Workload(50, len(taken[0]), OUTCOMES, (0.25, 0.5, 0.25), first_token=first)
    planned = whole_pass(layout, load.in_groups(group), 8, how)
    # Which of the tokens leave early changes what attention sees, a little.
    assert whole_pass(layout, made, 1, how) == pytest.approx(planned, rel=2e-3)
    assert decode_cost(layout, made) == pytest.approx(8 * decode_cost(layout, load), rel=2e-3)


def rollout(prompt: int, taken: list[int]) -> Rollout:
    length = len(taken)
    zeros = np.zeros(length, dtype=np.float32)
    return Rollout(
        "p", np.arange(prompt, dtype=np.int32), tokens=np.arange(length, dtype=np.int32),
        exit_depths=np.array(taken, dtype=np.int32), token_logprobs=zeros, exit_logprobs=zeros, text="",
        finished=True, weight_version=1,
    )  # fmt: skip


def step(cfg: RunConfig, kept=range(8), positions: int = 0, passed=None, slots: int = 400) -> dict[str, float]:
    size, load = cfg.rl.group_size, [30] + [10, 20, 30, 30] * 5
    groups = [Group(None, [rollout(40, load) for _ in range(size)], None, None, None) for _ in range(2)]
    whole = 2 * (40 + size * 20 + (size - 1))
    packed = SimpleNamespace(positions=positions or whole, slots=slots, micro_batches=3)
    return cost_metrics(cfg, DIMS, groups, list(kept), packed, passed)


def test_a_steps_flops_are_those_that_a_plan_of_it_has() -> None:
    cfg = config(rl__prompts_per_step=2, rl__group_size=4, parallel__tokens_per_micro_batch=4096)
    found = step(cfg)
    load = Workload(40, 21, OUTCOMES, (0.25, 0.25, 0.5))
    planned = phase_flops(LAYOUT, load, cfg)
    assert found["flops/rollout"] == pytest.approx(planned["rollouts"], rel=2e-3)
    assert found["flops/score"] == pytest.approx(planned["scoring"], rel=2e-3)
    assert found["flops/update"] == pytest.approx(planned["update"], rel=2e-3)
    assert found["padding"] == pytest.approx(1 - (2 * (40 + 4 * 20 + 3)) / 400) and found["micro_batches"] == 3
    # Whoever shares the work, and without what is recomputed.
    shared = config(
        rl__prompts_per_step=2, rl__group_size=4, parallel__tensor=3, parallel__pipeline=3, parallel__recompute=True
    )
    assert step(shared) == found
    # Answers that are left out teach nothing; more updates, each but the first with its scores.
    assert step(cfg, kept=range(4, 8))["flops/update"] == pytest.approx(found["flops/update"] / 2)
    twice = config(rl__prompts_per_step=2, rl__group_size=4, rl__minibatches=2)
    scored = whole_pass(LAYOUT, load.in_groups(4), 8, PassMode(train=False))
    assert step(twice)["flops/update"] == pytest.approx(found["flops/update"] + scored / 2, rel=2e-3)
    # Prompts that lay in strips of their own were run again.
    assert step(cfg, positions=8 * 60)["flops/score"] > 1.5 * found["flops/score"]


def test_where_nothing_is_scored_the_update_tells_how_much_of_the_prompts_was_shared() -> None:
    settings = dict(rl__prompts_per_step=2, rl__group_size=4, rl__kl_penalty__kind="exact", rl__skip_scoring=True)
    kept = [0, 1, 2, 4]
    # Three answers of one group, which share its prompt, and one of the other.
    together = (40 + 3 * 20 + 2) + (40 + 20)
    found = step(config(**settings), kept, positions=together, passed=kept)
    assert found["flops/score"] == 0 and found["padding"] == pytest.approx(1 - together / 400)
    scored = step(config(**{**settings, "rl__skip_scoring": False}), kept)
    assert found["flops/update"] == pytest.approx(scored["flops/update"])
    apart = step(config(**settings), kept, positions=4 * 60, passed=kept)
    assert apart["flops/update"] > 1.3 * found["flops/update"]
    # No answer was learned from, so that there was no pass at all.
    none = step(config(**settings), [], positions=1, passed=[], slots=0)
    assert none["flops/update"] == none["padding"] == 0


def test_what_a_device_made_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"tokens": 1200.0, "flops/rollout": 1e13, "flops/score": 4e13, "flops/update": 8e13}
    seconds = {"sync": 1.0, "rollout": 4.0, "verify": 0.5, "score": 2.0, "update": 5.0, "step": 14.0}
    cfg = config(parallel__data=4, rollout__actors=2, rollout__backend="vllm", rollout__vllm=VllmConfig(tensor=3))
    found = step_timings(cfg, values, seconds, peak_flops("cpu", torch.bfloat16))
    assert found["tokens_per_s_device/rollout"] == 1200 / 4 / 6 and found["tokens_per_s_device/score"] == 1200 / 2 / 4
    assert found["flops_per_s_device/update"] == 8e13 / 5 / 4
    # No data sheet knows this CPU.
    assert not any(name.startswith("mfu/") for name in found)

    def peak() -> float:
        return peak_flops("cuda", torch.bfloat16)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert step_timings(cfg, values, seconds, peak())["mfu/update"] == pytest.approx(8e13 / 5 / 4 / 989e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert "mfu/update" not in step_timings(cfg, values, seconds, peak())
    # A phase without work has no speed.
    assert not any(name.endswith("/score") for name in step_timings(cfg, values | {"flops/score": 0.0}, seconds, 0.0))
    # Nobody waited for all of what was made beside learning.
    cfg.rollout.max_staleness = 1
    assert not any(name.endswith("/rollout") for name in step_timings(cfg, values, seconds, 0.0))


def test_boards_are_known_by_name() -> None:
    assert devices.board("NVIDIA A100-SXM4-80GB") is devices.DEVICES["A100"]
    assert devices.board("NVIDIA GeForce RTX 4090") is None


def test_no_answers_are_no_work() -> None:
    cfg = config(rl__prompts_per_step=1, rl__group_size=1)
    found = step_flops(LAYOUT, cfg, [5], [np.array([30])], [], 1.0)
    assert found["update"] == 0 and found["rollout"] == prefill_cost(DIMS, 5)
