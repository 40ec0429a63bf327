"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import itertools
from typing import Any

from ..config.derive import call_timeout, has_actors
from ..rollout.vllm.memory import CPU_CACHE_GIB, GPU_SHARE
from .generation import assumption
from .plan import HOST, Plan
from .step import passes
from .timing import ASSUMED

GIB, MIB = 2**30, 2**20


def to_text(plan: Plan, command: str) -> str:
    parts = (
        _layout(plan), _parameters(plan), _learner(plan), _actor(plan), _phases(plan), _rollouts(plan),
        _assumptions(plan),
        [f"command: {command}"],
    )  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in parts)


def summary(plan: Plan) -> list[str]:
    """The few lines that a dry run adds."""
    most = max(plan.device_bytes(kinds) for kinds in plan.learner)
    each = "rollout actor" if plan.actor.devices == 1 else "device of a rollout actor"
    actor = f", {size(plan.device_bytes(plan.actor.kinds))} per {each}" if plan.generates else ""
    sent = f" and sent to the rollout pool ({plan.sync / MIB:.1f} MiB)" if plan.generates else ""
    seconds = ", ".join(f"{phase} {plan.best_seconds[phase]:.3g} to {s:.3g} s" for phase, s in plan.seconds.items())
    lack = plan.shortage()
    return [
        f"parameters: {_count(sum(p.base for p in plan.parameters) * plan.layout.tensor)} of the base over all ranks, "
        f"{_count(plan.trained)} trained{sent}",
        f"memory: up to {size(most)} per learner rank{actor} ({plan.item} bytes per element of the base)",
        *([f"does not fit: {lack} (ee-megatron plan names what would, and plans for other devices)"] if lack else []),
        f"estimate per RL step on {plan.device.name}: {seconds} (ee-megatron plan shows how)",
    ]


def to_json(plan: Plan, command: str) -> dict[str, Any]:
    layout = plan.layout
    return {
        "ranks": layout.ranks,
        "layout": {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data,
                   "virtual": layout.virtual, "layers_per_stage": list(layout.sizes)},
        "exits": list(layout.spec.exit_depths),
        "gates": [layout.gates(p) for p in range(layout.pipeline)],
        "parameters": [vars(p) for p in plan.parameters],
        "learner_bytes": plan.learner,
        "actor_bytes": plan.actor.kinds,
        "actor": {"backend": plan.actor.backend, "devices": plan.actor.devices, "rows": plan.actor.rows,
                  "wanted_rows": plan.actor.wanted, "cache_positions": plan.actor.positions,
                  "reader_bytes": plan.actor.reader, "cache_beside_reader_bytes": plan.actor.beside_reader},
        "round": vars(plan.round),
        "tokens_per_s": dict(zip(("actor", "pool"), plan.tokens_per_s, strict=True)) if plan.generates else {},
        "shared_devices": plan.shared,
        "flops": plan.flops,
        "seconds": plan.seconds,
        "seconds_at_best": plan.best_seconds,
        "seconds_less_at_best": plan.gains,
        "sync_bytes": plan.sync,
        "device": vars(plan.device),
        "command": command,
    }  # fmt: skip


def size(value: float) -> str:
    """Bytes in words, in GiB or MiB."""
    return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / MIB:.1f} MiB"


def _count(value: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f}"


def _flops(value: float) -> str:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def _layout(plan: Plan) -> list[str]:
    layout = plan.layout
    edges = [0, *itertools.accumulate(layout.sizes)]
    lines = [
        f"{plan.cfg.name}: {layout.dims.family}, {layout.dims.num_layers} layers, hidden {layout.dims.hidden}, "
        f"vocabulary {layout.dims.vocab}",
        f"ranks: {layout.ranks} = tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
        + (f", {layout.virtual} stages per pipeline rank" if layout.virtual > 1 else ""),
        f"exits: {list(layout.spec.exit_depths)}",
    ]
    for stage, (first, last) in enumerate(itertools.pairwise(edges)):
        gates = [depth for depth in layout.spec.exit_depths if first <= depth < last]
        lines.append(
            f"  stage {stage} on pipeline rank {stage % layout.pipeline}: layers {first + 1}-{last}, gates {gates}"
        )
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            ["", row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in [head, *rows]
    ]


def _parameters(plan: Plan) -> list[str]:
    rows = [
        [f"pipeline rank {p}", *(f"{n:,}" for n in (c.base, c.copy, c.adapters, c.gates, c.total))]
        for p, c in enumerate(plan.parameters)
    ]
    head = ["parameters of a rank", "base", "tied copy", "adapters", "gates", "all"]
    return _table(head, rows)


