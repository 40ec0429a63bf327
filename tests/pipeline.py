"""How long the stages of a pipeline take for work that waits for each other's: a simulation of schedules."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple


class Work(NamedTuple):
    """A micro-batch forward or backward, in the `call`-th run of the schedule; seconds it takes."""

    call: int
    kind: str
    seconds: float


def one_call(stages: int, micro_batches: int, *, forward: float, train: bool, call: int = 0) -> list[list[Work]]:
    """1F1B (Narayanan et al. 2021, arXiv 2104.04473), written down by hand: what each stage does, in its order."""
    every = []
    for stage in range(stages):
        forwards = [Work(call, "forward", forward)] * micro_batches
        backwards = [Work(call, "backward", 2)] * micro_batches * train
        first = min(stages - stage - 1, micro_batches) if train else micro_batches
        mixed = [work for pair in zip(forwards[first:], backwards, strict=False) for work in pair]
        every.append([*forwards[:first], *mixed, *backwards[len(mixed) // 2 :]])
    return every


def slowdown(stages: list[list[Work]]) -> float:
    """Seconds until all stages are done, over those that the busiest of them works. A stage does its work in order; a
    micro-batch goes forward when the stage before is done with it, and backward when the one behind is."""
    ends: dict[tuple[int, str, int, int], float] = {}
    clocks, at, counts = [0.0] * len(stages), [0] * len(stages), [Counter[tuple[int, str]]() for _ in stages]
    while any(at[stage] < len(works) for stage, works in enumerate(stages)):
        before = sum(at)
        for stage, works in enumerate(stages):
            while at[stage] < len(works):
                call, kind, seconds = works[at[stage]]
                index, other = counts[stage][call, kind], stage + (-1 if kind == "forward" else 1)
                ready = ends.get((call, kind, index, other), 0.0 if other in (-1, len(stages)) else None)
                if ready is None:
                    break
                clocks[stage] = ends[call, kind, index, stage] = max(clocks[stage], ready) + seconds
                counts[stage][call, kind] += 1
                at[stage] += 1
        assert sum(at) > before, "stages wait for each other"
    return max(clocks) / max(sum(work.seconds for work in works) for works in stages)
