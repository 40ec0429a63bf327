"""Seconds per phase of an RL step, by a roofline: what arithmetic, memory, kernel launches, links and the host take.

It doesn't know stragglers among ranks, waits of host and device for each other, or communication behind arithmetic.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from ..config.derive import exits_read
from ..config.schema import RunConfig
from .devices import Device
from .flops import PassMode, decode_cost, exits_read_cost, linear_elements, pass_cost, passes, prefill_cost, updates
from .layout import Layout, rank_parameters
from .memory import FP32, sync_bytes, vllm_elements
from .workload import Packing, Workload

# Kernels of the embedded engine per layer, exit and token round, and of the learner per layer and micro-batch: counted
# on the pretend GPU (tests/device), which holds them here. On a CPU one call does most of a segment's.
KERNELS = {"layer": 62, "exit": 28, "round": 36}
CPU_KERNELS = {"layer": 1, "exit": 12, "round": 20}
LEARNER_KERNELS = {"reference": 102, "score": 149, "update": 436, "update, recomputed": 562}
# How often attention of the embedded engine moves a row's cache on a GPU: gathered out of its pages, then read.
GATHERED = 3
# The host's work on a row's token, seconds: this package's, measured on a CPU, and vLLM's own, 5.5 ms between two steps
# of 256 rows (vllm-project/vllm#11133).
ROW_S, VLLM_ROW_S = 34e-6, 5.5e-3 / 256
# An all-reduce of vLLM's own kernel between H100s: seconds for a few bytes, and the share of the link that a ring over
# it would take for more, up to 1 MiB (sgl-project/sglang#2904).
REDUCE_S, REDUCE_SHARE = 10e-6, 0.115
# What a core packs and hashes of a version of the weights (docs/serving.md), bytes/s, and reads of the base again in
# every process of a vLLM.
PACKED_BYTES_PER_S, READ_BYTES_PER_S = 282e6, 2e9


@dataclass
class DeviceWork:
    """What the slowest device of a phase does. flops; moved: bytes of its memory; kernels: started; links, host:
    seconds at the full rate of links and on the core that its work was measured on."""

    flops: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0
    links: float = 0.0
    host: float = 0.0

    def plus(self, other: DeviceWork, times: float = 1.0) -> DeviceWork:
        """With the other work done so many times."""
        return DeviceWork(
            *(mine + times * its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class PhaseTime:
    """A phase takes between `best` and `likely` seconds; bound_by: the resource that takes most of them."""

    best: float
    likely: float
    bound_by: str


@dataclass(frozen=True)
class Roofline:
    """An RL step of a run. item: bytes per element of the base; rows: concurrent answers of an actor; longest: tokens
    of the longest answer, for which the likely step waits; in the best all are of the mean length."""

    cfg: RunConfig
    layout: Layout
    load: Workload
    device: Device
    item: int
    rows: int
    longest: int

    def phases(self) -> dict[str, PhaseTime]:
        """Phase -> estimate."""
        rl, ranks, cores = self.cfg.rl, self.layout.ranks, self.device.cores
        # A CPU's actor has its threads; a rank all cores or one, or a share of one where there are fewer than ranks.
        actor = self.device.of_cores(self.cfg.rollout.threads)
        rank = self.device.of_cores(cores if ranks == 1 else min(1.0, cores / ranks))
        # Attention, gates, logits and copies bring a CPU's passes over whole answers down to float32's rate.
        rank, reader = (replace(d, tflops=d.fp32) if d.on_cpu else d for d in (rank, actor))
        learning = {phase: self._estimate(rank, self._learn(phase)) for phase in ("scoring", "update")}
        made = self._estimate(actor, self._rollouts(self.longest), self._rollouts(self.load.answer))
        read = {}
        if exits_read(rl):
            mine = -(-rl.prompts_per_step // self.cfg.rollout.actors) * rl.group_size
            flops = mine * exits_read_cost(self.layout, self.load, rl.group_size)
            read = {"exits read": self._estimate(reader, DeviceWork(flops=flops))}
        return {"rollouts": made, **read, **learning, "weight sync": self._estimate(actor, self._sync())}

    def round_seconds(self) -> float:
        """Likely seconds in which each concurrent answer of an actor gets a token."""
        return self._estimate(self.device.of_cores(self.cfg.rollout.threads), self._round(self.rows)).likely

    def _estimate(self, device: Device, likely: DeviceWork, best: DeviceWork | None = None) -> PhaseTime:
        """A GPU multiplies, reads and launches kernels concurrently; a core does one after the other."""
        ends, bound = [], ""
        for work, reach in ((best or likely, device.best), (likely, device.likely)):
            beside = {
                "arithmetic": work.flops / device.peak(self.item) / reach.compute,
                "memory": work.moved / device.bandwidth / reach.memory,
                "kernel launches": work.kernels * reach.launch,
            }
            apart = {"links": work.links / reach.links, "host": work.host / reach.host}
            ends.append((sum if device.on_cpu else max)(beside.values()) + sum(apart.values()))
            bound = max(beside | apart, key=lambda name: (beside | apart)[name])
        return PhaseTime(ends[0], ends[1], bound)

    def _rollouts(self, longest: float) -> DeviceWork:
        """The busiest actor: prefill, then rounds of all rows, one for each token of wave after wave of rows
        or, if that takes longer, of the longest answer, with fewer rows in the end."""
        dims, load, tensor = self.layout.dims, self.load, self.cfg.rollout.tensor
        prompts = -(-self.cfg.rl.prompts_per_step // self.cfg.rollout.actors)
        mine = prompts * self.cfg.rl.group_size
        rounds = max(-(-mine // min(self.rows, mine)) * load.later, longest - (load.answer - load.later))
        read = DeviceWork(
            flops=prefill_cost(dims, load.prompt - load.first_token) / tensor, links=self._sums(load.prompt)
        )
        return (
            DeviceWork().plus(read, prompts).plus(self._round(max(1.0, mine * load.later / max(1.0, rounds))), rounds)
        )

    def _round(self, rows: float) -> DeviceWork:
        """A token for each of so many rows, halfway through their answers on average. vLLM runs all layers for all rows
        on devices that share them. In the embedded engine rows that have exited run nothing more, but the weights after
        an exit are read, and their kernels started, once for all rows that continue, if any do."""
        dims, spec, load, tensor = self.layout.dims, self.layout.spec, self.load, self.cfg.rollout.tensor
        cached, later = (load.prompt + load.answer / 2) * 2 * dims.kv_size, max(1.0, load.later)
        gates = sum(map(math.prod, spec.gate_shapes(dims).values()))
        if self.cfg.rollout.backend == "vllm":
            moved = self.item * (vllm_elements(self.layout, tensor) + rows * cached * dims.num_layers / tensor)
            # Gates are float32 there, and rounded in every step.
            moved += gates * (FP32 if self.item == FP32 else FP32 + 2 * self.item)
            flops = rows * decode_cost(self.layout, load.at_full_depth()) / later / tensor
            return DeviceWork(flops, moved, links=self._sums(rows), host=rows * (ROW_S + VLLM_ROW_S))
        counts, elements = CPU_KERNELS if self.device.on_cpu else KERNELS, float(dims.vocab * dims.hidden)
        kernels = float(counts["round"])
        for first, stop in itertools.pairwise((0, *spec.layout.outcomes)):
            share, layers, gated = load.reaching(stop) / later, stop - first, stop < dims.num_layers
            anybody = 1 - (1 - share) ** rows
            elements += anybody * (layers * linear_elements(dims) + (gates / len(spec.exit_depths) if gated else 0))
            # Keys and values for the rows that have exited.
            elements += (1 - share**rows) * layers * 2 * dims.kv_size * dims.hidden
            elements += rows * share * layers * cached * (1 if self.device.on_cpu else GATHERED)
            kernels += anybody * (layers * counts["layer"] + gated * counts["exit"])
        flops = rows * decode_cost(self.layout, load) / later
        return DeviceWork(flops, self.item * elements, kernels, host=rows * ROW_S)

    def _sums(self, positions: float) -> float:
        """Seconds of vLLM's all-reduces of so many positions' streams, as published: the likely end."""
        dims, tensor = self.layout.dims, self.cfg.rollout.tensor
        each = all_reduce(positions * dims.hidden * self.item, self.device, tensor)
        return (2 * dims.num_layers + 1) * each * self.device.likely.links

    def _sync(self) -> DeviceWork:
        """A version of the policy's tensors for all actors, which load it at a time: vLLM reads what is adapted."""
        sent = sync_bytes(self.layout, self.item, self.cfg.rollout.sync_dtype)
        work = DeviceWork(links=sent / self.device.network, host=sent / PACKED_BYTES_PER_S)
        if self.cfg.rollout.backend == "vllm" and not self.layout.spec.full:
            dims, spec = self.layout.dims, self.layout.spec
            adapted = [math.prod(dims.linear_shapes()[name]) for name in (spec.targets if spec.rank else ())]
            work.host += self.item * dims.num_layers * sum(adapted) / READ_BYTES_PER_S
        return work

    def _learn(self, phase: str) -> DeviceWork:
        work, layout = DeviceWork(), self.layout
        for times, packed, how in passes(self.cfg, self.load)[phase]:
            work = work.plus(self._pass(packed, how), times * (1 + idle_share(layout.pipeline, packed.micro_batches)))
        if phase == "update":
            # All-reduce of the gradients; AdamW reads and writes parameter, gradient and both moments.
            count = updates(self.cfg)[0]
            largest = max(rank_parameters(layout, p).trained(layout.spec.full) for p in range(layout.pipeline))
            work.links += count * 2 * (layout.data - 1) / layout.data * FP32 * largest / self._link(layout.ranks)
            work.moved += count * 7 * FP32 * largest / (layout.data if self.cfg.deepspeed.zero_stage else 1)
        return work

    def _pass(self, packed: Packing, how: PassMode) -> DeviceWork:
        """The slowest stage. Tensor parallelism sums two streams per layer forward and two backward."""
        layout, again = self.layout, how.train and how.recompute
        layers = packed.micro_batches * layout.dims.num_layers / layout.pipeline
        sums = 2 * (1 + how.train + again) * 2 * (layout.tensor - 1) / layout.tensor
        stream = packed.width * layout.dims.hidden * self.item
        name = ("update, recomputed" if again else "update") if how.train else "score" if how.policy else "reference"
        return DeviceWork(
            flops=max(pass_cost(layout, packed.load, packed.sequences, how)),
            kernels=layers * LEARNER_KERNELS[name],
            links=layers * sums * stream / self._link(layout.tensor),
        )

    def _link(self, peers: int) -> float:
        """Bytes/s between that many ranks in a row; without cluster.gpus_per_node all of them are on one node."""
        node = self.cfg.job.gpus_per_node
        return self.device.network if node and peers > node else self.device.link


def idle_share(pipeline: int, micro_batches: int) -> float:
    """Seconds that a stage waits while the pipeline fills and drains, for each second that it works: the learner runs
    all micro-batches of a pass, with the reference beside them, in one call of the schedule."""
    return (pipeline - 1) / micro_batches


def all_reduce(size: float, device: Device, tensor: int) -> float:
    """Seconds for `size` bytes of each of `tensor` devices of one node."""
    return REDUCE_S + 2 * (tensor - 1) / tensor * size / device.link / REDUCE_SHARE if tensor > 1 else 0.0