def _learner(plan: Plan) -> list[str]:
    kinds = list(dict.fromkeys(kind for found in plan.learner for kind in found))
    head = ["memory of a learner rank", *(f"pipeline rank {p}" for p in range(len(plan.learner)))]
    rows = [[kind, *(size(found.get(kind, 0.0)) for found in plan.learner)] for kind in kinds]
    rows.append(["on the device", *(size(plan.device_bytes(found)) for found in plan.learner)])
    note = f"  {HOST} lies in host memory" if HOST in kinds else ""
    return _table(head, rows) + ([note] if note else [])


def _actor(plan: Plan) -> list[str]:
    actor, rollout, device = plan.actor, plan.cfg.rollout, plan.device
    rows = [[kind, size(value)] for kind, value in actor.kinds.items()]
    rows.append(["on the device" if actor.devices == 1 else "on each device", size(plan.device_bytes(actor.kinds))])
    where = "on the learner's devices" if plan.shared else "on devices of their own"
    each = f" x {actor.devices} devices" if actor.devices > 1 else ""
    head = [f"memory of a rollout actor ({rollout.backend}: {rollout.actors}{each}, {where})", ""]
    lines = [*_table(head, rows), f"  {device.name}: {size(device.memory)}, {size(device.reserved)} of them reserved"]
    if not plan.generates:
        return [f"rollouts: recorded ones, from {plan.cfg.rl.replay}; no actors"]
    if actor.backend == "vllm" and not rollout.cache_gib:
        share = f"{CPU_CACHE_GIB} GiB on a CPU" if plan.on_cpu else f"what is left of {GPU_SHARE:g} of the device"
        lines.append(
            f"  its cache is {share}, which vLLM takes whatever is asked of it (rollout.cache_gib: less or more)"
        )
    return lines + _cache(plan) + _reader(plan)


def _cache(plan: Plan) -> list[str]:
    actor = plan.actor
    if actor.positions is None:
        return [f"  its cache has what {actor.rows} rows in flight take; rollout.cache_gib bounds it"]
    wanted = f"of {actor.wanted} that it is given" if actor.rows < actor.wanted else "as many as it is given"
    return [
        f"  its cache holds {actor.positions:,} positions, a longest sequence takes {actor.sequence:,}: "
        f"{actor.rows} answers in flight, {wanted} (rollout.max_num_seqs={plan.cfg.rollout.max_num_seqs})"
    ]


def _reader(plan: Plan) -> list[str]:
    """The embedded engine's replica in an actor of vLLM's: where it is made, and whether there is room."""
    actor = plan.actor
    if not actor.reader:
        return []
    if actor.beside_reader >= actor.kinds["KV cache"]:
        verdict = "there is room for it"
    elif actor.beside_reader:
        most = actor.beside_reader // (GIB / 10) / 10
        verdict = f"run them with rollout.cache_gib={most:g} or less, or there is no room for it"
    else:
        verdict = "no cache leaves room for it: run them with rollout.backend=ray where one device, or a host with "
        verdict += "device=cpu, holds it"
    return [
        f"  traces and evaluate read answers again by a whole replica of {size(actor.reader)} on its first device, "
        "made when first needed (RL needs none):",
        f"  {verdict}",
    ]


def _phases(plan: Plan) -> list[str]:
    rows = [
        [phase, _flops(plan.flops[phase]) if phase in plan.flops else "", *_range(plan.best_seconds[phase], seconds)]
        for phase, seconds in plan.seconds.items()
    ]
    best = sum(plan.best_seconds.values())
    rows.append(["all, one after another", _flops(sum(plan.flops.values())), *_range(best, plan.step_seconds)])
    sync = ", ".join(f"{part} {seconds:.2g} s" for part, seconds in plan.roofline.sync().items())
    lines = _table([f"an RL step on {plan.device.name}", "FLOPs", "at best", "likely"], rows)
    if sync:
        lines.append(f"  sent to the rollout pool: {plan.sync:,} bytes per version ({sync})")
    for (name, gain), title in zip(plan.gains.items(), ("weighs most", "then"), strict=False):
        what, value = ASSUMED[name]
        lines.append(
            f"  {title}: {what}, {value(plan.roofline)}; at {value(plan.roofline.at_best(name))} a step takes "
            f"{plan.step_seconds - gain:.3g} s"
        )
    return lines


def _range(best: float, likely: float) -> tuple[str, str]:
    return f"{best:.3g} s", f"{likely:.3g} s"


