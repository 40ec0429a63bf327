"""One step of RL on answers of up to 16,384 tokens, on two ranks, against the reference, a sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import Ranks

from ee_megatron.config.schema import DepthPenalty, KLPenalty, RLConfig
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from ee_megatron.types import Group, Prompt, Rollout
from tests.reference import Reference, random_policy
from tests.tiny import tiny_hf

SPEC = PolicySpec(3, (1, 2), rank=4, alpha=8.0)
LONGEST, PROMPTS, SAMPLES = 16_384, 4, 4
GIB = 2**30


def make_groups(seed: int = 0) -> list[Group]:
    """Answers of 200 tokens to `LONGEST`, with drawn exits; log-probabilities as if they had been sampled just now."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.uniform(np.log(200), np.log(LONGEST), (PROMPTS, SAMPLES))).astype(int)
    lengths[0, 0] = LONGEST
    groups = []
    for p in range(PROMPTS):
        prompt = generator.integers(0, 128, 40 + 20 * p)
        rollouts = []
        for n in lengths[p]:
            depths = np.concatenate([[3], generator.choice([1, 2, 3], n - 1)]).astype(np.int32)
            logprobs = generator.normal(-4.9, 0.3, n).astype(np.float32)
            exits = generator.normal(-1.0, 0.2, n).astype(np.float32)
            exits[0] = 0
            tokens = generator.integers(0, 128, n)
            rollouts.append(Rollout(f"p{p}", prompt, tokens, depths, logprobs, exits, "", True, 1))
        rewards = generator.permutation([1.0, -1.0, 1.0, -1.0]).astype(np.float32)
        groups.append(Group(Prompt(f"p{p}", "", "", "t"), rollouts, rewards, rewards > 0, rewards > 0))
    return groups


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("degrees", "stages"), [((1, 2, 1), (1, 2)), ((1, 1, 2), (3,)), ((2, 1, 1), (3,))], ids=str)
def test_gradients_of_a_step_on_long_answers_are_the_references(degrees, stages, tmp_path):
    path = tiny_hf(
        "llama", tmp_path / "model", layers=3, hidden=32, heads=4, kv_heads=2, intermediate=48,
        max_position_embeddings=2 * LONGEST,
    )  # fmt: skip
    policy, groups = random_policy(HFDirectory(path).dims, SPEC), make_groups()
    rl = RLConfig(
        prompts_per_step=PROMPTS,
        group_size=SAMPLES,
        kl_penalty=KLPenalty(weight=0.1),
        depth_penalty=DepthPenalty(weight=0.5),
    )
    with Ranks(2, tmp_path / "ranks") as ranks:
        found = ranks.call(
            "long_cases:step", timeout=900, path=path, spec=SPEC, policy=policy, degrees=degrees, stages=stages,
            groups=groups, rl=rl,
        )  # fmt: skip
    peak = sum(rank["peak"] for rank in found)
    print(f"{degrees}: {found[0]['seconds']}, peak {peak / GIB:.1f} GiB on both ranks, packed {found[0]['packed']}")
    assert peak < 24 * GIB

    batch, weights = found[0]["batch"], found[0]["weights"]
    for value in policy.values():
        value.requires_grad_()
    reference = Reference(path, SPEC, policy, attention="sdpa")
    for row in range(batch.rows):
        n = int(batch.lengths()[row])
        tokens, depths = batch.tokens[row : row + 1, :n], batch.exit_depths[row : row + 1, :n]
        streams = reference.stream(tokens, depths)
        log_q = reference.log_q(reference.ask(streams), depths) * batch.gate_mask[row, :n]
        labels = batch.labels()[row, :n].view(1, -1, 1)
        log_p = reference.read_out(streams).log_softmax(-1).gather(-1, labels)[..., 0] * batch.loss_mask[row, :n]
        (-(log_p * weights.token[row, :n]).sum() - (log_q * weights.exit[row, :n]).sum()).backward()
        for score, wanted in (("token_logprobs", log_p), ("exit_logprobs", log_q)):
            torch.testing.assert_close(found[0][score][row, :n], wanted[0].detach(), rtol=1e-4, atol=1e-4)
    gradients = found[0]["gradients"]
    assert gradients.keys() == policy.keys()
    for name, value in policy.items():
        error = float((gradients[name] - value.grad).norm() / value.grad.norm())
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
