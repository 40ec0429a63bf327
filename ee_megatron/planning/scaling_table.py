"""Step time against the number of nodes, and why more of them stop paying."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from ..config.derive import ranks
from ..config.schema import RunConfig
from ..families import ModelDims
from .devices import Device
from .plan import Assumptions, Plan, make_plan


@dataclass(frozen=True)
class ScalingPoint:
    nodes: int
    plan: Plan

    @property
    def seconds(self) -> float:
        """Seconds of one RL step."""
        return sum(self.plan.seconds.values())


def scale(
    cfg: RunConfig, dims: ModelDims, device: Device, assumed: Assumptions, nodes: tuple[int, ...]
) -> list[ScalingPoint]:
    """The same step (the same prompts, the same batch) on more nodes: half of the devices learn, with more
    data-parallel ranks, half are rollout actors. Raises ValueError for a count that leaves no whole replica."""
    if not cfg.cluster.gpus_per_node:
        raise ValueError("--scaling: needs cluster.gpus_per_node > 0, found 0")
    points = []
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
        changed.rollout.actors = devices - ranks(changed)
        whole, rest = divmod(ranks(changed), cfg.cluster.gpus_per_node)
        changed.cluster.rollout_nodes = 0 if rest else count - whole
        points.append(ScalingPoint(count, make_plan(changed, dims, device, assumed)))
    return points


def scaling_lines(
    cfg: RunConfig, dims: ModelDims, device: Device, assumed: Assumptions, nodes: tuple[int, ...]
) -> list[str]:
    """The table as text: seconds by phase, speed-up over the first row and what each node brings of it."""
    points = scale(cfg, dims, device, assumed, nodes)
    head = f"{'nodes':>5} {'learner':>8} {'actors':>6} {'rollouts':>9} {'scoring':>8} {'update':>7} {'step s':>7}"
    lines = [f"{head} {'speed-up':>8} {'per node':>8}  what holds it back"]
    first = points[0]
    for point in points:
        plan, seconds = point.plan, point.plan.seconds
        gain = first.seconds / point.seconds
        lines.append(
            f"{point.nodes:>5} {plan.layout.ranks:>8} {plan.cfg.rollout.actors:>6} {seconds['rollouts']:>9.1f} "
            f"{seconds['scoring']:>8.1f} {seconds['update']:>7.1f} {point.seconds:>7.1f} {gain:>8.2f} "
            f"{gain * first.nodes / point.nodes:>8.2f}  {bound(plan)}"
        )
    return lines


def bound(plan: Plan) -> str:
    """The phase that takes longest and why it does not shrink, in a few words."""
    step, layout = plan.step, plan.layout
    slowest = max(plan.seconds, key=lambda phase: plan.seconds[phase])
    if slowest == "rollouts":
        mine = min(step.rows, -(-step.prompts // step.actors) * step.group)
        idle = max(0, step.actors - step.prompts)
        spare = f", {idle} actor(s) without a prompt" if idle else ""
        return f"rollouts: {plan.load.answer} tokens one after another, {mine} rows per actor{spare}"
    block = step.micro_batch * layout.data
    if step.sequences < block:
        return f"{slowest}: {step.sequences} sequences for {block} places of a micro-batch on every replica"
    batches = -(-step.sequences // block)
    idle_share = (layout.pipeline - 1) / (batches * layout.virtual + layout.pipeline - 1)
    return f"{slowest}: {batches} micro-batch(es) per replica, {idle_share:.0%} of the pipeline idle"
