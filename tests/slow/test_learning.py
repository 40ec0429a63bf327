"""RL learns what it is rewarded for, over several seeds: on a task that a tiny model can solve, reward rises; depth
falls where it is charged for and does not where it isn't. A one-sided exact sign-flip test over seeds, not one run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ee_megatron.config.schema import DeepspeedConfig, DepthPenalty, KLPenalty, ParallelConfig, RLConfig
from ee_megatron.exit_rules import Sample
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.learner.learner import Learner
from ee_megatron.parallel import groups
from ee_megatron.parallel.groups import Degrees
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.rollout.engine.request import GenerationRequest
from ee_megatron.rollout.engine.sampling import SamplingParams
from ee_megatron.rollout.pool.local import LocalPool
from ee_megatron.training.advantages import StepScores, collate, compute_advantages
from ee_megatron.training.rl_metrics import rollout_metrics
from ee_megatron.training.update import objective_of
from ee_megatron.types import Group, Prompt
from tests.tiny import tiny_hf

SEEDS, STEPS, PROMPTS, SAMPLES = 8, 40, 8, 4
SPEC = PolicySpec(4, (1, 2, 3), rank=8, alpha=16.0)
RATE = 1e-2
# Exits that answer for their answer, as in the paper, or for what they cost themselves.
CREDITS = {
    "answer": {},
    "exit": {"credit": "exit", "charge": "right", "loss_average": "token", "kl": "reward"},
}


def reward(text: str) -> float:
    """The share of digits in the answer: learned by any model within minutes, at chance level at the start."""
    return sum(c.isdigit() for c in text) / max(1, len(text))


def run(folder, seed: int, lambda_exit: float, settings: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean task reward and mean depth of every step."""
    path = tiny_hf("llama", folder, layers=4, hidden=32, intermediate=64, seed=seed, scale=0.2)
    source = HFDirectory(path)
    policy = initial_policy(source.dims, SPEC, seed)
    for name in policy:
        if name.endswith("fc2.bias"):
            # Half-open gates: from shut ones there would be nothing to explore.
            policy[name].fill_(-1.0)
    parallel = ParallelConfig()
    learner = Learner(source, SPEC, policy, parallel, DeepspeedConfig(), device=torch.device("cpu"))
    pool = LocalPool(path, SPEC, rows=32)
    rl = RLConfig(
        group_size=SAMPLES,
        steps=STEPS,
        depth_penalty=DepthPenalty(weight=lambda_exit),
        kl_penalty=KLPenalty(weight=0.0),
        **settings,
    )
    prompts = [Prompt(f"p{i}", f"{i}:", "", "digits") for i in range(PROMPTS)]
    rewards, depths = [], []
    for step in range(STEPS):
        pool.load(WeightSet(step + 1, learner.export_policy()))
        answers = pool.generate(
            GenerationRequest(prompts, SAMPLES, SamplingParams(max_new_tokens=8), Sample(), seed * 1000 + step)
        )
        found = []
        for prompt, group in zip(prompts, answers, strict=True):
            task = np.array([reward(r.text) for r in group], dtype=np.float32)
            found.append(Group(prompt, group, task, task > 0.5, task > 0.5))
        batch = collate(found, 4)
        first = learner.score(batch, hazards=True)
        scores = StepScores(first, learner.score(batch, reference=True).token_logprobs)
        taught = compute_advantages(batch, found, scores, rl, SPEC.layout, lambda_depth=lambda_exit)
        objective = objective_of(rl, 8)
        weights, _ = objective.weights(batch, taught.experience, first.token_logprobs, first.exit_logprobs)
        learner.step(batch, weights, objective.kl.teacher, adapter_lr=RATE, gate_lr=RATE)
        rewards.append(float(taught.task_reward.mean()))
        depths.append(rollout_metrics(batch, found, 4)["mean_depth"])
    return np.array(rewards), np.array(depths)


def change(values: np.ndarray) -> float:
    """Mean of the last quarter minus mean of the first."""
    quarter = len(values) // 4
    return float(values[-quarter:].mean() - values[:quarter].mean())


def p_value(changes: np.ndarray) -> float:
    """One-sided, that the mean change is > 0: the share of all sign flips with as large a mean (Fisher 1935)."""
    flips = np.array(list(itertools.product((1, -1), repeat=len(changes))))
    return float(((flips * changes).mean(1) >= changes.mean() - 1e-12).mean())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("credited", CREDITS)
def test_reward_rises_and_depth_falls_only_where_it_costs(credited, tmp_path):
    torch.set_num_threads(1)
    groups.initialise(Degrees())
    found = {}
    for lambda_exit in (0.0, 0.5):
        runs = [run(tmp_path / f"{lambda_exit}-{seed}", seed, lambda_exit, CREDITS[credited]) for seed in range(SEEDS)]
        found[lambda_exit] = tuple(np.array([change(r[i]) for r in runs]) for i in (0, 1))
    groups.finish()
    report = {
        f"lambda {lam}": {
            name: f"{values.mean():+.3f} +- {values.std(ddof=1) / np.sqrt(SEEDS):.3f} (n={SEEDS})"
            for name, values in zip(("reward", "depth"), pair, strict=True)
        }
        for lam, pair in found.items()
    }
    print(report)
    for lam in found:
        assert p_value(found[lam][0]) < 0.01, report
    assert p_value(-found[0.5][1]) < 0.01, report
    assert p_value(found[0.0][1] - found[0.5][1]) < 0.01, report
    assert p_value(-found[0.0][1]) > 0.05, report
