"""A few of RL's rollouts over its course, kept for the report: samples/step_N.json in the stage's directory.

Every rollout is kept with rl.dump_rollouts=true instead; these are to be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..observe.rundir import RunDirectory
from ..types import Group

SAMPLES = "samples"
STEPS, PER_STEP, TOKENS = 8, 3, 400
"""So many steps of a run, the first and the last among them; answers of each, to as many problems where there are; and
tokens of an answer, of a longer one its two ends."""


def sampled_steps(steps: int) -> set[int]:
    """Which of `steps` steps, counted from 1."""
    return {int(step) for step in np.linspace(1, steps, min(STEPS, steps)).round()}


def keep_samples(directory: RunDirectory, step: int, groups: Sequence[Group], decode: Callable[[int], str]) -> None:
    """The first answers of as many groups as there are, as a file that appears whole; a step that is done again writes
    the same one."""
    chosen = [(group, k) for k in range(max(len(g.rollouts) for g in groups)) for group in groups]
    chosen = [(group, k) for group, k in chosen if k < len(group.rollouts)][:PER_STEP]
    entries = [_entry(group, k, decode) for group, k in chosen]
    directory.write_atomic(f"{SAMPLES}/step_{step}.json", json.dumps({"step": step, "rollouts": entries}))


def _entry(group: Group, k: int, decode: Callable[[int], str]) -> dict[str, Any]:
    rollout = group.rollouts[k]
    half, places = TOKENS // 2, list(range(rollout.length))
    kept = places if len(places) <= TOKENS else places[:half] + places[-half:]
    return {
        "prompt": group.prompt.text,
        "reference": group.prompt.answer,
        "correct": bool(group.correct[k]),
        "reward": float(group.rewards[k]),
        "left_out": rollout.length - len(kept),
        "tokens": [
            {
                "text": decode(int(rollout.tokens[t])),
                "depth": int(rollout.exit_depths[t]),
                "logprob": round(float(rollout.token_logprobs[t]), 5),
                "exit_logprob": round(float(rollout.exit_logprobs[t]), 5),
            }
            for t in kept
        ],
    }
