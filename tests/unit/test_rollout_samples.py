"""RL's rollouts that are kept for the report: few, at set steps, long answers without their middle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ee_megatron.observe.rundir import RunDirectory
from ee_megatron.training.serialization import PER_STEP, STEPS, TOKENS, keep_samples, sampled_steps
from ee_megatron.types import Group, Prompt, Rollout


def group(name: str, lengths: list[int]) -> Group:
    rollouts = [
        Rollout(name, np.arange(3), np.arange(n), np.full(n, 2), np.zeros(n), np.zeros(n), "", True, 1) for n in lengths
    ]
    rights = np.arange(len(lengths)) % 2
    return Group(Prompt(name, f"What is {name}?", "7", "sum"), rollouts, rights.astype(np.float32), rights == 1, rights)


def test_steps_are_few_and_hold_the_first_and_the_last() -> None:
    for steps in (1, 2, STEPS, 20, 1000):
        found = sampled_steps(steps)
        assert len(found) == min(STEPS, steps) and {1, steps} <= found and found <= set(range(1, steps + 1))


def test_answers_to_several_problems_are_kept_with_both_ends_of_long_ones(tmp_path: Path) -> None:
    with RunDirectory(tmp_path) as directory:
        keep_samples(directory, 5, [group("a", [TOKENS + 30, 1]), group("b", [4, 2])], str)
        first = (tmp_path / "samples" / "step_5.json").read_bytes()
        keep_samples(directory, 5, [group("a", [TOKENS + 30, 1]), group("b", [4, 2])], str)
    assert (tmp_path / "samples" / "step_5.json").read_bytes() == first, "a step that is done again changes nothing"
    kept = json.loads(first)
    assert kept["step"] == 5 and len(kept["rollouts"]) == PER_STEP
    long, other, second = kept["rollouts"]
    assert [r["prompt"] for r in (long, other, second)] == ["What is a?", "What is b?", "What is a?"]
    assert long["left_out"] == 30 and len(long["tokens"]) == TOKENS and long["tokens"][-1]["text"] == str(TOKENS + 29)
    assert other["left_out"] == 0 and [t["depth"] for t in other["tokens"]] == [2] * 4
    assert (other["correct"], second["correct"], second["reward"]) == (False, True, 1.0)
