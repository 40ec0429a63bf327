"""Seconds per phase of an RL step, by a roofline: the slower of arithmetic and starting kernels, memory traffic, links.

An estimate, likely and at best: what is assumed has two ends (devices.py). It knows no stragglers among ranks and no
overlap of communication with arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config.derive import exits_read
from ..config.schema import RunConfig
from .devices import Device
from .flops import PassMode, exits_read_cost, pass_cost, prefill_cost, wide_cost
from .generation import all_reduce, token_round
from .layout import Layout, rank_parameters
from .memory import FP32, Training, layer_activations, sync_bytes
from .packing import Packing
from .step import passes, updates
from .workload import Workload

# Packing, digests and unpacking of a version's bytes: 282 MB in a second (docs/serving.md).
PACKED_BYTES_PER_S = 282e6
# Every process of a vLLM reads the whole base again for each version and merges adapters on the host, a core each. What
# was measured on a shared core here is a fifth of both.
READ_BYTES_PER_S, MERGED_BYTES_PER_S = 4e9, 2e9
# Kernels that PyTorch starts on a GPU for a layer and a micro-batch, its share of the readout and of the optimizer
# included: counted on the pretend GPU (tests/device), which holds them here.
LEARNER_KERNELS = {"reference": 104, "score": 151, "update": 452, "update, recomputed": 581}
# How often what autograd keeps of a layer is written or read besides products: norms, rotation, activations, residuals,
# copies between dtypes. A guess that gives them the fifth of a step that they took on a CPU (docs/lab-log.md).
FORWARD_TRAFFIC, BACKWARD_TRAFFIC = 3.0, 5.0

LENGTHS = "lengths"
ASSUMED: dict[str, tuple[str, Callable[[Roofline], str]]] = {
    "efficiency": ("share of the peak that large products reach", lambda r: f"{r.device.efficiency:.0%}"),
    "streaming": (
        "share of the memory's bandwidth that reading weights and cache reaches",
        lambda r: f"{r.device.streaming:.0%}",
    ),
    "moving": ("share of the memory's bandwidth that elementwise work reaches", lambda r: f"{r.device.moving:.0%}"),
    "reach": ("share of links and network that is reached", lambda r: f"{r.device.reach:.0%}"),
    "launch": ("time in which the host starts a kernel", lambda r: f"{r.device.launch * 1e6:.3g} us"),
    "wait": ("time lost when host or device waits for the other", lambda r: f"{r.device.wait * 1e6:.3g} us"),
    "row": ("the host's work on a row's token", lambda r: f"{r.device.row * 1e6:.3g} us"),
    "host": ("speed of cores that pack, read and merge weights", lambda r: f"{r.device.host:g} x what was measured"),
    LENGTHS: ("tokens of the longest answer, which a step waits for", lambda r: f"{r.longest}"),
}
"""What an estimate rests on: in words, and its value."""


@dataclass(frozen=True)
class Roofline:
    """item: bytes per element of the base; rows: answers that an actor has in flight at a time; longest: tokens of the
    longest answer, which a step waits for."""

    cfg: RunConfig
    layout: Layout
    load: Workload
    device: Device
    item: int
    rows: int
    longest: int

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return sum(self.phases().values())

    @property
    def assumed(self) -> list[str]:
        """Names of what has another end than the likely one."""
        moved = [name for name, value in self.device.best.items() if value != getattr(self.device, name)]
        return [*moved, *([LENGTHS] if self.longest != self.load.answer else [])]

    def at_best(self, *names: str) -> Roofline:
        """With these assumptions at their optimistic end."""
        device = self.device.at_best(*(name for name in names if name != LENGTHS))
        return replace(self, device=device, longest=self.load.answer if LENGTHS in names else self.longest)

    def phases(self) -> dict[str, float]:
        """Phase of an RL step -> seconds. Where recorded rollouts are learned from none are made or sent weights."""
        learner = {
            "scoring": self._passes("scoring"),
            "update": self._passes("update") + self._optimizer(),
        }
        if self.cfg.rl.replay:
            return learner
        read = {"exits read": self._exits_read()} if exits_read(self.cfg.rl) else {}
        return {"rollouts": self._rollouts(), **read, **learner, "weight sync": sum(self.sync().values())}

    def _rollouts(self) -> float:
        """The busiest actor: its prompts read, then rounds of all rows, one for each token of wave after wave of rows
        or, if that takes longer, of the longest answer, with fewer rows in the end."""
        prompts = -(-self.cfg.rl.prompts_per_step // self.cfg.rollout.actors)
        mine = prompts * self.cfg.rl.group_size
        rows, later = min(self.rows, mine), self.load.later
        rounds = max(-(-mine // rows) * later, self.longest - (self.load.answer - later))
        in_flight = max(1.0, mine * later / rounds) if rounds else 1.0
        each = token_round(self.cfg, self.layout, self.load, self.device, self.item, in_flight).seconds
        return prompts * self._read() + rounds * each

    def _exits_read(self) -> float:
        """Of the busiest actor."""
        mine = -(-self.cfg.rl.prompts_per_step // self.cfg.rollout.actors) * self.cfg.rl.group_size
        flops = mine * exits_read_cost(self.layout, self.load, self.cfg.rl.group_size)
        return flops / self.device.of_cores(self.cfg.rollout.threads).flops(self.item)

    def _read(self) -> float:
        """A prompt, once for all of its answers (vLLM finds its blocks again), on all of an actor's devices."""
        dims, prompt, tensor = self.layout.dims, self.load.prompt, self.cfg.rollout.tensor
        device = self.device.of_cores(self.cfg.rollout.threads)
        seconds = prefill_cost(dims, prompt - self.load.first_token) / device.flops(self.item)
        if self.cfg.rollout.backend != "vllm":
            return seconds
        reduced = (2 * dims.num_layers + 1) * all_reduce(prompt * dims.hidden * self.item, self.device, tensor)
        return seconds / tensor + reduced

    def sync(self) -> dict[str, float]:
        """Seconds of what it takes to bring a version of the policy's tensors to an actor; actors do it at a time."""
        if self.cfg.rl.replay:
            return {}
        sent = sync_bytes(self.layout, self.item, self.cfg.rollout.sync_dtype)
        device = self.device
        found = {
            "network": sent / device.network / device.reach,
            "packing and digests": sent / PACKED_BYTES_PER_S / device.host,
        }
        if self.cfg.rollout.backend == "vllm" and not self.layout.spec.full:
            dims, merged = self.layout.dims, self.layout.spec.targets if self.layout.spec.rank else ()
            base = sum(math.prod(shape) for shape in dims.tensor_shapes().values())
            changed = dims.num_layers * sum(math.prod(dims.linear_shapes()[name]) for name in merged)
            found["reading the base again"] = self.item * base / READ_BYTES_PER_S / device.host
            found["merging adapters"] = self.item * changed / MERGED_BYTES_PER_S / device.host
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
        adam = (
            7
            * FP32
            * largest
            / (layout.data if self.cfg.deepspeed.zero_stage else 1)
            / device.bandwidth
            / device.streaming
        )
        return count * (reduce + adam)

    @property
    def _ranks_device(self) -> Device:
        """What a learner rank has: of a CPU all cores, or one, or a share of one where there are fewer than ranks."""
        ranks, cores = self.layout.ranks, self.device.cores
        return self.device.of_cores(cores if ranks == 1 else min(1.0, cores / ranks))

    def _pass(self, packed: Packing, how: PassMode) -> float:
        """The slowest stage, the pipeline's filling and draining, tensor-parallel sums, and a micro-batch's way through
        the pipeline (the others' hops hide behind arithmetic)."""
        layout, batches, device = self.layout, packed.micro_batches, self._ranks_device
        computing = self._arithmetic(packed, how) + batches * self._traffic(packed, how)
        starting = batches * layout.dims.num_layers / layout.pipeline * kernels(how) * device.launch
        # A GPU works while the host starts what comes next.
        busy = computing + starting if device.packed else max(computing, starting)
        busy += batches * self._tensor_sums(packed, how)
        idle = (layout.pipeline - 1) / (batches * layout.virtual)
        hop = self.device.network if self.cfg.cluster.gpus_per_node else self.device.link
        return busy * (1 + idle) + (layout.pipeline - 1) * self._stream(packed) / hop / device.reach

    def _arithmetic(self, packed: Packing, how: PassMode) -> float:
        """Seconds of the slowest stage's products."""
        layout, device, share = self.layout, self._ranks_device, packed.sequences / self.layout.data
        costs = pass_cost(layout, packed.load, packed.sequences, how)
        if not device.packed:
            return max(costs) / device.flops(self.item)
        wide = [wide_cost(layout, packed.load, p, share, how) for p in range(layout.pipeline)]
        return max(
            (cost - in_float32) / device.flops(self.item) + in_float32 / device.flops(FP32)
            for cost, in_float32 in zip(costs, wide, strict=True)
        )

    def _traffic(self, packed: Packing, how: PassMode) -> float:
        """Seconds per micro-batch of what a rank's layers move besides products, by what autograd would keep of one."""
        layout, device, load = self.layout, self._ranks_device, packed.load
        training = Training(self.item, False, self.cfg.deepspeed.zero_stage, False, device.packed)
        middle = layout.dims.num_layers // 2
        active = sum(load.active(layer, full=not how.policy) for layer in range(1, layout.dims.num_layers + 1))
        share = active / layout.dims.num_layers / load.active(middle, full=True)
        kept = share * layer_activations(layout, packed, training, middle) * layout.dims.num_layers / layout.pipeline
        times = FORWARD_TRAFFIC * (1 + (how.train and how.recompute)) + BACKWARD_TRAFFIC * how.train
        return times * kept / device.bandwidth / device.moving

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
        return (self.device.network if node and peers > node else self.device.link) * self.device.reach


def kernels(how: PassMode) -> int:
    """Kernels of a layer and a micro-batch."""
    if how.train:
        return LEARNER_KERNELS["update, recomputed" if how.recompute else "update"]
    return LEARNER_KERNELS["score" if how.policy else "reference"]
