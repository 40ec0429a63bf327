"""Seconds per phase of an RL step, by a roofline: the slower of arithmetic and memory traffic, and links.

An estimate for comparing layouts, not a promise: it knows no stragglers, no answers of unequal length, no overlap of
communication with arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.schema import RunConfig
from .devices import Device
from .flops import PassMode, pass_cost, prefill_cost
from .generation import all_reduce, token_round
from .layout import Layout, rank_parameters
from .memory import FP32, sync_bytes
from .packing import Packing
from .step import passes, updates
from .workload import Workload

# Packing, digests and unpacking of a version's bytes: 282 MB in a second (docs/serving.md).
PACKED_BYTES_PER_S = 282e6
# Every process of a vLLM reads the whole base again for each version and merges adapters on the host, a core each. What
# was measured on a shared core here is a fifth of both.
READ_BYTES_PER_S, MERGED_BYTES_PER_S = 4e9, 2e9


@dataclass(frozen=True)
class Roofline:
    """item: bytes per element of the base; rows: answers that an actor has in flight at a time."""

    cfg: RunConfig
    layout: Layout
    load: Workload
    device: Device
    item: int
    rows: int

    def phases(self) -> dict[str, float]:
        """Phase of an RL step -> seconds. Where recorded rollouts are learned from none are made or sent weights."""
        learner = {
            "scoring": self._passes("scoring"),
            "update": self._passes("update") + self._optimizer(),
        }
        if self.cfg.rl.replay:
            return learner
        return {"rollouts": self._rollouts(), **learner, "weight sync": sum(self.sync().values())}

    def _rollouts(self) -> float:
        """The busiest actor: its prompts read, then wave after wave of rows, token by token."""
        prompts = -(-self.cfg.rl.prompts_per_step // self.cfg.rollout.actors)
        mine = prompts * self.cfg.rl.group_size
        rows = min(self.rows, mine)
        each = token_round(self.cfg, self.layout, self.load, self.device, self.item, rows).seconds
        return prompts * self._read() + -(-mine // rows) * (self.load.answer - 1) * each

    def _read(self) -> float:
        """A prompt for all of its answers: once or, by vLLM, for every answer, on all its devices."""
        dims, prompt, tensor = self.layout.dims, self.load.prompt, self.cfg.rollout.tensor
        seconds = prefill_cost(dims, prompt) / self.device.flops
        if self.cfg.rollout.backend != "vllm":
            return seconds
        reduced = (2 * dims.num_layers + 1) * all_reduce(prompt * dims.hidden * self.item, self.device, tensor)
        return self.cfg.rl.group_size * (seconds / tensor + reduced)

    def sync(self) -> dict[str, float]:
        """Seconds of what it takes to bring a version of the policy's tensors to an actor; actors do it at a time."""
        if self.cfg.rl.replay:
            return {}
        sent = sync_bytes(self.layout, self.item, self.cfg.rollout.sync_dtype)
        found = {"network": sent / self.device.network, "packing and digests": sent / PACKED_BYTES_PER_S}
        if self.cfg.rollout.backend == "vllm" and not self.layout.spec.full:
            dims, merged = self.layout.dims, self.layout.spec.targets if self.layout.spec.rank else ()
            base = sum(math.prod(shape) for shape in dims.tensor_shapes().values())
            changed = dims.num_layers * sum(math.prod(dims.linear_shapes()[name]) for name in merged)
            found["reading the base again"] = self.item * base / READ_BYTES_PER_S
            found["merging adapters"] = self.item * changed / MERGED_BYTES_PER_S
        return found

    def _passes(self, phase: str) -> float:
        return sum(times * self._pass(packed, how) for times, packed, how in passes(self.cfg, self.load)[phase])

    def _optimizer(self) -> float:
        """The gradients' all-reduce and AdamW, over all updates of a step."""
        layout, device, (count, _, _) = self.layout, self.device, updates(self.cfg)
        largest = max(rank_parameters(layout, p).trained(layout.spec.full) for p in range(layout.pipeline))
        ring = 2 * (layout.data - 1) / layout.data
        reduce = ring * FP32 * largest / self._link(layout.ranks)
        # AdamW reads and writes parameter, gradient and both moments.
        adam = 7 * FP32 * largest / (layout.data if self.cfg.deepspeed.zero_stage else 1) / device.bandwidth
        return count * (reduce + adam)

    def _pass(self, packed: Packing, how: PassMode) -> float:
        """The slowest stage, the pipeline's filling and draining, tensor-parallel sums, and a micro-batch's way through
        the pipeline (the others' hops hide behind arithmetic)."""
        layout, batches = self.layout, packed.micro_batches
        slowest = max(pass_cost(layout, packed.load, packed.sequences, how))
        busy = slowest / self.device.flops + batches * self._tensor_sums(packed, how)
        idle = (layout.pipeline - 1) / (batches * layout.virtual)
        hop = self.device.network if self.cfg.cluster.gpus_per_node else self.device.link
        return busy * (1 + idle) + (layout.pipeline - 1) * self._stream(packed) / hop

    def _tensor_sums(self, packed: Packing, how: PassMode) -> float:
        """Per micro-batch: two sums per layer forward, two backward, of the active positions' streams."""
        layout = self.layout
        layers = layout.dims.num_layers / layout.pipeline
        passes = (1 + how.train + (how.train and how.recompute)) * 2
        ring = 2 * (layout.tensor - 1) / layout.tensor
        return layers * passes * ring * self._stream(packed) / self._link(layout.tensor)

    def _stream(self, packed: Packing) -> float:
        """Bytes of a micro-batch's residual stream."""
        return float(packed.width * self.layout.dims.hidden * self.item)

    def _link(self, peers: int) -> float:
        """Bytes/s between that many ranks in a row; without cluster.gpus_per_node all of them are on one node."""
        node = self.cfg.cluster.gpus_per_node
        return self.device.network if node and peers > node else self.device.link
