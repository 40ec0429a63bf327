"""Ray actors: the same answers as in process, weights checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from pool_cases import ADAPTERS as SPEC
from pool_cases import EXITS, PROMPTS, make, policy
from safetensors.torch import save_file

from ee_megatron.exit_rules import Off, Threshold
from ee_megatron.policy import WeightSet
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams
from ee_megatron.rollout.pool.ray_pool import PutTensors, RayPool
from ee_megatron.rollout.pool.transport import narrowed, pack
from ee_megatron.tensors import FileTensors, HeldStream
from ee_megatron.types import Rollout
from tests.tiny import tiny_hf

SAMPLING, PROMPTS = SamplingParams(1.0, 24, ("~",)), PROMPTS[:24]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pool(path: Path) -> Iterator[RayPool]:
    pool = make(path, SPEC, budget=3)
    yield pool
    pool.close()


def flat(answers: list[list[Rollout]]) -> list[Rollout]:
    return [rollout for group in answers for rollout in group]


def same(found: list[list[Rollout]], expected: list[list[Rollout]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(flat(found), flat(expected), strict=True):
        for name in ("prompt_id", "text", "finished", "weight_version"):
            assert getattr(a, name) == getattr(b, name)
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.exit_depths, b.exit_depths)
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-4)
        np.testing.assert_allclose(a.exit_logprobs, b.exit_logprobs, atol=1e-4)


def test_actors_answer_as_the_local_pool_does(path: Path, pool: RayPool):
    local = LocalPool(path, SPEC, rows=8)
    # Teacher, then a policy: traces, answers and scores agree.
    local.load(None)
    pool.load(None)
    off = Off()
    taught = pool.generate(GenerationRequest(PROMPTS, 2, SAMPLING, off, 3))
    same(taught, local.generate(GenerationRequest(PROMPTS, 2, SAMPLING, off, 3)))
    ours, theirs = pool.trace(flat(taught), top_k=4), local.trace(flat(taught), top_k=4)
    for a, b in zip(ours, theirs, strict=True):
        assert a.prompt_id == b.prompt_id
        np.testing.assert_allclose(a.divergences, b.divergences, atol=1e-4)
    local.load(policy(path, SPEC, 7))
    pool.load(policy(path, SPEC, 7))
    seen: list[tuple[int, int]] = []
    expected = local.generate(GenerationRequest(PROMPTS, 4, SAMPLING, EXITS, 5))
    same(
        pool.generate(GenerationRequest(PROMPTS, 4, SAMPLING, EXITS, 5), progress=lambda *at: seen.append(at)), expected
    )
    assert seen[-1] == (96, 96) and len(seen) > 1
    several = GenerationRequest(PROMPTS, 2, SAMPLING, EXITS, 5).by(EXITS, Threshold(0.5), off)
    seen.clear()
    found = pool.generate(several, progress=lambda *at: seen.append(at))
    assert seen[-1] == (144, 144) == (several.answers, several.answers)
    for i, rule in enumerate(several.rules):
        same([group[2 * i : 2 * i + 2] for group in found], local.generate(several.by(rule)))
    for a, b in zip(pool.score(flat(expected)), local.score(flat(expected)), strict=True):
        np.testing.assert_allclose(a.divergence, b.divergence, atol=1e-4)
    for a, b in zip(pool.read_exits(flat(expected)), local.read_exits(flat(expected)), strict=True):
        np.testing.assert_allclose(a.divergences, b.divergences, atol=1e-4)
        np.testing.assert_allclose(a.hazards, b.hazards, atol=1e-4)
    assert pool.health()["version"] == 7 and pool.health()["alive"] == 2
    # Actors that have the next weights still to load are alive.
    later = pool.begin(policy(path, SPEC, 8), GenerationRequest(PROMPTS, 4, SAMPLING, EXITS, 5))
    assert pool.health()["version"] == 8 and pool.health()["alive"] == 2
    later.result()


def test_weights_go_into_the_store_as_they_come_and_are_those_that_were_sent(
    path: Path, pool: RayPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("ee_megatron.tensors.BLOCK_BYTES", 1000)
    monkeypatch.setattr("ee_megatron.rollout.pool.ray_pool.pack", partial(pack, chunk_bytes=5000))
    whole, other = policy(path, SPEC, 21), policy(path, SPEC, 22)
    taken = pool.store_weights(21, HeldStream(whole.tensors))
    assert isinstance(taken.tensors, PutTensors) and len(taken.tensors.chunks) > 5
    assert taken.digest == narrowed(whole, pool.sync_dtype, torch.float32).digest
    pool.load(taken)
    assert (pool.health()["version"], pool.health()["digest"]) == (21, taken.digest)
    asked, local = GenerationRequest(PROMPTS, 1, SAMPLING, EXITS, 5), LocalPool(path, SPEC, rows=8)

    def answers_as(weights: WeightSet) -> None:
        local.load(weights)
        same(pool.generate(asked), local.generate(asked))

    answers_as(whole)
    pool.load(other)
    answers_as(other)
    # What was put stays where it is for as long as somebody has it.
    pool.load(taken)
    answers_as(whole)
    save_file(other.tensors, tmp_path / "policy.safetensors")
    pool.load(WeightSet(22, FileTensors(tmp_path / "policy.safetensors")))
    answers_as(other)


def test_everything_that_listens_does_so_on_loopback(pool: RayPool):
    pool.load(None)
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    listening = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid in mine]
    assert listening
    assert {c.laddr.ip for c in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_an_actor_refuses_work_for_weights_that_it_does_not_hold(path: Path, pool: RayPool):
    import ray

    current = policy(path, SPEC, 2)
    pool.load(current)
    handle = pool._driver.places[0].handle
    for wrong in [(3, current.digest), (2, "0" * 64)]:
        with pytest.raises(ValueError, match="version"):
            ray.get(handle.call.remote(wrong, "generate", (PROMPTS, 1, SAMPLING, EXITS, 0)), timeout=60)
