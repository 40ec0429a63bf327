"""Rollouts of coming steps made while the learner trains: which weights, which prompts, and the same after a kill."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from pool_cases import bits

from ee_megatron.config.load import load
from ee_megatron.exit_rules import Off, Sample
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import WeightSet, initial_policy
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.tensors import HeldStream, collect
from ee_megatron.training.collect import (
    Collected,
    Collector,
    WeightHistory,
    check_versions,
    step_prompts,
    version_for,
)
from ee_megatron.training.context import StageContext
from ee_megatron.types import Group
from tests.covering import EXTENDED
from tests.tiny import tiny_hf

STEPS = 6
SETTINGS = [
    "name=ahead", "device=cpu", "model.dtype=float32", "exits.depths=[1,3,4]", "adapter.rank=4", f"rl.steps={STEPS}",
    "rl.prompts_per_step=4", "rl.group_size=2", "task.train=14", "rollout.max_new_tokens=12", "rollout.threads=1",
    "rollout.max_num_seqs=8", "teacher=null", "tracker.wandb=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("qwen2", tmp_path_factory.mktemp("model"))


def open_context(path: Path, folder: Path, *extra: str) -> StageContext:
    cfg = load([*SETTINGS, f"model.path={path}", f"runs={folder / 'runs'}", *extra])
    return StageContext(cfg, "rl", path, learner=False)


def weights(context: StageContext, version: int) -> WeightSet:
    tensors = initial_policy(HFDirectory(context.model_path).dims, context.spec, seed=version)
    generator = torch.Generator().manual_seed(version)
    return WeightSet(version, {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()})


def quiet(*_: object) -> None:
    """Progress of nobody's interest."""


def collected(actor: Collector, context: StageContext, step: int) -> Collected:
    """A step's rollouts, under weights that come as a learner's do."""
    version = actor.sync_weights(step + 1, HeldStream(weights(context, step + 1).tensors))
    return actor.collect(version, step, quiet)


def act(actor: Collector, context: StageContext, step: int) -> list[Group]:
    return collected(actor, context, step).groups


def answers(groups: list[Group]) -> list[tuple]:
    return bits([group.rollouts for group in groups])


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_every_step_takes_its_own_prompts_from_weights_exactly_so_many_versions_old(
    path: Path, tmp_path: Path, staleness: int
):
    with open_context(path, tmp_path, "rollout.backend=local", f"rollout.max_staleness={staleness}") as context:
        actor = Collector(context)
        rl = context.cfg.rl
        steps = [collected(actor, context, step) for step in range(STEPS)]
        found = [step.groups for step in steps]
        alone = LocalPool(path, context.spec, rows=8)
        for step, groups in enumerate(found):
            version = max(1, step + 1 - staleness)
            assert {r.weight_version for g in groups for r in g.rollouts} == {version}
            alone.load(weights(context, version))
            prompts = step_prompts(actor.prompts, step, rl)
            sampling = SamplingParams(rl.temperature, 12, tuple(context.cfg.rollout.stop))
            seed = rl.seed * 1_000_003 + step
            assert answers(groups) == bits(alone.generate(GenerationRequest(prompts, 2, sampling, Sample(), seed)))
            assert [g.prompt for g in groups] == prompts
        assert steps[-1].health["staleness"] == staleness
        # 14 prompts, 4 a step: three steps and a half are one pass.
        used = [g.prompt.id for groups in found for g in groups]
        assert len(set(used[:14])) == 14 and not actor._pending


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_run_that_is_killed_and_resumed_gives_the_same_rollouts(path: Path, tmp_path: Path, killed_after: int):
    settings = "rollout.backend=local", "rollout.max_staleness=2"
    with open_context(path, tmp_path / "straight", *settings) as context:
        actor = Collector(context)
        straight = [answers(act(actor, context, s)) for s in range(STEPS)]
    found = []
    for steps in (range(killed_after), range(killed_after, STEPS)):
        with open_context(path, tmp_path / "killed", *settings) as context:
            actor = Collector(context)
            found += [answers(act(actor, context, s)) for s in steps]
    assert found == straight


@EXTENDED
def test_actors_work_while_the_learner_does_and_give_what_the_local_pool_gives(path: Path, tmp_path: Path):
    settings = "rollout.backend=ray", "rollout.actors=2", "rollout.max_staleness=1"
    with open_context(path, tmp_path / "ray", *settings) as context:
        actor = Collector(context)
        found = [act(actor, context, 0)]
        # Nobody waits for step 1's rollouts here, and they get done.
        deadline = time.monotonic() + 60
        while not actor._pending[1].done.is_set():  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found += [act(actor, context, step) for step in range(1, 3)]
        last = collected(actor, context, 3)
        found.append(last.groups)
        assert last.health["actors_alive"] >= 1
    with open_context(path, tmp_path / "local", "rollout.backend=local", "rollout.max_staleness=1") as context:
        actor = Collector(context)
        for step, groups in enumerate(found):
            ours = act(actor, context, step)
            assert [entry[:6] for entry in answers(groups)] == [entry[:6] for entry in answers(ours)]
            assert [list(g.rewards) for g in groups] == [list(g.rewards) for g in ours]


def test_old_rollouts_are_never_handed_out_and_old_weights_not_kept(path: Path, tmp_path: Path):
    assert [version_for(step, 2) for step in range(5)] == [1, 1, 1, 2, 3]
    with open_context(path, tmp_path, "rollout.backend=local") as context:
        pool = LocalPool(path, context.spec)
        pool.load(weights(context, 3))
        prompts = step_prompts(context.make_task().prompts("train"), 0, context.cfg.rl)
        old = pool.generate(GenerationRequest(prompts, 1, SamplingParams(1.0, 4), Off(), 0))
        check_versions(old, 4, 1)
        with pytest.raises(RuntimeError, match=r"\[3\].*\b4\b.*\b5\b.*rollout\.max_staleness=1"):
            check_versions(old, 5, 1)
        with pytest.raises(RuntimeError, match=r"\[3\].*\b1\b.*\b2\b"):
            check_versions(old, 2, 1)
        history = WeightHistory(tmp_path / "ahead", context.spec)
        for version in range(1, 6):
            whole = weights(context, version).tensors
            assert collect(history.keep(version, HeldStream(whole), oldest=version - 1)).keys() == whole.keys()
        assert sorted(p.name for p in (tmp_path / "ahead").iterdir()) == ["version_4", "version_5"]
        assert history.version(4, weights(context, 6)).digest == weights(context, 4).digest
        assert history.version(2, weights(context, 6)).version == 6
