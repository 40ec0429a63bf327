"""Why an answer under exits differs from the same model's at full depth: the token's own exit, or what it read.

A token that exits is read out early, and its frozen stream is what later tokens see of it. Where greedy answers part,
the first differing token is made again at full depth, after the same tokens at the same exits. If it then is what full
depth writes, its own exit was at fault; if not, the exits of tokens before it were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..exit_rules import Prescribed
from ..rollout.engine.request import GenerationRequest
from ..rollout.engine.sampling import SamplingParams
from ..rollout.pool.interface import RolloutPool
from ..types import Prompt, Rollout


@dataclass(frozen=True)
class FirstDifference:
    """Where two answers to a prompt part: at token `at` (0-based) the exited one, made after `depth` layers, wrote
    `wrote` where full depth writes `full` (token ids). `own`: its own exit is at fault, not its context."""

    prompt_id: str
    at: int
    depth: int
    full: int
    wrote: int
    own: bool


def partings(
    pool: RolloutPool,
    prompts: Sequence[Prompt],
    full: Sequence[Rollout],
    exited: Sequence[Rollout],
    sampling: SamplingParams,
    num_layers: int,
) -> list[FirstDifference]:
    """One entry for every pair of greedy answers that differ, made under the weights that the pool holds.

    Raises ValueError for sampled tokens: they would differ by chance.
    """
    if sampling.temperature:
        raise ValueError(f"temperature {sampling.temperature}: only greedy answers can be compared token by token")
    apart: dict[str, tuple[int, Prompt, Rollout, Rollout]] = {}
    for prompt, whole, early in zip(prompts, full, exited, strict=True):
        shared = min(len(whole.tokens), len(early.tokens))
        differ = np.flatnonzero(whole.tokens[:shared] != early.tokens[:shared])
        if len(differ):
            apart[prompt.id] = (int(differ[0]), prompt, whole, early)
    if not apart:
        return []
    depths = {
        (name, 0): early.exit_depths[:at].tolist() + [num_layers] * (sampling.max_new_tokens - at)
        for name, (at, _, _, early) in apart.items()
    }
    asked = [prompt for _, prompt, _, _ in apart.values()]
    again = pool.generate(GenerationRequest(asked, 1, sampling, Prescribed(depths), seed=0))
    return [
        FirstDifference(
            name,
            at,
            int(early.exit_depths[at]),
            int(whole.tokens[at]),
            int(early.tokens[at]),
            own=int(made.tokens[at]) == int(whole.tokens[at]),
        )
        for (name, (at, _, whole, early)), (made,) in zip(apart.items(), again, strict=True)
    ]
