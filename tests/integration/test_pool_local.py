"""The pool in process: picked by name, holds what it was given, refuses what arrives damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy
from ee_megatron.rollout import ExitPolicy, LocalPool, SamplingParams, make_pool
from ee_megatron.types import Prompt
from tests.tiny import tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=4, alpha=8.0)


def test_the_local_pool_holds_versions_and_refuses_damaged_weights(tmp_path: Path):
    path = tiny_hf("llama", tmp_path)
    pool = make_pool("local", path, SPEC, torch.float32, "cpu", rows=4, threads=0)
    assert isinstance(pool, LocalPool)
    prompts = [Prompt("a", "1 + 1 =", "2", "")]
    assert pool.health()["digest"] == "teacher"
    good = WeightSet(5, initial_policy(HFDirectory(path).dims, SPEC, 0))
    pool.load(good)
    (answers,) = pool.generate(prompts, 2, SamplingParams(1.0, 8), ExitPolicy("fixed", 2), seed=0)
    assert [r.weight_version for r in answers] == [5, 5] and pool.health()["digest"] == good.digest
    kl = pool.divergence_to_teacher(answers)
    # Early exits diverge; the first token comes from full depth, where untrained adapters change nothing.
    assert all(abs(entry[0]) < 1e-5 and (entry[1:] > 1e-4).all() for entry in kl)
    with pytest.raises(ValueError, match=r"version 6.*send them again"):
        pool.load(WeightSet(6, good.tensors, digest="0" * 64))
    again = pool.generate(prompts, 2, SamplingParams(1.0, 8), ExitPolicy("fixed", 2), seed=0)[0]
    assert pool.health()["version"] == 5 and np.array_equal(again[0].tokens, answers[0].tokens)


def test_an_unknown_backend_and_a_missing_model_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="expected 'local' or 'ray'"):
        make_pool("mpi", tmp_path, None, torch.float32, "cpu")
    for backend in ("local", "ray"):
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            make_pool(backend, tmp_path, None, torch.float32, "cpu")
