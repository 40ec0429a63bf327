"""A run's plan: layout, parameters, memory against the devices, FLOPs and seconds by phase, and the command."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from ..config.cluster import job_shape
from ..config.config_paths import find_config_dir
from ..config.derive import call_timeout, read_dims, resolve_exits
from ..config.device import asks_for_gpus, multiplies_bfloat16
from ..config.schema import RunConfig
from ..config.validate import validate
from ..families import ModelDims, dims_from_config
from .command import launch_command
from .devices import GIB, Device, find_device
from .flops import phase_flops, rollouts_per_step, updates
from .layout import Layout, rank_parameters
from .memory import ActorMemory, Training, learner_memory, make_actor, sync_bytes
from .roofline import PhaseTime, Roofline
from .workload import Workload, least_depth, pack_pass


@dataclass(frozen=True)
class Assumptions:
    """What a plan assumes of the data: prompt tokens, mean answer tokens (0: rollout.max_new_tokens), mean depth as a
    share of the layers. Memory is planned for the longest answers at full depth."""

    prompt_tokens: int = 200
    answer_tokens: int = 0
    mean_depth: float = 0.7


@dataclass(frozen=True)
class RunPlan:
    """load, longest: of an average answer, and of the longest, at full depth; item: bytes per element of the base;
    learner: bytes by kind, per pipeline rank; trained: parameters of the policy; sync: bytes of a version of it; flops:
    of all ranks by phase of a step; shared: whether actors have to share the learner's devices."""

    cfg: RunConfig
    layout: Layout
    device: Device
    load: Workload
    longest: Workload
    item: int
    learner: list[dict[str, float]]
    actor: ActorMemory
    trained: int
    sync: int
    flops: dict[str, float]
    roofline: Roofline
    phases: dict[str, PhaseTime]
    shared: bool

    @property
    def tokens_per_s(self) -> float:
        """Of the whole pool over the rollout phase, prompts included."""
        return rollouts_per_step(self.cfg) * self.load.answer / self.phases["rollouts"].likely

    def device_bytes(self, kinds: dict[str, float]) -> float:
        """Bytes of all kinds together."""
        return sum(kinds.values())

    def shortage(self) -> str:
        """Which device lacks how much memory and what would help, in one line; empty if everything fits."""
        device, rollout = self.device, self.cfg.rollout
        stages = [self.device_bytes(kinds) for kinds in self.learner]
        actor = self.device_bytes(self.actor.kinds)
        worst = max(range(len(stages)), key=lambda stage: stages[stage])
        learns = "parallel.recompute=true, fewer parallel.tokens_per_micro_batch, more parallel.tensor or pipeline"
        answers = (
            "fewer rollout.max_num_seqs, a smaller rollout.cache_gib, or rollout.backend=vllm and rollout.vllm.tensor"
        )
        needs = [(f"a learner rank of stage {worst}", stages[worst], learns), ("a rollout actor", actor, answers)]
        if device.on_cpu:
            # Processes of one machine share its memory.
            whole = self.layout.ranks // len(stages) * sum(stages) + rollout.actors * self.actor.devices * actor
            what = f"{self.layout.ranks} learner rank(s) and {rollout.actors} actor(s) on one machine"
            needs = [(what, whole, f"{learns}; {answers}")]
        elif self.shared:
            what = f"a device with learner stage {worst} and a rollout actor"
            needs = [(what, stages[worst] + actor, f"{learns}; {answers}")]
        for what, size, remedy in needs:
            if size + device.reserved > device.memory:
                has = f"{device.name} has {gib(device.memory)}, {gib(device.reserved)} of them reserved"
                return f"{what} needs {gib(size + device.reserved)}, {has}; try {remedy}, or more devices"
        positions, sequence = self.actor.positions, self.actor.sequence
        if positions is not None and positions < sequence:
            return (
                f"the cache of a rollout actor holds {positions} positions (rollout.cache_gib={rollout.cache_gib:g}), "
                f"one longest sequence needs {sequence}; try more rollout.cache_gib (0: as much as there is) or "
                "rollout.vllm.tensor, or less rollout.max_new_tokens"
            )
        return ""


def element_bytes(cfg: RunConfig, on_cpu: bool) -> int:
    """Bytes per element of the dtype that `pick_dtype` would pick on the planned device."""
    if cfg.model.dtype == "auto":
        return 4 if on_cpu and not multiplies_bfloat16() else 2
    return 4 if cfg.model.dtype == "float32" else 2


