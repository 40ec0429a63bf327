"""Actors that are killed: in a batch, during a weight sync, with work of two versions under way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pool_cases import EXITS, FULL, LONG, PROMPTS, bits, killing, make, policy

from ee_megatron.rollout import GenerationRequest
from ee_megatron.rollout.pool.ray_pool import RayPool
from tests.covering import EXTENDED, SLOW
from tests.tiny import tiny_hf

pytestmark = EXTENDED


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pool(path: Path) -> Iterator[RayPool]:
    pool = make(path, FULL, budget=20)
    yield pool
    pool.close()


@SLOW
def test_a_batch_through_kills_has_the_same_bits(path: Path, pool: RayPool):
    pool.load(policy(path, FULL, 1))
    expected = bits(pool.generate(GenerationRequest(PROMPTS, 4, LONG, EXITS, 1)))
    before = pool.health()["restarts"]
    with killing(pool, kills=2, apart=0.3, seed=3) as struck:
        pending = pool.begin(policy(path, FULL, 1), GenerationRequest(PROMPTS, 4, LONG, EXITS, 1))
        found = pending.result()
    lost = pool.health()["restarts"] - before
    assert bits(found) == expected and [g[0].prompt_id for g in found] == [p.id for p in PROMPTS]
    assert struck and 1 <= lost <= 2
    assert len(pending.arguments) >= 8


def test_a_kill_during_a_weight_sync_never_leaves_mixed_weights(path: Path, pool: RayPool):
    weights = {version: policy(path, FULL, version) for version in (4, 5)}
    expected = {}
    for version in (4, 5):
        pool.load(weights[version])
        expected[version] = bits(pool.generate(GenerationRequest(PROMPTS[:16], 2, LONG, EXITS, 2)))
    with killing(pool, kills=1, apart=0.01, seed=5, syncing=True) as struck:
        for version in (4, 5, 4, 5):
            found = pool.begin(weights[version], GenerationRequest(PROMPTS[:16], 2, LONG, EXITS, 2)).result()
            assert bits(found) == expected[version]
    assert len(struck) == 1
    pool.load(weights[5])
    assert struck[0] not in pool.health()["pids"] and pool.health()["alive"] == 2
