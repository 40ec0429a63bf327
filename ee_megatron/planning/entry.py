"""What `ee-megatron plan` and a dry run call."""

from __future__ import annotations

import argparse
import copy
import json
import sys

from ..config.derive import ranks, read_dims, resolve_exits
from ..config.device import asks_for_gpus
from ..config.schema import RunConfig
from ..families import ModelDims
from .command import launch_command
from .devices import Device, find_device
from .memory import actor_memory
from .plan import Assumptions, Plan, make_plan
from .propose import nearest_fit, with_vllm
from .published import published_dims
from .report import scaling_lines, summary, to_json, to_text
from .workload import least_depth


def dry_run_lines(cfg: RunConfig, dims: ModelDims) -> list[str]:
    """Parameters, memory and time by arithmetic. Raises ValueError as `make_plan` does."""
    outcomes = resolve_exits(cfg, dims).outcomes
    # No option says otherwise here: where exits are deep, tokens are as deep as they may be at least.
    depth = max(Assumptions.mean_depth, least_depth(cfg.rollout.max_new_tokens, outcomes, cfg.exits.first_token))
    plan = make_plan(cfg, dims, find_device(default_device(cfg)), Assumptions(mean_depth=depth))
    lack = plan.shortage()
    hint = [f"does not fit: {lack}; `ee-megatron plan` says what would, and --on names other devices"] if lack else []
    return [*summary(plan), *hint]


def run_plan(cfg: RunConfig, options: argparse.Namespace) -> int:
    """Print the plan; `options` are those of cli.py's command. Raises ValueError, one line with the nearest
    configuration that would do, if something does not fit; the plan is on stdout all the same, to see what takes the
    room."""
    try:
        nodes = [int(count) for count in options.scaling.split(",") if count]
    except ValueError:
        raise ValueError(f"--scaling {options.scaling}: expected numbers of nodes, e.g. 1,2,4") from None
    dims = published_dims(options.dims) if options.dims else read_dims(cfg)
    device = find_device(options.on or default_device(cfg), options.tflops, options.memory_gib, options.efficiency)
    assumed = Assumptions(options.prompt_tokens, options.answer_tokens, options.mean_depth)
    plan = make_plan(cfg, dims, device, assumed)
    if not options.no_build:
        from .construct import build_ranks

        built = build_ranks(plan.layout)
        print(f"built {len(built)} (tensor, pipeline) rank(s) without memory: parameters as planned", file=sys.stderr)
    command = launch_command(cfg, "rl", options.overrides)
    print(json.dumps(to_json(plan, command), indent=1) if options.json else to_text(plan, command))
    if nodes:
        print("\n" + "\n".join(scaling_lines(scale(cfg, dims, device, assumed, nodes))))
    refuse_what_does_not_fit(plan, dims)
    return 0


def refuse_what_does_not_fit(plan: Plan, dims: ModelDims) -> None:
    lack = plan.shortage()
    if not lack:
        return
    changes = nearest_fit(plan, dims)
    if changes:
        raise ValueError(f"{lack}; the nearest that fits: {' '.join(changes)}")
    if plan.actor.backend == "vllm":
        raise ValueError(f"{lack}; no change of layout, batch, rows or devices of an actor that was tried fits")
    least = actor_memory(plan.layout, plan.longest, plan.item, 1, plan.on_cpu)
    alone = (plan.device_bytes(least) + plan.device.reserved) / 2**30
    shared = with_vllm(plan, dims)
    raise ValueError(
        f"{lack}; no change of layout, batch or rows that was tried fits. An actor of the embedded engine is a whole "
        f"replica on one device and needs {alone:.1f} GiB with a single row: "
        + (f"let vLLM share it out, {' '.join(shared)}" if shared else "take devices with more memory")
    )


def default_device(cfg: RunConfig) -> str:
    """A CPU or an H100, by the configuration."""
    return "H100" if asks_for_gpus(cfg) else "cpu"


def scale(cfg: RunConfig, dims: ModelDims, device: Device, assumed: Assumptions, nodes: list[int]) -> list[Plan]:
    """The same step (the same prompts, the same batch) on more nodes: half of the devices learn, with more
    data-parallel ranks, half are rollout actors. Raises ValueError for a count that leaves no whole replica."""
    if not cfg.cluster.gpus_per_node:
        raise ValueError("--scaling: needs cluster.gpus_per_node > 0, found 0")
    plans = []
    for count in nodes:
        devices = count * cfg.cluster.gpus_per_node
        replica = cfg.parallel.tensor * cfg.parallel.pipeline
        data = devices // 2 // replica
        if data < 1:
            raise ValueError(
                f"--scaling {count}: half of {devices} devices is less than one learner replica of {replica} ranks; "
                f"start at {-(-2 * replica // cfg.cluster.gpus_per_node)} node(s)"
            )
        changed = copy.deepcopy(cfg)
        changed.cluster.nodes, changed.parallel.data = count, data
        changed.rollout.actors = max(1, (devices - ranks(changed)) // changed.rollout.tensor)
        whole, rest = divmod(ranks(changed), cfg.cluster.gpus_per_node)
        changed.cluster.rollout_nodes = 0 if rest else count - whole
        plans.append(make_plan(changed, dims, device, assumed))
    return plans
