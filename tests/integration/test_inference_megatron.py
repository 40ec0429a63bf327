"""The Python API on what needs megatron-core or a whole model's tensors: Megatron checkpoints, full fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ee_megatron import EarlyExitModel
from ee_megatron.convert import main as convert
from ee_megatron.families import FAMILIES
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec, save_policy
from tests.reference import random_policy
from tests.tiny import NOT_IN_MEGATRON, tiny_hf

SPEC = PolicySpec(6, (2, 4), rank=2, alpha=4.0)
FLOAT32 = {"dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_IN_MEGATRON])
def test_a_megatron_checkpoint_answers_as_what_it_was_made_of(tmp_path: Path, family: str) -> None:
    base = tiny_hf(family, tmp_path / "base", tied=family == "llama")
    policy = tmp_path / "policy"
    policy.mkdir()
    save_policy(policy, SPEC, random_policy(HFDirectory(base).dims, SPEC))
    out = tmp_path / "megatron"
    assert (
        convert(["import", "--hf", str(base), "--policy", str(policy), "--out", str(out), "--tp", "2", "--quiet"]) == 0
    )
    expected, found = EarlyExitModel.load(base, policy, **FLOAT32), EarlyExitModel.load(out, **FLOAT32)
    assert found.exit_depths == (2, 4) and found.has_gates and found.name == "megatron-gates"
    made = [m.generate(["1 + 1 =", "abc"], "threshold:0.5", max_new_tokens=10) for m in (expected, found)]
    for one, other in zip(*made, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.depths.tolist() == other.depths.tolist()
    logits = [m.readout("1 + 1 = 2", full=True).logits for m in (expected, found)]
    torch.testing.assert_close(logits[0], logits[1])
    assert len(set(made[0][0].depths.tolist())) > 1


def test_a_fully_fine_tuned_policy_takes_the_place_of_its_base(tmp_path: Path) -> None:
    base, other = tiny_hf("qwen2", tmp_path / "base", seed=0), tiny_hf("qwen2", tmp_path / "other", seed=1)
    spec = replace(SPEC, rank=0, full=True)
    source = HFDirectory(other)
    gates = random_policy(source.dims, replace(SPEC, rank=0))
    policy = tmp_path / "policy"
    policy.mkdir()
    save_policy(policy, spec, {**{name: source.tensor(name) for name in source.names()}, **gates})
    tuned, meant = EarlyExitModel.load(base, policy, **FLOAT32), EarlyExitModel.load(other, **FLOAT32)
    logits = [m.readout("1 + 1 = 2", at=[6], full=True).logits for m in (tuned, meant)]
    torch.testing.assert_close(logits[0], logits[1])
