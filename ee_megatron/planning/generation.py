"""Seconds of a token round, in which every answer that an actor has in flight gets a token, by `rollout.backend`.

Rooflines: what memory, arithmetic, links and the host that starts the work take, each by itself. Both engines are
counted as they are, not as they could be; where a constant was measured or published elsewhere it says so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ..config.schema import RunConfig
from ..rollout.engine.scheduler import HOLD
from .actors import gate_elements, linear_shards, vocabulary_rows
from .devices import Device
from .flops import decode_cost, gate
from .layout import Layout
from .workload import Workload

# ---- the embedded engine ----

# Kernels that PyTorch starts in a token round, bfloat16: per layer, per exit, and for readout and sampling. Counted on
# the pretend GPU (tests/device), which holds them here.
KERNELS = {"layer": 62, "exit": 28, "round": 37}
# How often host or device waits for the other, copies to the device included: per segment between exits and for the
# rest of a round (counted there too).
WAITS = {"segment": 3, "round": 5}
# The same of a CPU, whose kernels do most of a segment in one call; vLLM starts them layer by layer there.
CPU_KERNELS, VLLM_CPU_KERNELS = {"layer": 1, "exit": 12, "round": 20}, 8
# How often attention moves a row's cache: on a GPU it is gathered out of its pages, which reads and writes it, and then
# read; a CPU reads the pages in place.
GATHERED = 3

# ---- vLLM ----

# All-reduces of vLLM's own kernel between H100s on NVLink: 10 us for a few bytes, 45 us for 1 MiB on 8 of them, 40 us
# on 4, 27 us on 2 (sgl-project/sglang#2904). That is a ring over this share of the link. Larger ones are NCCL's, which
# starts later and reaches about half of it.
REDUCE_S, REDUCE_SHARE = 10e-6, 0.115
NCCL_S, NCCL_SHARE = 40e-6, 0.5
# Between two steps the device waits: 5 to 6 ms for 256 rows where vLLM schedules in step with it
# (vllm-project/vllm#11133), as it does here. What this package does for each row in between comes to it (Device.row).
VLLM_ROW_S = 5.5e-3 / 256
# Replaying a step's CUDA graphs, in pieces between the attentions; sglang has seen 2 ms (sgl-project/sglang#5593).
GRAPHS_S = 2e-3


@dataclass(frozen=True)
class Round:
    """Seconds of a round, and of what it consists of: each part alone. Parts that run beside one another count in
    `seconds` by the slowest."""

    seconds: float
    parts: dict[str, float]

    @property
    def weighs_most(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])


MEMORY, ARITHMETIC, STARTING = "reading weights and cache", "arithmetic", "starting kernels"
WAITING, ROWS, REDUCING = "waits of host and device", "work of the host per row", "all-reduces"
GRAPHS = "replaying graphs"


def assumption(part: str, device: Device) -> str:
    """What a part's seconds rest on, in words."""
    return {
        MEMORY: f"{device.streaming:.0%} of {device.bandwidth / 1e12:.3g} TB/s are reached",
        ARITHMETIC: f"{device.efficiency:.0%} of the device's peak are reached",
        STARTING: f"{device.launch * 1e6:.3g} us per kernel, {KERNELS['layer']} of them in a layer",
        WAITING: f"{device.wait * 1e6:.3g} us each time, {WAITS['segment']} times a segment",
        ROWS: "row by row in Python, nothing of it beside the device's work",
        REDUCING: f"{REDUCE_S * 1e6:.3g} us each and {REDUCE_SHARE:.1%} of the link's {device.link / 1e9:.3g} GB/s",
        GRAPHS: f"vLLM replays CUDA graphs, {GRAPHS_S * 1e3:.3g} ms a step",
    }[part]


def token_round(cfg: RunConfig, layout: Layout, load: Workload, device: Device, item: int, rows: float) -> Round:
    """A round of an actor with so many rows, halfway through their answers on average."""
    device = device.of_cores(cfg.rollout.threads)
    if cfg.rollout.backend == "vllm":
        return vllm_round(layout, load, device, item, rows, cfg.rollout.tensor)
    return embedded_round(layout, load, device, item, rows)