def _rollouts(plan: Plan) -> list[str]:
    if not plan.generates:
        return []
    one, actor, (each, pool) = plan.round, plan.actor, plan.tokens_per_s
    parts = ", ".join(f"{part} {seconds * 1e3:.3g}" for part, seconds in one.parts.items() if seconds)
    skips = "all layers for every token" if actor.backend == "vllm" else "layers behind an exit are skipped"
    most = one.weighs_most
    lines = [
        f"rollouts: {each:,.0f} tokens/s of an actor with {actor.rows} rows in flight, {pool:,.0f} of the pool over "
        f"the phase; {skips}",
        f"  a token for every row takes {one.seconds * 1e3:.3g} ms, by themselves: {parts}",
        f"  of a round most is {most} ({assumption(most, plan.device)})",
    ]
    if has_actors(plan.cfg.rollout):
        lines.append(
            f"  a call on an actor, up to two waves of the longest answers, takes up to "
            f"{2 * plan.longest.answer * one.seconds:.3g} s of {call_timeout(plan.cfg.rollout):.4g} (rollout.timeout_s)"
        )
    return lines


def _assumptions(plan: Plan) -> list[str]:
    load, rl, device = plan.load, plan.cfg.rl, plan.device
    pairs = list(zip(load.outcomes, load.shares, strict=True))
    layers = plan.layout.dims.num_layers
    free = load.later * sum(depth * share for depth, share in pairs)
    mean = (layers * (load.answer - load.later) + free) / load.answer / layers
    shares = ", ".join(f"{depth}: {share:.2f}" for depth, share in pairs)
    return [
        f"assumed: {rl.prompts_per_step} x {rl.group_size} answers of {load.answer} tokens to prompts of "
        f"{load.prompt}; mean depth {mean:.2f} of the layers",
        f"  (share of tokens by depth: {shares}); memory for answers of {plan.longest.answer} tokens at full depth;",
        f"  {device.name}: {device.peak(plan.item) / 1e12:.4g} TFLOP/s in {8 * plan.item} bits; memory "
        f"{device.bandwidth / 1e12:.3g} TB/s, links {device.link / 1e9:.3g} GB/s, network "
        f"{device.network / 1e9:.3g} GB/s",
    ]


def scaling_lines(plans: list[Plan]) -> list[str]:
    """Plans of one step on growing numbers of nodes: seconds by phase, speed-up over the first and what each node
    brings of it."""
    head = f"{'nodes':>5} {'learner':>8} {'actors':>6} {'rollouts':>9} {'scoring':>8} {'update':>7} {'step s':>7}"
    lines = [f"{head} {'speed-up':>8} {'per node':>8}  what holds it back"]
    for plan in plans:
        nodes, seconds, gain = plan.cfg.cluster.nodes, plan.seconds, plans[0].step_seconds / plan.step_seconds
        lines.append(
            f"{nodes:>5} {plan.layout.ranks:>8} {plan.cfg.rollout.actors:>6} {seconds['rollouts']:>9.1f} "
            f"{seconds['scoring']:>8.1f} {seconds['update']:>7.1f} {plan.step_seconds:>7.1f} {gain:>8.2f} "
            f"{gain * plans[0].cfg.cluster.nodes / nodes:>8.2f}  {_bound(plan)}"
        )
    return lines


def _bound(plan: Plan) -> str:
    """The phase that takes longest and why it does not shrink, in a few words."""
    cfg, layout = plan.cfg, plan.layout
    prompts, group, actors = cfg.rl.prompts_per_step, cfg.rl.group_size, cfg.rollout.actors
    slowest = max(plan.seconds, key=lambda phase: plan.seconds[phase])
    if slowest == "rollouts":
        idle = max(0, actors - prompts)
        spare = f", {idle} actor(s) without a prompt" if idle else ""
        return f"rollouts: {plan.load.answer} tokens one after another, {plan.actor.rows} rows per actor{spare}"
    if slowest == "exits read":
        return f"{slowest}: {-(-prompts // actors) * group} answers per actor, under the policy and the reference"
    if slowest == "weight sync":
        return f"{slowest}: {size(plan.sync)} to every actor"
    packed = max((packed for _, packed, _ in passes(cfg, plan.load)[slowest]), key=lambda found: found.sequences)
    if prompts * group < layout.data:
        return f"{slowest}: {prompts * group} sequences for {layout.data} replicas"
    batches = packed.micro_batches
    idle_share = (layout.pipeline - 1) / (batches * layout.virtual + layout.pipeline - 1)
    return f"{slowest}: {batches} micro-batch(es) per replica, {idle_share:.0%} of the pipeline idle"