def make_plan(cfg: RunConfig, dims: ModelDims, device: Device, assumed: Assumptions) -> RunPlan:
    """Raises ValueError for a configuration that does not fit the model, or assumptions that no data can meet."""
    validate(cfg, dims)
    layout, longest_answer = Layout.of(cfg, dims), cfg.rollout.max_new_tokens
    answer = assumed.answer_tokens or longest_answer
    if answer > longest_answer:
        raise ValueError(f"--answer-tokens {answer}: longer than rollout.max_new_tokens={longest_answer} allows")
    prompt, outcomes, first = assumed.prompt_tokens, layout.spec.layout.outcomes, layout.spec.first_token
    load = Workload.of(prompt, answer, outcomes, assumed.mean_depth, first)
    longest = Workload.of(prompt, longest_answer, outcomes, 1.0, first)
    item, (_, part, how), zero = element_bytes(cfg, device.on_cpu), updates(cfg), cfg.deepspeed
    training = Training(item, cfg.parallel.recompute, zero.zero_stage, device.on_cpu, how.divergence)
    packed = pack_pass(cfg, longest, part, cfg.rl.group_size)
    actor = make_actor(cfg, layout, load, longest, item, device)
    roofline = Roofline(cfg, layout, load, device, item, max(1, actor.rows), longest_answer)
    return RunPlan(
        cfg, layout, device, load, longest, item,
        [learner_memory(layout, packed, training, p) for p in range(layout.pipeline)], actor,
        trained=sum(map(math.prod, layout.spec.tensor_shapes(dims).values())),
        sync=sync_bytes(layout, item, cfg.rollout.sync_dtype),
        flops=phase_flops(layout, load, cfg), roofline=roofline, phases=roofline.phases(),
        shared=device.on_cpu or job_shape(cfg, "rl").shares_devices,
    )  # fmt: skip


def default_device(cfg: RunConfig) -> str:
    """A CPU or an H100, by the configuration."""
    return "H100" if asks_for_gpus(cfg) else "cpu"


def published_config(name: str) -> dict[str, Any]:
    """The fields of a published model's config.json that decide shapes. Raises ValueError, with the names there are,
    for one that configs/published.yaml doesn't have."""
    known = yaml.safe_load((find_config_dir() / "published.yaml").read_text())
    if name not in known:
        raise ValueError(f"--dims {name}: no such model; expected one of {', '.join(known)}")
    return known[name]


def dry_run_lines(cfg: RunConfig, dims: ModelDims) -> list[str]:
    """Parameters, memory and time, for a dry run. Raises ValueError as `make_plan` does."""
    # With deep exits the default mean depth may be out of reach; the least possible one replaces it.
    outcomes = resolve_exits(cfg, dims).outcomes
    depth = max(Assumptions.mean_depth, least_depth(cfg.rollout.max_new_tokens, outcomes, cfg.exits.first_token))
    plan = make_plan(cfg, dims, find_device(default_device(cfg)), Assumptions(mean_depth=depth))
    lack = plan.shortage()
    times = ", ".join(f"{name} {t.best:.3g} to {t.likely:.3g} s" for name, t in plan.phases.items() if t.likely)
    learner, actor = gib(max(map(plan.device_bytes, plan.learner))), gib(plan.device_bytes(plan.actor.kinds))
    return [
        f"parameters: {plan.trained:,} trained, {gib(plan.sync)} a version",
        f"memory: up to {learner} per learner rank, {actor} per device of a rollout actor",
        f"estimate per RL step on {plan.device.name}: {times} (ee-megatron plan shows how)",
        *([f"does not fit: {lack}; `ee-megatron plan --on` plans for other devices"] if lack else []),
    ]


def run_plan(cfg: RunConfig, options: argparse.Namespace) -> int:
    """Print the plan; `options` are those of cli.py's command. Raises ValueError, one line, if something does not fit;
    the plan is printed all the same, to show what takes the memory."""
    dims = dims_from_config(published_config(options.dims)) if options.dims else read_dims(cfg)
    device = find_device(options.on or default_device(cfg), options.tflops, options.memory_gib)
    plan = make_plan(cfg, dims, device, Assumptions(options.prompt_tokens, options.answer_tokens, options.mean_depth))
    command = launch_command(cfg, "rl", options.overrides)
    print(json.dumps(to_json(plan, command), indent=1) if options.json else to_text(plan, command))
    if lack := plan.shortage():
        raise ValueError(lack)
    return 0


def to_json(plan: RunPlan, command: str) -> dict[str, Any]:
    layout, ranks = plan.layout, range(plan.layout.pipeline)
    return {
        "ranks": layout.ranks,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data,
                   "layers_per_stage": list(layout.sizes)},
        "exits": list(layout.spec.exit_depths),
        "gates": [layout.gates(p) for p in ranks],
        "parameters": [vars(rank_parameters(layout, p)) for p in ranks],
        "learner_bytes": plan.learner,
        "actor": asdict(plan.actor),
        "shared_devices": plan.shared,
        "flops": plan.flops,
        "seconds": {name: asdict(phase) for name, phase in plan.phases.items()},
        "tokens_per_s": plan.tokens_per_s,
        "sync_bytes": plan.sync,
        "device": asdict(plan.device),
        "command": command,
    }  # fmt: skip


