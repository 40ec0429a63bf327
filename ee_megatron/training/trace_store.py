"""Traces on disk: one safetensors file with all sequences end to end, one JSON line per trace beside it.

No pickle, so a trace set may be handed on; later runs and sweeps reuse it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..observe.rundir import atomic_directory
from ..types import Trace

_PER_TOKEN = ("tokens", "divergences", "topk_ids", "topk_logprobs", "entropy")


def save_traces(directory: Path, traces: Sequence[Trace]) -> None:
    """Write traces.safetensors and traces.jsonl as a directory that appears whole. Raises ValueError for no traces."""
    if not traces:
        raise ValueError("no traces to save: the teacher answered no prompt; see log.txt")
    arrays = {name: np.ascontiguousarray(np.concatenate([getattr(t, name) for t in traces])) for name in _PER_TOKEN}
    arrays["prompt_tokens"] = np.concatenate([t.prompt_tokens for t in traces])
    arrays["lengths"] = np.array([[len(t.prompt_tokens), len(t.tokens)] for t in traces], dtype=np.int64)
    with atomic_directory(directory) as temporary:
        save_file(arrays, temporary / "traces.safetensors")
        lines = [json.dumps({"id": t.prompt_id, "correct": bool(t.correct), "text": t.text}) for t in traces]
        (temporary / "traces.jsonl").write_text("\n".join(lines) + "\n")


def load_traces(directory: Path) -> list[Trace]:
    """Read what `save_traces` wrote. Raises FileNotFoundError with the command that makes them."""
    if not (directory / "traces.safetensors").is_file():
        raise FileNotFoundError(
            f"{directory}: no traces there; make them with `ee-megatron traces` and the same settings"
        )
    arrays = load_file(directory / "traces.safetensors")
    lines = [json.loads(line) for line in (directory / "traces.jsonl").read_text().splitlines()]
    prompt_ends = np.cumsum(arrays["lengths"][:, 0])
    token_ends = np.cumsum(arrays["lengths"][:, 1])
    traces, prompt_start, start = [], 0, 0
    for line, prompt_end, end in zip(lines, prompt_ends, token_ends, strict=True):
        piece: dict[str, Any] = {name: arrays[name][start:end] for name in _PER_TOKEN}
        prompt = arrays["prompt_tokens"][prompt_start:prompt_end]
        traces.append(
            Trace(prompt_id=line["id"], prompt_tokens=prompt, correct=line["correct"], text=line["text"], **piece)
        )
        prompt_start, start = prompt_end, end
    return traces
