"""The nearest configuration that fits, when the one asked for does not."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter

from ..config.schema import RunConfig
from ..config.validate import validate
from ..families import ModelDims
from .actors import make_actor, wanted_rows
from .layout import Layout
from .plan import Plan, learner_kinds
from .workload import Workload

# What a change costs the user, roughly: time for recomputing, time for smaller batches, devices.
PRICES = {
    "parallel.recompute": 1.0,
    "parallel.tokens_per_micro_batch": 0.6,
    "rollout.max_num_seqs": 0.6,
    "rollout.actors": 0.5,
    "rollout.tensor": 1.5,
    "deepspeed.zero_stage": 1.5,
    "deepspeed.offload_optimizer": 2.0,
    "parallel.data": 2.5,
    "parallel.tensor": 3.0,
    "parallel.pipeline": 3.2,
    "cluster.nodes": 5.0,
}


def nearest_fit(plan: Plan, dims: ModelDims) -> list[str]:
    """Settings to add, e.g. ["parallel.recompute=true"]; empty if no combination that was tried fits."""
    for changes in _by_price(plan.cfg):
        changed = apply(plan.cfg, changes)
        try:
            validate(changed, dims)
            layout = Layout.of(changed, dims)
        except ValueError:
            continue
        # Exits may have moved with the stages.
        exits = layout.spec.layout
        longest = Workload.of(plan.longest.prompt, plan.longest.answer, exits.outcomes, 1.0, exits.first_token)
        learner = learner_kinds(changed, layout, longest, plan.item, plan.on_cpu)
        actor = make_actor(changed, layout, plan.load, longest, plan.item, plan.device)
        if not replace(plan, cfg=changed, layout=layout, learner=learner, actor=actor).shortage():
            return [f"{key}={str(value).lower()}" for key, value in changes.items()]
    return []


def with_vllm(plan: Plan, dims: ModelDims) -> list[str]:
    """Settings under which vLLM's actors would fit where a whole replica on one device doesn't, on the same devices."""
    cluster = plan.cfg.cluster
    devices = (cluster.rollout_nodes or cluster.nodes) * cluster.gpus_per_node
    for tensor in (2, 4, 8):
        changes: dict[str, int | bool | str] = {
            "rollout.backend": "vllm", "rollout.tensor": tensor, "rollout.actors": max(1, devices // tensor)
        }  # fmt: skip
        changed = apply(plan.cfg, changes)
        try:
            validate(changed, dims)
        except ValueError:
            continue
        actor = make_actor(changed, plan.layout, plan.load, plan.longest, plan.item, plan.device)
        if not replace(plan, cfg=changed, actor=actor).shortage():
            return [f"{key}={value}" for key, value in changes.items()]
    return []


def apply(cfg: RunConfig, changes: Mapping[str, int | bool | str]) -> RunConfig:
    """A changed copy. Another number of pipeline ranks drops `stage_layers`."""
    changed = copy.deepcopy(cfg)
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(changed, section), name, value)
    if "parallel.pipeline" in changes:
        changed.parallel.stage_layers = []
    return changed


def _by_price(cfg: RunConfig) -> Iterator[dict[str, int | bool]]:
    """Combinations of changes, cheapest first."""
    parallel, stage = cfg.parallel, cfg.deepspeed.zero_stage
    choices: dict[str, list[int | bool]] = {
        "parallel.recompute": [True],
        "parallel.tokens_per_micro_batch": list(_halves(parallel.tokens_per_micro_batch))[:6],
        "rollout.max_num_seqs": list(_halves(wanted_rows(cfg)))[:5],
        "deepspeed.zero_stage": [s for s in (1, 2, 3) if s > stage],
        "deepspeed.offload_optimizer": [True],
        "parallel.data": list(_halves(parallel.data)),
        "parallel.tensor": [parallel.tensor * f for f in (2, 4, 8)],
        "parallel.pipeline": [parallel.pipeline * f for f in (2, 4)],
        "cluster.nodes": [cfg.cluster.nodes + more for more in (1, 2, 3, 7)],
    }
    if cfg.rollout.backend == "vllm":
        # Devices that an actor takes more of are those of other actors.
        choices["rollout.tensor"] = [cfg.rollout.tensor * f for f in (2, 4, 8)]
        choices["rollout.actors"] = list(_halves(cfg.rollout.actors))
    now = {key: attrgetter(key)(cfg) for key in choices}
    options = [[(0.0, None), *((_price(key, now[key], v), (key, v)) for v in values if v != now[key])]
               for key, values in choices.items()]  # fmt: skip
    combinations = (
        (sum(price for price, _ in chosen), [change for _, change in chosen if change])
        for chosen in itertools.product(*options)
    )
    few = [(price, changes) for price, changes in combinations if 0 < len(changes) <= 4]
    yield from (dict(changes) for _, changes in sorted(few, key=lambda entry: entry[0]))


def _price(key: str, now: int | bool, value: int | bool) -> float:
    if isinstance(value, bool):
        return PRICES[key]
    if key in ("deepspeed.zero_stage", "cluster.nodes"):
        return PRICES[key] + 0.5 * abs(value - now)
    return PRICES[key] * abs(math.log2(value / now))


def _halves(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value