def embedded_round(layout: Layout, load: Workload, device: Device, item: int, rows: float) -> Round:
    """Segment by segment: rows that have left run nothing more, but a segment's weights are read, and its kernels
    started, once for whoever is left, unless nobody is or its station waits for more (rollout/engine/stations.py)."""
    dims, kernels = layout.dims, CPU_KERNELS if device.packed else KERNELS
    linears = sum(a * b for a, b in dims.linear_shapes().values())
    gates = gate_elements(layout) / max(1, len(layout.spec.exit_depths))
    span, speed = load.prompt + load.answer / 2, device.bandwidth * device.streaming
    parts = dict.fromkeys((MEMORY, ARITHMETIC, STARTING), 0.0)
    seconds = 0.0

    def run(elements: float, cached: float, flops: float, started: float) -> None:
        nonlocal seconds
        times = {
            MEMORY: item * (elements + cached * (1 if device.packed else GATHERED)) / speed,
            ARITHMETIC: flops / device.flops(item),
            STARTING: started * device.launch,
        }
        # A GPU reads, multiplies and is given work at once; a core does one after the other.
        seconds += sum(times.values()) if device.packed else max(times.values())
        for part, took in times.items():
            parts[part] += took

    bounds = (0, *layout.spec.layout.outcomes)
    for first, stop in itertools.pairwise(bounds):
        share, layers = load.reaching(stop), stop - first
        here = rows * share
        times = min(1 - (1 - share) ** rows, here / max(1.0, HOLD * rows))
        asked = stop < dims.num_layers
        run(
            times * (layers * linears + asked * gates),
            here * span * layers * 2 * dims.kv_size,
            here * (
                layers * (2 * linears + 4 * dims.heads * dims.head_dim * span)
                + asked * gate(dims, layout.spec.gate_width, 1)
            ),
            times * (layers * kernels["layer"] + asked * kernels["exit"]),
        )  # fmt: skip
        # Keys and values that the others owe these layers.
        behind = layers * 2 * dims.kv_size * dims.hidden
        run((1 - share**rows) * behind, 0.0, rows * (1 - share) * 2 * behind, 0.0)
    head = dims.vocab * dims.hidden
    run(head, 0.0, rows * 2 * head, kernels["round"])
    beside = {
        WAITING: (len(layout.spec.layout.outcomes) * WAITS["segment"] + WAITS["round"]) * device.wait,
        ROWS: rows * device.row,
    }
    return Round(seconds + sum(beside.values()), parts | beside)


def vllm_round(layout: Layout, load: Workload, device: Device, item: int, rows: float, tensor: int) -> Round:
    """All rows run all layers whatever their exits; a device has its share of the work, and all of the gates', whose
    matrices are float32 and rounded in every step."""
    dims, cut = layout.dims, sum(linear_shards(layout.dims, tensor).values())
    span = load.prompt + load.answer / 2
    weights = dims.num_layers * cut + vocabulary_rows(dims, tensor) * dims.hidden
    cache = rows * span * dims.num_layers * 2 * dims.head_dim * max(1, dims.kv_heads // tensor)
    gates = gate_elements(layout) * (4 if item == 4 else 4 + 2 * item)
    work = rows * decode_cost(layout, load.at_full_depth()) / max(1, load.later)
    asking = rows * sum(gate(dims, layout.spec.gate_width, 1) for _ in layout.spec.exit_depths)
    parts = {
        MEMORY: (item * (weights + cache) + gates) / (device.bandwidth * device.streaming),
        ARITHMETIC: ((work - asking) / tensor + asking) / device.flops(item),
        REDUCING: (2 * dims.num_layers + 1) * all_reduce(rows * dims.hidden * item, device, tensor),
        ROWS: rows * (VLLM_ROW_S + device.row),
        GRAPHS: GRAPHS_S,
    }
    if device.packed:
        # A CPU runs eagerly, and its step is not waited for by another processor.
        parts[GRAPHS] = dims.num_layers * VLLM_CPU_KERNELS * device.launch
    return Round(sum(parts.values()) - min(parts[MEMORY], parts[ARITHMETIC]), parts)


def all_reduce(size: float, device: Device, tensor: int) -> float:
    """Seconds for `size` bytes of each of `tensor` devices."""
    if tensor == 1:
        return 0.0
    ring = 2 * (tensor - 1) / tensor * size / device.link
    return min(REDUCE_S + ring / REDUCE_SHARE, NCCL_S + ring / NCCL_SHARE)
