"""Where should a model's exits be? Reads every layer out, on the model's own answers at full depth, and looks for the
depths at which tokens could leave most cheaply.

A token that leaves at depth e costs price * e / L + KL(base model || readout at e); the cheapest of the given exits and
of full depth is taken, and a set of exits is as good as the mean over tokens is low. Which of the C(L - 1, M) sets is
best is searched by adding the best depth to the best smaller set and exchanging one at a time as long as that helps.

    python tools/choose_exits.py runs/demo_cpu/calibrate-1a2b3c4d --exits 5 --price 1.2

Greedy answers to training problems of the stage's own task, with its newest checkpoint's adapters and without its
gates; --untrained: without the adapters, too. Readouts that were trained are nearer than those beside them, so that a
layer that has had an exit has an advantage; what an exit costs later tokens is not seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ee_megatron.exit_rules import Off
from ee_megatron.policy import PolicySpec, WeightSet, initial_policy, load_policy
from ee_megatron.rollout import GenerationRequest, SamplingParams
from ee_megatron.rollout.pool.local import LocalPool
from ee_megatron.tasks import task_of
from ee_megatron.training import stages
from ee_megatron.types import Prompt

Policy = tuple[PolicySpec, Mapping[str, Tensor]]


class ExitSet(NamedTuple):
    """Mean over tokens under the cheapest decision: of the cost in nats, of depth / L, and of the KL in nats."""

    depths: tuple[int, ...]
    cost: float
    depth: float
    kl: float


def evaluated(divergences: np.ndarray, depths: Sequence[int], price: float) -> ExitSet:
    """`divergences` [T, L - 1] in nats, those of layers 1 to L - 1. Raises ValueError for a depth that is none."""
    layers = divergences.shape[1] + 1
    if any(not 1 <= d < layers for d in depths):
        raise ValueError(f"depths {list(depths)}: expected 1 to {layers - 1}, the model has {layers} layers")
    outcomes = np.array([*depths, layers])
    kl = np.concatenate([divergences[:, list(np.array(depths, int) - 1)], np.zeros((len(divergences), 1))], axis=1)
    taken = np.argmin(price * outcomes / layers + kl, axis=1)
    share, paid = outcomes[taken] / layers, kl[np.arange(len(kl)), taken]
    return ExitSet(tuple(depths), float((price * share + paid).mean()), float(share.mean()), float(paid.mean()))


def best_sets(divergences: np.ndarray, most: int, price: float) -> list[ExitSet]:
    """The best set found of each size 1 to `most` (not more than there are layers below the last)."""
    layers = divergences.shape[1] + 1
    found: list[ExitSet] = []
    chosen: tuple[int, ...] = ()

    def best(sets: Sequence[tuple[int, ...]]) -> ExitSet:
        return min((evaluated(divergences, s, price) for s in sets), key=lambda e: e.cost)

    for _ in range(min(most, layers - 1)):
        free = [d for d in range(1, layers) if d not in chosen]
        now = best([tuple(sorted((*chosen, d))) for d in free])
        while True:
            rest = [d for d in range(1, layers) if d not in now.depths]
            swaps = [tuple(sorted({*now.depths, new} - {old})) for old in now.depths for new in rest]
            other = best(swaps) if swaps else now
            if other.cost >= now.cost:
                break
            now = other
        found.append(now)
        chosen = now.depths
    return found


def readouts(
    model: Path, policy: Policy, prompts: Sequence[Prompt], sampling: SamplingParams, dtype: torch.dtype
) -> np.ndarray:
    """KL [T, L - 1] in nats of the base model's last layer to the readouts of layers 1 to L - 1, at the T tokens of the
    policy's answers to `prompts` at full depth. Its gates aren't asked."""
    spec, tensors = policy
    everywhere = replace(spec, exit_depths=tuple(range(1, spec.num_layers)))
    pool = LocalPool(model, everywhere, dtype, rows=32)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("gates.")}
    pool.load(WeightSet(1, {**initial_policy(pool.decoder.dims, everywhere, seed=0), **kept}))
    answers = [group[0] for group in pool.generate(GenerationRequest(prompts, 1, sampling, Off(), 0))]
    return np.concatenate([i.divergences for i in pool.inspect(answers)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stage", type=Path, help="directory of a calibrate or rl stage")
    parser.add_argument("--exits", type=int, default=5, help="the largest set to look for")
    parser.add_argument("--price", type=float, default=1.0, help="of full depth, nats: lambda_exit * share that pays")
    parser.add_argument("--problems", type=int, default=60, help="of the train split, which may hold fewer")
    parser.add_argument("--untrained", action="store_true", help="read the model without the stage's adapters")
    options = parser.parse_args()
    try:
        if min(options.exits, options.problems) < 1:
            raise ValueError(f"--exits {options.exits}, --problems {options.problems}: expected at least 1 of each")
        cfg, model, checkpoint = stages.trained(options.stage)
        spec, tensors = load_policy(checkpoint)
        prompts = task_of(cfg, model).prompts("train")[: options.problems]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    own = spec.exit_depths
    policy = spec, {} if options.untrained else tensors
    sampling = SamplingParams(0.0, cfg.rollout.max_new_tokens, tuple(cfg.rollout.stop))
    divergences = readouts(model, policy, prompts, sampling, torch.bfloat16)
    print("layer   KL of its readout, nats: quartiles, mean")
    for depth, column in enumerate(divergences.T, 1):
        low, middle, high = np.quantile(column, [0.25, 0.5, 0.75])
        print(f"{depth:5}   {low:7.3f} {middle:7.3f} {high:7.3f}   {column.mean():7.3f}{'   exit' * (depth in own)}")
    print(f"\n{len(divergences)} tokens, full depth costs {options.price:g} nats")
    print("  cost   depth      KL   exits.depths")
    rows = [evaluated(divergences, own, options.price), *best_sets(divergences, options.exits, options.price)]
    for row in rows:
        named = f"[{','.join(map(str, row.depths))}]{'   as it is' * (row is rows[0])}"
        print(f"{row.cost:6.4f}  {row.depth:6.3f}  {row.kl:6.4f}   {named}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
