"""The rollouts of a step on disk, so that a run can be looked at or trained again without a pool.

step_N/rollouts.safetensors: all sequences end to end; step_N/rollouts.jsonl: one JSON line per rollout. No pickle.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..observe.rundir import atomic_directory
from ..types import Group, Prompt, Rollout

_PER_TOKEN = ("tokens", "exit_depths", "token_logprobs", "full_logprobs", "exit_logprobs", "weight_versions")


def save_rollouts(directory: Path, groups: list[Group]) -> None:
    """Write one step's groups (at least one) as a directory that appears whole."""
    rollouts = [r for group in groups for r in group.rollouts]
    arrays = {name: np.ascontiguousarray(np.concatenate([getattr(r, name) for r in rollouts])) for name in _PER_TOKEN}
    arrays["prompt_tokens"] = np.concatenate([r.prompt_tokens for r in rollouts])
    arrays["lengths"] = np.array([[len(r.prompt_tokens), r.length] for r in rollouts], dtype=np.int64)
    arrays["rewards"] = np.concatenate([group.rewards for group in groups])
    lines = [
        {
            "prompt": asdict(group.prompt),
            "text": rollout.text,
            "finished": bool(rollout.finished),
            "weight_version": int(rollout.weight_version),
            "correct": bool(group.correct[k]),
            "well_formed": bool(group.well_formed[k]),
        }
        for group in groups
        for k, rollout in enumerate(group.rollouts)
    ]
    with atomic_directory(directory) as temporary:
        save_file(arrays, temporary / "rollouts.safetensors")
        (temporary / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_rollouts(directory: Path) -> list[Group]:
    """Read what `save_rollouts` wrote; neighbours with one prompt are a group. Raises FileNotFoundError."""
    if not (directory / "rollouts.safetensors").is_file():
        raise FileNotFoundError(
            f"{directory}: no rollouts there; make them with rl.dump_rollouts=true, and give rl.replay the rollouts "
            "directory of that stage"
        )
    arrays = load_file(directory / "rollouts.safetensors")
    lines = [json.loads(line) for line in (directory / "rollouts.jsonl").read_text().splitlines()]
    prompts = np.split(arrays["prompt_tokens"], np.cumsum(arrays["lengths"][:, 0])[:-1])
    parts = {name: np.split(arrays[name], np.cumsum(arrays["lengths"][:, 1])[:-1]) for name in _PER_TOKEN}
    found: list[tuple[Prompt, Rollout, float, dict]] = []
    for index, line in enumerate(lines):
        prompt = Prompt(**line["prompt"])
        rollout = Rollout(
            prompt_id=prompt.id,
            prompt_tokens=prompts[index],
            text=line["text"],
            finished=line["finished"],
            weight_version=line["weight_version"],
            **{name: values[index] for name, values in parts.items()},
        )
        found.append((prompt, rollout, float(arrays["rewards"][index]), line))
    groups: list[Group] = []
    start = 0
    for index in range(1, len(found) + 1):
        if index == len(found) or found[index][0].id != found[start][0].id:
            part = found[start:index]
            groups.append(
                Group(
                    part[0][0],
                    [rollout for _, rollout, _, _ in part],
                    np.array([reward for _, _, reward, _ in part], dtype=np.float32),
                    np.array([line["correct"] for *_, line in part]),
                    np.array([line["well_formed"] for *_, line in part]),
                )
            )
            start = index
    return groups
