"""The pool in process: picked by name, holds what it was given, refuses what arrives damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ee_megatron.config.derive import call_timeout, position_bytes
from ee_megatron.config.schema import RolloutConfig
from ee_megatron.exit_rules import Fixed, Off
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.rollout import GenerationRequest, LocalPool, SamplingParams, make_pool
from ee_megatron.rollout.engine.cache import KVCache
from ee_megatron.rollout.pool.transport import narrowed
from ee_megatron.rollout.pool.vllm import EngineDied, EngineProcess
from ee_megatron.rollout.vllm.engine import EngineSettings
from ee_megatron.tensors import HeldStream
from ee_megatron.types import Prompt
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)


def test_the_local_pool_holds_versions_and_refuses_damaged_weights(tmp_path: Path):
    path = tiny_hf("llama", tmp_path)
    pool = make_pool(RolloutConfig("local", max_num_seqs=4, threads=0), path, SPEC, torch.float32, "cpu")
    assert isinstance(pool, LocalPool)
    prompts = [Prompt("a", "1 + 1 =", "2", "")]
    assert pool.health()["digest"] == "teacher"
    good = WeightSet(5, initial_policy(HFDirectory(path).dims, SPEC, 0))
    pool.load(good)
    (answers,) = pool.generate(GenerationRequest(prompts, 2, SamplingParams(1.0, 8), Fixed(2), 0))
    assert [r.weight_version for r in answers] == [5, 5] and pool.health()["digest"] == good.digest
    kl = [score.divergence for score in pool.score(answers)]
    # Early exits diverge; the first token comes from full depth, where untrained adapters change nothing.
    assert all(abs(entry[0]) < 1e-5 and (entry[1:] > 1e-4).all() for entry in kl)
    again = pool.generate(GenerationRequest(prompts, 2, SamplingParams(1.0, 8), Fixed(2), 0))[0]
    assert pool.health()["version"] == 5 and np.array_equal(again[0].tokens, answers[0].tokens)


def test_weights_that_come_in_blocks_are_those_that_come_whole(tmp_path: Path, monkeypatch):
    path = tiny_hf("llama", tmp_path)
    pool = make_pool(RolloutConfig("local", max_num_seqs=4, threads=0), path, SPEC, torch.float32, "cpu")
    whole = WeightSet(5, initial_policy(HFDirectory(path).dims, SPEC, 0))
    monkeypatch.setattr("ee_megatron.tensors.BLOCK_BYTES", 200)
    taken = pool.store_weights(5, HeldStream(whole.tensors))
    assert (taken.version, taken.digest) == (5, whole.digest)
    pool.load(taken)
    assert pool.health()["digest"] == whole.digest


def test_a_cache_with_a_limit_is_never_exceeded_and_changes_no_answer(tmp_path: Path, monkeypatch):
    path, held = tiny_hf("llama", tmp_path), 160
    gib = held * position_bytes(HFDirectory(path).dims, 4) / 2**30
    most = []
    monkeypatch.setattr(
        KVCache, "_resize", lambda self, pages, old=KVCache._resize: most.append(pages) or old(self, pages)
    )
    asked = GenerationRequest(
        [Prompt(f"p{i}", f"{i} + 1 =", "", "") for i in range(6)], 2, SamplingParams(1.0, 40), Off(), 0
    )
    texts = []
    for limit in (0.0, gib):
        most.clear()
        rollout = RolloutConfig("local", max_num_seqs=12, threads=1, max_new_tokens=40, cache_gib=limit)
        answers = make_pool(rollout, path, SPEC, torch.float32, "cpu").generate(asked)
        texts.append([answer.tokens.tolist() for group in answers for answer in group])
        assert (max(most) <= held // 16) == bool(limit)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("backend", ["local", "ray", "vllm"])
def test_a_cache_that_no_longest_answer_fits_is_refused_before_anything_starts(backend: str, tmp_path: Path):
    """In float32 it holds half of what bfloat16 would."""
    path = tiny_hf("llama", tmp_path)
    gib = 500 * position_bytes(HFDirectory(path).dims, 4) / 2**30
    with pytest.raises(ValueError, match=r"\b500\b.*rollout\.max_new_tokens=500.*\b501\b"):
        make_pool(RolloutConfig(backend, max_new_tokens=500, cache_gib=gib), path, SPEC, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_vllm_runs_without_expandable_segments(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Launchers switch them on; the rest of the allocator's settings is passed on."""
    python, environment = tmp_path / "python", tmp_path / "environment"
    python.write_text(f"#!/bin/sh\nenv > {environment}\n")
    python.chmod(0o755)
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(EngineDied):
        EngineProcess(str(python), EngineSettings("", None, torch.float32), {}, 60)
    assert f"{name}=max_split_size_mb:64,expandable_segments:False" in environment.read_text().splitlines()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_narrowed_on_their_way_are_what_the_pool_holds(dtype, tmp_path: Path):
    path = tiny_hf("llama", tmp_path)
    pool = LocalPool(path, SPEC, dtype, sync_dtype=torch.bfloat16)
    weights = WeightSet(3, initial_policy(HFDirectory(path).dims, SPEC, 0))
    pool.load(weights)
    assert pool.version == 3
    assert pool.health()["digest"] == narrowed(weights, torch.bfloat16, dtype).digest != weights.digest


def test_a_call_may_take_as_long_as_its_answers_are_long():
    short, long = (call_timeout(RolloutConfig(max_new_tokens=tokens)) for tokens in (4, 4000))
    assert 0 < short < long and call_timeout(RolloutConfig(timeout_s=7.0)) == 7.0


def test_a_missing_model_is_refused(tmp_path: Path):
    for backend in ("local", "ray"):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            make_pool(RolloutConfig(backend), tmp_path, None, torch.float32, "cpu")
