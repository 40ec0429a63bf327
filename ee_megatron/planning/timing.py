"""Seconds per phase of an RL step, by a roofline: the slower of arithmetic and memory traffic, and links.

An estimate for comparing layouts, not a promise: it knows no stragglers, no answers of unequal length, no overlap of
communication with arithmetic.
"""

from __future__ import annotations

from .devices import Device
from .flops import PassMode, decode_cost, micro_batches, pass_cost, prefill_cost
from .layout import Layout, rank_parameters
from .memory import FP32, sync_bytes
from .step import Step
from .workload import Workload

# Kernels that the decoder starts per layer and token step in plain PyTorch, gates and readout spread over the layers.
KERNELS_PER_LAYER = 25


def rollout_seconds(layout: Layout, load: Workload, step: Step, device: Device) -> float:
    """The busiest actor: its prompts read, then wave after wave of rows, token by token."""
    dims = layout.dims
    mine = -(-step.prompts // step.actors) * step.group
    rows = min(step.rows, mine)
    read = -(-step.prompts // step.actors) * prefill_cost(dims, load.prompt) / device.flops
    linears = sum(a * b for a, b in dims.linear_shapes().values())
    weights = dims.num_layers * linears + dims.vocab * dims.hidden
    span = load.prompt + load.answer / 2
    cache = rows * span * dims.num_layers * 2 * dims.kv_size
    per_token = max(
        step.item * (weights + cache) / device.bandwidth,
        rows * decode_cost(layout, load) / max(1, load.answer - 1) / device.flops,
        dims.num_layers * KERNELS_PER_LAYER * device.launch,
    )
    return read + -(-mine // rows) * (load.answer - 1) * per_token


def pass_seconds(layout: Layout, load: Workload, step: Step, device: Device, sequences: int, how: PassMode) -> float:
    """One pass over `sequences`: the slowest stage, the pipeline's filling and draining, tensor-parallel sums."""
    batches = sum(real > 0 for real in micro_batches(layout, step.micro_batch, sequences, 0))
    slowest = max(cost.total for cost in pass_cost(layout, load, step.micro_batch, sequences, how).values())
    busy = slowest / device.flops + batches * _tensor_sums(layout, load, step, device, how)
    idle = (layout.pipeline - 1) / (batches * layout.virtual)
    return busy * (1 + idle) + _hops(layout, load, step, device)


def _tensor_sums(layout: Layout, load: Workload, step: Step, device: Device, how: PassMode) -> float:
    """Per micro-batch: two sums per layer forward, two backward, of the active positions' streams."""
    if layout.tensor == 1:
        return 0.0
    link = device.link if not step.gpus_per_node or layout.tensor <= step.gpus_per_node else device.network
    layers = layout.dims.num_layers / layout.pipeline
    passes = (1 + how.train + (how.train and how.recompute)) * 2
    ring = 2 * (layout.tensor - 1) / layout.tensor
    size = step.micro_batch * load.length * layout.dims.hidden * step.item
    return layers * passes * ring * size / link


def _hops(layout: Layout, load: Workload, step: Step, device: Device) -> float:
    """A micro-batch's way through the pipeline; the others' hops hide behind arithmetic."""
    size = step.micro_batch * load.length * layout.dims.hidden * step.item
    return (layout.pipeline - 1) * size / (device.network if step.gpus_per_node else device.link)


def score_seconds(layout: Layout, load: Workload, step: Step, device: Device) -> float:
    """The policy under the recorded exits and the reference at full depth; once more before each further update."""
    policy, reference = PassMode(train=False), PassMode(train=False, policy=False)
    seconds = sum(pass_seconds(layout, load, step, device, step.sequences, how) for how in (policy, reference))
    part = max(1, step.sequences // step.updates)
    return seconds + (step.updates - 1) * pass_seconds(layout, load, step, device, part, policy)


def update_seconds(layout: Layout, load: Workload, step: Step, device: Device) -> float:
    """Forward and backward passes, the gradients' all-reduce and AdamW, over all updates of a step."""
    part = max(1, step.sequences // step.updates)
    largest = max(rank_parameters(layout, p).trained(layout.spec.full) for p in range(layout.pipeline))
    spans = bool(step.gpus_per_node) and layout.ranks > step.gpus_per_node
    ring = 2 * (layout.data - 1) / layout.data
    reduce = ring * FP32 * largest / (device.network if spans else device.link)
    # AdamW reads and writes parameter, gradient and both moments.
    adam = 7 * FP32 * largest / (layout.data if step.zero_stage else 1) / device.bandwidth
    return step.updates * (pass_seconds(layout, load, step, device, part, step.train) + reduce + adam)


def sync_seconds(layout: Layout, device: Device) -> float:
    """The policy's tensors once over the network."""
    return sync_bytes(layout) / device.network
