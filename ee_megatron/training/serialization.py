"""Store traces, rollouts and evaluated answers on disk; samples of rollouts for the report.

NAME.safetensors: all sequences end to end; NAME.jsonl: one JSON line per sequence. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..evaluation.evaluate import GenerationResult
from ..observe.rundir import RunDirectory, atomic_directory
from ..rollout.engine.scoring import Score
from ..types import Group, Rollout, Trace

_OF_TRACES = ("tokens", "divergences", "topk_ids", "topk_logprobs", "entropy")
_OF_ROLLOUTS = ("tokens", "exit_depths", "token_logprobs", "full_logprobs", "exit_logprobs", "weight_versions")
_OF_SCORES = ("policy_logprobs", "exit_logprobs", "teacher_logprobs", "teacher_entropy", "divergence")


def save_traces(directory: Path, traces: Sequence[Trace]) -> None:
    """Write traces.safetensors and traces.jsonl (at least one trace) as a directory that appears atomically."""
    lines = [{"id": t.prompt_id, "correct": bool(t.correct), "text": t.text} for t in traces]
    _save(directory, "traces", traces, _OF_TRACES, lines)


def load_traces(directory: Path) -> list[Trace]:
    """Read the traces that `save_traces` wrote."""
    lines, pieces, _ = _load(directory, "traces", _OF_TRACES)
    return [
        Trace(prompt_id=line["id"], correct=line["correct"], text=line["text"], **piece)
        for line, piece in zip(lines, pieces, strict=True)
    ]


def save_rollouts(directory: Path, groups: list[Group]) -> None:
    """Write one step's groups (at least one) as a directory that appears atomically. A rollout's line has its prompt
    and verdict; the arrays are those of `Rollout`, and `rewards`."""
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
    rollouts = [r for group in groups for r in group.rollouts]
    rewards = np.concatenate([group.rewards for group in groups])
    _save(directory, "rollouts", rollouts, _OF_ROLLOUTS, lines, rewards=rewards)


def save_answers(directory: Path, answered: GenerationResult) -> None:
    """Write a set of answers (at least one, no `exits`) as a directory that appears atomically."""
    lines = [
        {"id": r.prompt_id, "text": r.text, "finished": bool(r.finished), "weight_version": int(r.weight_version)}
        | ({"drafted": r.drafted} if r.drafted else {})
        for r in answered.rollouts
    ]
    more = {} if answered.seconds is None else {"seconds": np.array([answered.seconds])}
    for name in _OF_SCORES if answered.scores is not None else ():
        more[f"score/{name}"] = np.concatenate([getattr(score, name) for score in answered.scores or ()])
    _save(directory, "answers", answered.rollouts, _OF_ROLLOUTS, lines, **more)


def load_answers(directory: Path) -> GenerationResult:
    """Read the set of `save_answers`. Raises OSError, ValueError, KeyError or SafetensorError for other content."""
    lines, pieces, arrays = _load(directory, "answers", _OF_ROLLOUTS)
    names = ("text", "finished", "weight_version")
    rollouts = [
        Rollout(prompt_id=line["id"], drafted=line.get("drafted", 0), **piece, **{name: line[name] for name in names})
        for line, piece in zip(lines, pieces, strict=True)
    ]
    scores = None
    if f"score/{_OF_SCORES[0]}" in arrays:
        ends = arrays["lengths"][:, 1].cumsum()[:-1]
        parts = [np.split(arrays[f"score/{name}"], ends) for name in _OF_SCORES]
        scores = [Score(*part) for part in zip(*parts, strict=True)]
    return GenerationResult(rollouts, scores, float(arrays["seconds"][0]) if "seconds" in arrays else None)


def _save(
    directory: Path,
    name: str,
    sequences: Sequence[Trace | Rollout],
    per_token: Sequence[str],
    lines: list[dict[str, Any]],
    **more: np.ndarray,
) -> None:
    arrays = {n: np.ascontiguousarray(np.concatenate([getattr(s, n) for s in sequences])) for n in per_token}
    arrays["prompt_tokens"] = np.concatenate([s.prompt_tokens for s in sequences])
    arrays["lengths"] = np.array([[len(s.prompt_tokens), len(s.tokens)] for s in sequences], dtype=np.int64)
    with atomic_directory(directory) as temporary:
        save_file(arrays | more, temporary / f"{name}.safetensors")
        (temporary / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _load(
    directory: Path, name: str, per_token: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, np.ndarray]]:
    """(lines, the arrays of each sequence, all arrays as they are in the file)."""
    try:
        arrays = load_file(directory / f"{name}.safetensors")
        lines = [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{directory}: {name}.safetensors and .jsonl can't be read ({error}); remove {directory.parent} and make "
            "them again"
        ) from None
    prompt_ends, token_ends = arrays["lengths"].cumsum(0)[:-1].T
    parts = {n: np.split(arrays[n], token_ends) for n in per_token}
    parts["prompt_tokens"] = np.split(arrays["prompt_tokens"], prompt_ends)
    return lines, [{n: values[i] for n, values in parts.items()} for i in range(len(lines))], arrays


SAMPLES = "samples"
STEPS, PER_STEP, TOKENS = 8, 3, 400
"""Number of sampled steps of a run, first and last included; answers per step, each to another problem if possible; and
tokens per answer (a longer answer's two ends)."""


def sampled_steps(steps: int) -> set[int]:
    """Steps whose answers are stored, counted from 1."""
    return {int(step) for step in np.linspace(1, steps, min(STEPS, steps)).round()}


def keep_samples(directory: RunDirectory, step: int, groups: Sequence[Group], decode: Callable[[int], str]) -> None:
    """Write PER_STEP answers, of as many groups as possible, to a file that appears atomically; repeating a step writes
    the same file."""
    chosen = [(group, k) for k in range(max(len(g.rollouts) for g in groups)) for group in groups]
    chosen = [(group, k) for group, k in chosen if k < len(group.rollouts)][:PER_STEP]
    entries = [_entry(group, k, decode) for group, k in chosen]
    directory.write_atomic(f"{SAMPLES}/step_{step}.json", json.dumps({"step": step, "rollouts": entries}))


def _entry(group: Group, k: int, decode: Callable[[int], str]) -> dict[str, Any]:
    rollout = group.rollouts[k]
    half, places = TOKENS // 2, list(range(rollout.length))
    shown = places if len(places) <= TOKENS else places[:half] + places[-half:]
    return {
        "prompt": group.prompt.text,
        "reference": group.prompt.answer,
        "correct": bool(group.correct[k]),
        "reward": float(group.rewards[k]),
        "left_out": rollout.length - len(shown),
        "tokens": [
            {
                "text": decode(int(rollout.tokens[t])),
                "depth": int(rollout.exit_depths[t]),
                "logprob": round(float(rollout.token_logprobs[t]), 5),
                "exit_logprob": round(float(rollout.exit_logprobs[t]), 5),
            }
            for t in shown
        ],
    }
