"""What an RL step cost, by phase: FLOPs by the lengths and exits that there were, padding, seconds, what a device made.

FLOPs and padding depend on seed and settings alone and stand in metrics.jsonl; whatever a clock had a part in stands in
timings.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch

from ..config.derive import has_actors, ranks
from ..config.schema import RunConfig
from ..planning.devices import board
from ..planning.flops import step_flops
from ..planning.layout import Layout
from ..types import Group
from .session import Session

PHASES = ("rollout", "score", "update")


class Packed(Protocol):
    """Positions of a pass that are computed, places for them in all micro-batches, micro-batches of a data rank."""

    @property
    def positions(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def micro_batches(self) -> int: ...


def counted(
    session: Session, groups: Sequence[Group], kept: Sequence[int], packed: Packed, passed: Sequence[int] | None = None
) -> dict[str, float]:
    """Metrics: FLOPs of the step's phases, and what a pass's micro-batches held; `kept`: answers that are learned from,
    `packed`: how a pass over the answers `passed`, all by default, was packed."""
    cfg, size = session.cfg, session.cfg.rl.group_size
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    prompts = [len(rollout.prompt_tokens) for rollout in rollouts]
    rows = range(len(rollouts)) if passed is None else passed
    # What was not run again, of what a group could share at most.
    apart = sum(prompts[row] + rollouts[row].length - 1 for row in rows)
    most = sum((n - 1) * (prompts[group * size] - 1) for group, n in Counter(row // size for row in rows).items())
    shared = min(1.0, max(0.0, (apart - packed.positions) / most)) if most else 1.0
    flops = step_flops(
        Layout.of(cfg, session.source.dims), cfg, prompts, [rollout.exit_depths for rollout in rollouts],
        kept, shared,
    )  # fmt: skip
    return {f"flops/{phase}": value for phase, value in flops.items()} | {
        "padding": 1 - packed.positions / packed.slots if packed.slots else 0.0,
        "micro_batches": float(packed.micro_batches),
    }


def speeds(session: Session, values: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """Timings: the step's answer tokens, and FLOPs, per second of a phase and device that worked in it; mfu: these as a
    share of the device's peak, where that is known. `values`: the step's metrics; seconds: of its phases.

    Nothing of rollouts that were recorded, or made beside learning: nobody waited for all of them. Nor of a phase in
    which nothing was done."""
    cfg = session.cfg
    peak = peak_of(session)
    found = {}
    for phase in PHASES:
        if phase not in seconds or (phase == "rollout" and (cfg.rl.replay or cfg.rollout.max_staleness)):
            continue
        if not values[f"flops/{phase}"]:
            continue
        each = seconds[phase] * devices(cfg, phase)
        found[f"tokens_per_s_device/{phase}"] = values["tokens"] / each
        found[f"flops_per_s_device/{phase}"] = values[f"flops/{phase}"] / each
        if peak:
            found[f"mfu/{phase}"] = values[f"flops/{phase}"] / each / peak
    return found


def devices(cfg: RunConfig, phase: str) -> int:
    """How many work in a phase."""
    if phase != "rollout":
        return ranks(cfg)
    return cfg.rollout.actors * cfg.rollout.tensor if has_actors(cfg.rollout) else 1


def peak_of(session: Session) -> float:
    """FLOP/s of a data sheet for this rank's GPU; 0 for one without, and for CPUs."""
    if session.device_type != "cuda":
        return 0.0
    known = board(torch.cuda.get_device_name())
    return known.peak(session.dtype.itemsize) if known else 0.0
