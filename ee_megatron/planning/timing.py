"""Seconds per phase of an RL step, by a roofline: the slower of arithmetic and memory traffic, and links.

An estimate for comparing layouts, not a promise: it knows no stragglers, no answers of unequal length, no overlap of
communication with arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import RunConfig
from .devices import Device
from .flops import PassMode, decode_cost, micro_batches, pass_cost, prefill_cost
from .layout import Layout, rank_parameters
from .memory import FP32, sync_bytes
from .step import POLICY, REFERENCE, rollouts_per_step, updates
from .workload import Workload

# Kernels that the decoder starts per layer and token step in plain PyTorch, gates and readout spread over the layers.
KERNELS_PER_LAYER = 25


@dataclass(frozen=True)
class Roofline:
    """item: bytes per element of the base."""

    cfg: RunConfig
    layout: Layout
    load: Workload
    device: Device
    item: int

    def phases(self) -> dict[str, float]:
        """Phase of an RL step -> seconds."""
        return {
            "rollouts": self._rollouts(),
            "scoring": self._scoring(),
            "update": self._update(),
            # The policy's tensors once over the network.
            "weight sync": sync_bytes(self.layout, self.item, self.cfg.rollout.sync_dtype) / self.device.network,
        }

    def _rollouts(self) -> float:
        """The busiest actor: its prompts read, then wave after wave of rows, token by token."""
        dims, load, device = self.layout.dims, self.load, self.device
        prompts = -(-self.cfg.rl.prompts_per_step // self.cfg.rollout.actors)
        mine = prompts * self.cfg.rl.group_size
        rows = min(self.cfg.rollout.rows, mine)
        read = prompts * prefill_cost(dims, load.prompt) / device.flops
        linears = sum(a * b for a, b in dims.linear_shapes().values())
        gates = sum(math.prod(shape) for shape in self.layout.spec.gate_shapes(dims).values())
        weights = dims.num_layers * linears + dims.vocab * dims.hidden + gates
        span = load.prompt + load.answer / 2
        cache = rows * span * dims.num_layers * 2 * dims.kv_size
        per_token = max(
            self.item * (weights + cache) / device.bandwidth,
            rows * decode_cost(self.layout, load) / max(1, load.answer - 1) / device.flops,
            dims.num_layers * KERNELS_PER_LAYER * device.launch,
        )
        return read + -(-mine // rows) * (load.answer - 1) * per_token

    def _scoring(self) -> float:
        """The policy under the recorded exits and the reference; the policy once more before each further update."""
        count, part, _ = updates(self.cfg)
        seconds = sum(self._pass(rollouts_per_step(self.cfg), how) for how in (POLICY, REFERENCE))
        return seconds + (count - 1) * self._pass(part, POLICY)

    def _update(self) -> float:
        """Forward and backward passes, the gradients' all-reduce and AdamW, over all updates of a step."""
        layout, device, (count, part, how) = self.layout, self.device, updates(self.cfg)
        largest = max(rank_parameters(layout, p).trained(layout.spec.full) for p in range(layout.pipeline))
        ring = 2 * (layout.data - 1) / layout.data
        reduce = ring * FP32 * largest / self._link(layout.ranks)
        # AdamW reads and writes parameter, gradient and both moments.
        adam = 7 * FP32 * largest / (layout.data if self.cfg.deepspeed.zero_stage else 1) / device.bandwidth
        return count * (self._pass(part, how) + reduce + adam)

    def _pass(self, sequences: int, how: PassMode) -> float:
        """One pass over `sequences`: the slowest stage, the pipeline's filling and draining, tensor-parallel sums, and
        a micro-batch's way through the pipeline (the others' hops hide behind arithmetic)."""
        layout, size = self.layout, self.cfg.parallel.micro_batch_size
        batches = sum(real > 0 for real in micro_batches(layout, size, sequences, 0))
        slowest = max(pass_cost(layout, self.load, size, sequences, how))
        busy = slowest / self.device.flops + batches * self._tensor_sums(how)
        idle = (layout.pipeline - 1) / (batches * layout.virtual)
        hop = self.device.network if self.cfg.cluster.gpus_per_node else self.device.link
        return busy * (1 + idle) + (layout.pipeline - 1) * self._stream() / hop

    def _tensor_sums(self, how: PassMode) -> float:
        """Per micro-batch: two sums per layer forward, two backward, of the active positions' streams."""
        layout = self.layout
        layers = layout.dims.num_layers / layout.pipeline
        passes = (1 + how.train + (how.train and how.recompute)) * 2
        ring = 2 * (layout.tensor - 1) / layout.tensor
        return layers * passes * ring * self._stream() / self._link(layout.tensor)

    def _stream(self) -> float:
        """Bytes of a micro-batch's residual stream."""
        return self.cfg.parallel.micro_batch_size * self.load.length * self.layout.dims.hidden * self.item

    def _link(self, peers: int) -> float:
        """Bytes/s between that many ranks in a row; without cluster.gpus_per_node all of them are on one node."""
        node = self.cfg.cluster.gpus_per_node
        return self.device.network if node and peers > node else self.device.link
