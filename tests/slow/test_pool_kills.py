"""Ten actors killed at random moments of a batch, ten more round weight syncs: nothing lost, twice or mixed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from pool_cases import ADAPTERS, EXITS, FULL, LONG, PROMPTS, Killer, bits, make, policy

from ee_megatron.rollout import GenerationRequest
from tests.tiny import tiny_hf


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0])
def test_ten_kills_in_a_run_of_batches_change_no_bit(tmp_path: Path, seed: int):
    path = tiny_hf("qwen3", tmp_path / "model")
    pool = make(path, ADAPTERS, budget=100)
    try:
        weights = policy(path, ADAPTERS, 1)
        pool.load(weights)
        expected = bits(pool.generate(GenerationRequest(PROMPTS, 8, LONG, EXITS, seed)))
        rounds = 0
        with Killer(pool, kills=10, apart=3.0, seed=seed) as killer:
            while len(killer.struck) < 10:
                found = pool.generate(GenerationRequest(PROMPTS, 8, LONG, EXITS, seed))
                rounds += 1
                assert bits(found) == expected
        assert bits(pool.generate(GenerationRequest(PROMPTS, 8, LONG, EXITS, seed))) == expected
        assert pool.health()["restarts"] == 10
        print(f"{len(killer.struck)} kills in {rounds} batches")
    finally:
        pool.close()


@pytest.mark.timeout(900)
def test_ten_kills_round_weight_syncs_leave_no_rollout_under_mixed_weights(tmp_path: Path):
    path = tiny_hf("llama", tmp_path / "model", hidden=256, intermediate=768)
    pool = make(path, FULL, budget=100)
    try:
        versions = [policy(path, FULL, version) for version in (1, 2)]
        expected = []
        for weights in versions:
            pool.load(weights)
            expected.append(bits(pool.generate(GenerationRequest(PROMPTS[:8], 1, LONG, EXITS, 0))))
        assert expected[0] != expected[1]
        with Killer(pool, kills=10, apart=0.05, seed=1, syncing=True) as killer:
            turn = 0
            while len(killer.struck) < 10:
                weights = versions[turn % 2]
                pool.load(weights)
                found = pool.generate(GenerationRequest(PROMPTS[:8], 1, LONG, EXITS, 0))
                assert bits(found) == expected[turn % 2]
                turn += 1
        assert len(killer.loading) >= 5
        pool.load(versions[0])
        pool.check(versions[0])
        assert pool.health()["alive"] == 2
        print(f"{len(killer.struck)} kills in {turn} rounds, {len(killer.loading)} of them during a sync")
    finally:
        pool.close()