def to_text(plan: RunPlan, command: str) -> str:
    """The plan as text."""
    cfg, layout, actor, load, device = plan.cfg, plan.layout, plan.actor, plan.load, plan.device
    ranks, counts = range(layout.pipeline), [rank_parameters(layout, p) for p in range(layout.pipeline)]
    lines = [
        f"{cfg.name}: {layout.dims.family}, {layout.dims.num_layers} layers, hidden {layout.dims.hidden}, vocabulary "
        f"{layout.dims.vocab}; {plan.trained:,} parameters trained",
        f"ranks: {layout.ranks} = tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}",
        f"exits: {list(layout.spec.exit_depths)}; layers per stage: {list(layout.sizes)}\n",
    ]
    kinds = dict.fromkeys(kind for memory in plan.learner for kind in memory)
    rows = [["a learner rank", *(f"pipeline rank {p}" for p in ranks)]]
    rows += [["gates after layers", *(str(layout.gates(p)) for p in ranks)]]
    rows += [[f"parameters: {name}", *(f"{vars(count)[name]:,}" for count in counts)] for name in vars(counts[0])]
    rows += [[kind, *(gib(memory.get(kind, 0.0)) for memory in plan.learner)] for kind in kinds]
    lines += table([*rows, ["on the device", *(gib(plan.device_bytes(memory)) for memory in plan.learner)]])
    where = "the learner's devices" if plan.shared else "devices of their own"
    rows = [[f"a rollout actor ({cfg.rollout.backend}: {cfg.rollout.actors} x {actor.devices} on {where})", ""]]
    rows += [[kind, gib(value)] for kind, value in actor.kinds.items()]
    lines += ["", *table([*rows, ["on each device", gib(plan.device_bytes(actor.kinds))]])]
    cache = "" if actor.positions is None else f"its cache holds {actor.positions:,} positions; "
    lines.append(f"  {cache}one longest answer needs {actor.sequence:,}; {actor.rows} of {actor.wanted} at a time")
    rows = [[f"an RL step on {device.name}", "PFLOP", "best s", "likely s", "bound by"]]
    for name, phase in plan.phases.items():
        flops = f"{plan.flops[name] / 1e15:.3g}" if name in plan.flops else ""
        rows.append([name, flops, f"{phase.best:.3g}", f"{phase.likely:.3g}", phase.bound_by])
    sums = [sum(getattr(phase, end) for phase in plan.phases.values()) for end in ("best", "likely")]
    rows.append(
        ["one after another", f"{sum(plan.flops.values()) / 1e15:.3g}", *(f"{seconds:.3g}" for seconds in sums), ""]
    )
    if cfg.rollout.max_staleness:
        made = [getattr(plan.phases["rollouts"], end) for end in ("best", "likely")]
        beside = (f"{max(part, whole - part):.3g}" for part, whole in zip(made, sums, strict=True))
        rows.append(["rollouts beside the rest", "", *beside, ""])
    lines += ["", *table(rows)]
    call, limit = 2 * plan.longest.answer * plan.roofline.round_seconds(), call_timeout(cfg.rollout)
    lines.append(f"  rollouts make {plan.tokens_per_s:,.0f} tokens/s; a version of the weights is {gib(plan.sync)}")
    lines.append(f"  a call on an actor takes up to {call:.3g} s of {limit:.4g} (rollout.timeout_s)")
    shares = ", ".join(f"{depth}: {share:.2f}" for depth, share in zip(load.outcomes, load.shares, strict=True))
    return "\n".join([
        *lines,
        f"\nassumed: {cfg.rl.prompts_per_step} x {cfg.rl.group_size} answers of {load.answer:g} tokens to prompts of "
        f"{load.prompt}; share of tokens by depth: {shares};",
        f"  memory for answers of {plan.longest.answer:g} tokens at full depth; {device.name}: "
        f"{gib(device.memory)}, {gib(device.reserved)} of them reserved; {device.peak(plan.item) / 1e12:.4g} TFLOP/s, "
        f"{device.bandwidth / 1e12:.3g} TB/s\n\ncommand: {command}",
    ])  # fmt: skip


def table(rows: list[list[str]]) -> list[str]:
    """Rows as aligned lines: the first column to the left."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join(["", row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in rows]


def gib(value: float) -> str:
    """Bytes in words, in GiB or MiB."""
    return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.1f} MiB"
