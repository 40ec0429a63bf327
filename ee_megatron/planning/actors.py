"""What a rollout actor takes of its devices, and how many answers it has in flight, by `rollout.backend`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.derive import position_bytes, vllm_vocabulary
from ..config.schema import RunConfig
from ..families import ModelDims
from ..rollout.engine.cache import PAGE, pages_for, pages_in
from ..rollout.vllm.memory import CHUNK, CPU_CACHE_GIB, GPU_SHARE
from .devices import GIB, Device
from .layout import KEY_VALUE, ROW_PARALLEL, Layout
from .memory import FP32, actor_memory
from .workload import Workload


@dataclass(frozen=True)
class Actor:
    """On each of its `devices` it takes `kinds`, bytes by kind. `rows` answers are in flight at a time, of `wanted`
    that it is given and may have.

    - positions: that its cache holds; None: as many as its rows take
    - sequence: positions that the longest sequence takes, in pages
    - reader: bytes of the whole replica that a vllm actor makes on its first device once finished answers are to be
      read again; 0: it can do so itself
    - beside_reader: bytes that the cache may have for it to find room; 0: it never does
    """

    backend: str
    devices: int
    kinds: dict[str, float]
    rows: int
    wanted: int
    positions: int | None
    sequence: int
    reader: float = 0.0
    beside_reader: float = 0.0

    @property
    def holds_a_sequence(self) -> bool:
        return self.positions is None or self.positions >= self.sequence


def wanted_rows(cfg: RunConfig) -> int:
    """Answers that an actor would have in flight: as many as it may, no more than it is given."""
    answers = -(-cfg.rl.prompts_per_step // cfg.rollout.actors) * cfg.rl.group_size
    return min(cfg.rollout.max_num_seqs, answers)


def make_actor(cfg: RunConfig, layout: Layout, load: Workload, longest: Workload, item: int, device: Device) -> Actor:
    """load, longest: of an average answer, and of the longest, at full depth; item: bytes per element of the base."""
    if cfg.rollout.backend == "vllm":
        return vllm_actor(cfg, layout, load, longest, item, device)
    wanted, dims = wanted_rows(cfg), layout.dims
    # A row begins when what it may come to need is free (rollout/engine/waiting.py).
    pages, most = pages_for(longest.prompt + longest.answer), None
    rows = wanted
    if cfg.rollout.cache_gib:
        most = pages_in(cfg.rollout.cache_gib, dims, item)
        rows = min(wanted, most // pages)
    kinds = actor_memory(layout, longest, item, max(1, rows), device.packed, most)
    positions = None if most is None else most * PAGE
    return Actor(cfg.rollout.backend, 1, kinds, rows, wanted, positions, pages * PAGE)


def vllm_actor(cfg: RunConfig, layout: Layout, load: Workload, longest: Workload, item: int, device: Device) -> Actor:
    """An engine of vLLM's on `rollout.tensor` devices: of each GPU it takes GPU_SHARE, and what weights and a step
    leave of that is the cache."""
    rollout, dims, tensor = cfg.rollout, layout.dims, cfg.rollout.tensor
    kinds = {
        "weights": float(item * shard_elements(dims, tensor)),
        "gates": float(FP32 * gate_elements(layout)),
        "activations of a step": step_bytes(layout, item, tensor),
        "logits": float(rollout.max_num_seqs * dims.vocab * 3 * FP32),
    }
    if device.packed:
        kinds["packed copies"] = float(item * sum(linear_shards(dims, tensor).values()) * dims.num_layers)
    page, others = PAGE * position_bytes(dims, item, tensor), sum(kinds.values())
    if rollout.cache_gib:
        cache = rollout.cache_gib * GIB
    elif device.packed:
        cache = CPU_CACHE_GIB * GIB
    else:
        cache = max(0.0, GPU_SHARE * device.memory - device.reserved - others)
    kinds["KV cache"] = float(cache)
    # vLLM keeps one empty.
    pages = max(0, int(cache / page) - 1)
    sequence = pages_for(longest.prompt + longest.answer)
    replica = actor_memory(layout, longest, item, 1, device.packed)
    reader = sum(replica.values()) - replica["KV cache"]
    beside = device.memory - device.reserved - others - reader
    return Actor(
        "vllm", tensor, kinds,
        rows=min(wanted_rows(cfg), pages // pages_for(load.prompt + load.answer)),
        wanted=wanted_rows(cfg),
        positions=pages * PAGE,
        sequence=sequence * PAGE,
        reader=reader,
        beside_reader=beside if beside >= (sequence + 1) * page else 0.0,
    )  # fmt: skip


def linear_shards(dims: ModelDims, tensor: int) -> dict[str, int]:
    """Elements of a layer's linears on each of `tensor` devices of a vLLM, by name. Where there are more devices than
    key-value heads each has a whole head."""
    return {
        name: rows * columns * max(1, dims.kv_heads // tensor) // dims.kv_heads
        if name in KEY_VALUE else rows * columns // tensor
        for name, (rows, columns) in dims.linear_shapes().items()
    }  # fmt: skip


def vocabulary_rows(dims: ModelDims, tensor: int) -> int:
    """Rows of the embedding, and of the readout, on each device."""
    return vllm_vocabulary(dims) // tensor


def shard_elements(dims: ModelDims, tensor: int) -> int:
    """Elements of the base on each of `tensor` devices of a vLLM."""
    linears, block = linear_shards(dims, tensor), 0
    for name, shape in dims.block_shapes().items():
        linear, size = name.rpartition(".")[0], math.prod(shape)
        if name.endswith(".weight") and linear in linears:
            block += linears[linear]
        elif linear in linears and linear not in ROW_PARALLEL:
            # A bias is cut as its matrix is.
            block += size * linears[linear] // math.prod(dims.linear_shapes()[linear])
        else:
            block += size
    vocabulary = vocabulary_rows(dims, tensor) * dims.hidden * (1 if dims.tied else 2)
    return dims.num_layers * block + vocabulary + dims.hidden


def gate_elements(layout: Layout) -> int:
    """Every device of a vLLM has all gates, in float32."""
    return sum(math.prod(shape) for shape in layout.spec.gate_shapes(layout.dims).values())


def step_bytes(layout: Layout, item: int, tensor: int) -> float:
    """What a step of as many positions as vLLM reads at a time has beside weights, at most: the stream, its residual,
    the streams of positions that have left, a copy of each, and what a layer makes of them; and a gate's first matrix,
    rounded to the stream's dtype."""
    dims = layout.dims
    q, kv = dims.q_size // tensor, dims.kv_size * max(1, dims.kv_heads // tensor) // dims.kv_heads
    widest = max(3 * dims.intermediate // tensor, 2 * q + 2 * kv)
    gates = [item * math.prod(s) for name, s in layout.spec.gate_shapes(dims).items() if name.endswith("fc1.weight")]
    return float(CHUNK * item * (6 * dims.hidden + widest) + max(gates, default=0))
