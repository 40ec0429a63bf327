"""How long a version of the weights takes from the learner to every actor, gather included.

    python tools/bench_sync.py --model models/SmolLM2-135M-Instruct --repeats 5

Two cases: adapters (rank 8 on the attention's linears, as in the paper) with gates, and full fine-tuning, where the
whole model travels; both narrowed to bfloat16, the decoders' dtype. `take` is a version's way into the object store:
gathered from a real learner in this process (one rank), narrowed, hashed and put there a chunk at a time;
`--no-learner` starts from tensors that are there. Each version differs from the one before.
The clock stops when every actor has taken the digest of what arrived, has loaded it and says so. `--check` compares
every tensor on both sides afterwards. Prints a table and one line of JSON: medians over the repeats, seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings
from functools import partial
from typing import Any

CASES = ("adapters", "full")
PHASES = ("take", "load")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each actor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=CASES, default=None)
    parser.add_argument("--no-learner", action="store_true", help="leave the learner's gather out")
    parser.add_argument("--check", action="store_true", help="compare every tensor on both sides after the last sync")
    return parser.parse_args()


def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ee_megatron.config.schema import RolloutConfig
    from ee_megatron.families.hf_directory import HFDirectory
    from ee_megatron.parallel import groups
    from ee_megatron.policy import ATTENTION, PolicySpec, initial_policy
    from ee_megatron.rollout.pool.interface import ReplicaSettings
    from ee_megatron.rollout.pool.ray_pool import RayPool
    from ee_megatron.tensors import ChangedStream, HeldStream

    source = HFDirectory(options.model)
    dims = source.dims
    exits = tuple(range(5, dims.num_layers, 5))
    full = case == "full"
    spec = PolicySpec(dims.num_layers, exits, rank=0 if full else 8, alpha=16.0, targets=ATTENTION, full=full)
    policy = initial_policy(dims, spec, 0, base=source.tensor)
    gather = (lambda: HeldStream(policy)) if options.no_learner else learner_of(source, spec, policy).stream_policy
    name = f"gates.{exits[0]}.fc2.bias"
    replica = ReplicaSettings(options.model, spec, torch.bfloat16, "cpu", 8, options.threads)
    pool = RayPool(replica, RolloutConfig(actors=options.actors, sync_dtype="bfloat16"))
    try:
        pool.load(None)
        phases: dict[str, list[float]] = {name: [] for name in (*PHASES, "total")}
        for version in range(1, options.repeats + 2):
            clock = [time.perf_counter()]
            weights = pool.take(version, ChangedStream(gather(), partial(marked, name, float(version))))
            clock.append(time.perf_counter())
            pool.load(weights)
            clock.append(time.perf_counter())
            spans = [b - a for a, b in itertools.pairwise(clock)]
            # The first warms up whatever is made once.
            if version > 1:
                for name, seconds in zip((*PHASES, "total"), (*spans, clock[-1] - clock[0]), strict=True):
                    phases[name].append(seconds)
        size = sum(tensor.nbytes for tensor in weights.tensors.values())
        if options.check:
            pool.check(weights)
        assert pool.health()["alive"] == options.actors
    finally:
        pool.close()
        if not options.no_learner:
            groups.finish()
    medians = {name: statistics.median(values) for name, values in phases.items()}
    return {"case": case, "mb": size / 1e6, **medians, "worst": max(phases["total"])}


def marked(name: str, version: float, block: Any) -> Any:
    """A version that an actor holds already would not be sent: each has another number in one place."""
    return block.data.new_full((1,), version) if block.name == name else block.data


def learner_of(source: Any, spec: Any, policy: dict) -> Any:
    from ee_megatron.config.schema import DeepspeedConfig, ParallelConfig
    from ee_megatron.learner.learner import Learner
    from ee_megatron.parallel import groups
    from ee_megatron.parallel.groups import Degrees

    device = groups.initialise(Degrees())
    return Learner(source, spec, policy, ParallelConfig(), DeepspeedConfig(), device=device)


def main() -> None:
    options = parse()
    # megatron-core names every accelerator library that it does without.
    warnings.filterwarnings("ignore")
    rows = []
    for case in [options.only] if options.only else CASES:
        rows.append(measure(case, options))
    columns = ("mb", *PHASES, "total", "worst")
    print(f"{'case':10}" + "".join(f"{name:>15}" for name in columns))
    for row in rows:
        print(f"{row['case']:10}" + "".join(f"{row[name]:15.3f}" for name in columns))
    print(json.dumps({"actors": options.actors, "threads": options.threads, "repeats": options.repeats, "rows": rows}))


if __name__ == "__main__":
    main()
