"""What `ee-megatron plan` calls."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

from ..config.derive import read_dims
from ..config.schema import RunConfig
from ..families import ModelDims
from .command import launch_command
from .devices import Device, find_device
from .memory import actor_memory
from .plan import Assumptions, Plan, make_plan
from .propose import nearest_fit
from .published import published_dims
from .report import to_json, to_text


@dataclass(frozen=True)
class Options:
    """Of the plan command; none of them changes what a run would compute.

    dims: a published model's name, "": the model directory's config.json. device: a name of devices.py, "": cpu where
    the configuration says so, else H100. build: construct every rank's modules. scaling: node counts to compare.
    """

    dims: str = ""
    device: str = ""
    tflops: float | None = None
    memory_gib: float | None = None
    efficiency: float | None = None
    assumed: Assumptions = field(default_factory=Assumptions)
    build: bool = True
    as_json: bool = False
    scaling: tuple[int, ...] = ()


def run_plan(cfg: RunConfig, overrides: list[str], options: Options) -> int:
    """Print the plan. Raises ValueError, one line with the nearest configuration that would do, if something does not
    fit; the plan is on stdout all the same, to see what takes the room."""
    dims = published_dims(options.dims) if options.dims else read_dims(cfg)
    device = pick_device(cfg, options)
    plan = make_plan(cfg, dims, device, options.assumed)
    if options.build:
        from .construct import build_ranks

        built = build_ranks(plan.layout)
        print(f"built {len(built)} (tensor, pipeline) rank(s) without memory: parameters as planned", file=sys.stderr)
    command = launch_command(cfg, "rl", overrides)
    if options.as_json:
        print(json.dumps(to_json(plan, command), indent=1))
    else:
        print(to_text(plan, command), end="")
    if options.scaling:
        from .scaling_table import scaling_lines

        print("\n" + "\n".join(scaling_lines(cfg, dims, device, options.assumed, options.scaling)))
    refuse_what_does_not_fit(plan, dims)
    return 0


def refuse_what_does_not_fit(plan: Plan, dims: ModelDims) -> None:
    lack = plan.shortage()
    if not lack:
        return
    changes = nearest_fit(plan, dims)
    if changes:
        raise ValueError(f"{lack}; the nearest that fits: {' '.join(changes)}")
    least = actor_memory(plan.layout, plan.longest, plan.item, 1, plan.on_cpu)
    alone = (plan.device_bytes(least) + plan.device.reserved) / 2**30
    raise ValueError(
        f"{lack}; no change of layout, batch or rows that was tried fits. A rollout actor is a whole replica on one "
        f"device and needs {alone:.1f} GiB with a single row: take devices with more memory"
    )


def pick_device(cfg: RunConfig, options: Options) -> Device:
    """The device that the options name, else a CPU or an H100 by the configuration. Raises ValueError."""
    cpu = cfg.device == "cpu" or (cfg.device == "auto" and not cfg.cluster.gpus_per_node)
    name = options.device or ("cpu" if cpu else "H100")
    return find_device(name, options.tflops, options.memory_gib, options.efficiency)
