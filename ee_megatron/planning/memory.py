"""Bytes per learner rank and per rollout actor, by kind.

Activations are what autograd saves of one layer for the micro-batches in flight, tensor by tensor as model/ computes
them, with every token at full depth: a batch may contain such answers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from ..config.derive import position_bytes
from ..config.schema import RunConfig
from ..exits import gate_units
from ..mixed_matmul import chunk_positions
from ..policy import may_travel_in, stays_float32
from ..rollout.engine.cache import PAGE, pages_for, pages_in, pool_pages
from ..rollout.vllm import CHUNK, CPU_CACHE_GIB, GPU_SHARE
from .devices import GIB, Device
from .flops import PassMode, carries_gradient, linear_elements
from .layout import JOINT, KEY_VALUE, ROW_PARALLEL, Layout, rank_parameters
from .workload import Packing, Workload

FP32 = 4
REDUCE_BUCKET = 500_000_000
"""Elements of the buffer that DeepSpeed reduces gradients in (its default)."""
PREFILL = 8192
"""Positions that the embedded engine prefills at once, at most."""


@dataclass(frozen=True)
class Training:
    """Settings that decide a learner rank's memory beside its layout. item: bytes of an element of the base (2 or 4);
    on_cpu: attention runs in fp32; divergence: the loss has an exact one from the reference."""

    item: int
    recompute: bool
    zero_stage: int
    on_cpu: bool
    divergence: bool = False


def learner_memory(layout: Layout, packed: Packing, t: Training, pipeline_rank: int) -> dict[str, float]:
    """Kind -> bytes of one rank in an update."""
    hidden, full, counted = layout.dims.hidden, layout.spec.full, rank_parameters(layout, pipeline_rank)
    base = counted.base + counted.copy
    # Adapters and gates are fp32 whatever the base is.
    small = FP32 * (counted.adapters + counted.gates)
    trained, share = small + t.item * base * full, layout.data if t.zero_stage else 1
    part = FP32 * counted.trained(full) / share
    kinds = {
        "weights": t.item * base + small - (trained - trained / share if t.zero_stage == 3 else 0.0),
        # After the backward pass: the averaged partition beside the local gradients.
        "gradients": trained + (part if t.zero_stage else 0.0),
        # AdamW's two moments and fp32 masters.
        "optimizer": 3 * part if t.zero_stage else 2.0 * trained,
    }
    if t.zero_stage:
        # A buffer for each dtype of gradients; a CPU maps only what is written of it.
        sizes = {FP32: small // FP32}
        sizes[t.item] = sizes.get(t.item, 0) + base * full
        buffers = {item: min(n, REDUCE_BUCKET) if t.on_cpu else REDUCE_BUCKET for item, n in sizes.items() if n}
        kinds["reduction bucket"] = float(sum(item * n for item, n in buffers.items()))
    kinds["activations"] = activations(layout, packed, t, pipeline_rank)
    if layout.pipeline > 1:
        # Outputs stay until their gradient returns (deallocate_pipeline_outputs is off). The reference's streams travel
        # with the policy's.
        flying = in_flight(layout, pipeline_rank, packed.micro_batches)
        kinds["pipeline buffers"] = float((1 + t.divergence) * packed.width * hidden * t.item * (1 + flying))
    if layout.has_head(pipeline_rank):
        # A chunk's logits in fp32 and p log p; a divergence has two distributions and the terms of its gradient; the
        # head's gradient if it is trained, and a CPU's copy of a bfloat16 head, both fp32.
        rows, answers = layout.vocabulary_rows, packed.each * packed.load.answer
        chunk = min(chunk_positions(rows, on_cpu=t.on_cpu, trained=full), answers)
        copies = (full + (t.on_cpu and t.item != FP32)) * hidden
        kinds["logits chunk"] = FP32 * rows * ((7 if t.divergence else 2) * chunk + copies)
        if t.divergence:
            kinds["reference states"] = answers * hidden * t.item
    if full:
        kinds["reference"] = float(t.item * base)
    return kinds


def in_flight(layout: Layout, pipeline_rank: int, batches: int) -> int:
    """Micro-batches whose forward pass is done and whose backward pass is not, at most (1F1B)."""
    return min(layout.pipeline - pipeline_rank, batches)


def activations(layout: Layout, packed: Packing, t: Training, pipeline_rank: int) -> float:
    """Peak bytes that autograd saves on a rank: at the end of a micro-batch's forward pass or, under recomputation,
    while a layer is run again."""
    hidden, full, here = layout.dims.hidden, layout.spec.full, layout.sequence_ranks
    stages, flying = layout.stages(pipeline_rank), in_flight(layout, pipeline_rank, packed.micro_batches)
    entered = packed.width * hidden * t.item / here
    each = {layer: layer_activations(layout, packed, t, layer) for layer in itertools.chain(*stages)}
    sizes = [sum(entered if t.recompute else each[layer] for layer in stage) for stage in stages]
    others = (flying - 1) * sum(sizes) / len(stages)
    peak = others + sizes[-1]
    if layout.has_head(pipeline_rank):
        # The final norm's input (and what follows it, where it is trained), and the gradients that the loss has made
        # already: of the counted positions' hidden states and, where it is trained, of the head.
        peak += packed.width * hidden / here * (FP32 + t.item * full) + layout.vocabulary_rows * hidden * t.item * full
        peak += packed.each * packed.load.answer * hidden * t.item * (1 + t.divergence)
    if t.recompute:
        # The layer's own input is counted already; those of the layers after it have been freed.
        again = [(i + (t.item != FP32)) * entered + each[layer] for stage in stages for i, layer in enumerate(stage)]
        peak = max(peak, others + max(again))
    return peak


def layer_activations(layout: Layout, packed: Packing, t: Training, layer: int) -> float:
    """Bytes that autograd saves for one layer and one micro-batch, every token at full depth, without parameters."""
    dims, e, full, load = layout.dims, t.item, layout.spec.full, packed.load
    every, active, here = packed.width, packed.filled, layout.sequence_ranks
    entering = carries_gradient(layout, layer, PassMode(True, input_gradient=t.recompute or t.zero_stage == 3))
    # Norms save their input in fp32 and, if the gain is trained, what it multiplies; behind attention only active ones.
    entered = active if dims.norm_after else every * entering
    total = ((entered + active) * FP32 + (every + active) * e * full) / here * dims.hidden
    if here > 1:
        # Sequence parallelism: copies made before a gather and before the two reduce-scatters.
        total += (active / here + 2 * active) * dims.hidden * e
    for parts in JOINT:
        rows, columns, rank = layout.joint(parts)
        # Linears save their input for their adapters' or their own gradient; keys and values share that of queries.
        if (full or rank) and not (parts == KEY_VALUE and (full or layout.joint(JOINT[0])[2])):
            total += active * columns * e
        # An adapter's narrow product and its factors as joined for one product each; a row-parallel linear's second
        # factor is one adapter's own: a parameter, or its narrower copy.
        total += rank * (active + columns + rows * (parts[0] not in ROW_PARALLEL or e != FP32)) * e
    # Attention: rotated queries and the output, one sum per query, keys and values; on a CPU its kernel runs in fp32.
    q, kv, heads = (size // layout.tensor for size in (dims.q_size, dims.kv_size, dims.heads))
    kernel = FP32 if t.on_cpu else e
    total += active * (2 * q * kernel + heads * FP32)
    if load.shared or kernel != e:
        total += packed.each * (load.prompt + load.answer - 1) * 2 * kv * kernel
    else:
        # Values are a view of the joint product, which stays with them.
        total += active * (kv + q + 2 * kv) * e
    if dims.qk_norm:
        # The norms' inputs. Queries of a single group are a view of the joint product; of several they are copied.
        copied = q if e != FP32 or dims.kv_heads > layout.tensor else 0
        total += active * ((copied + heads + kv * (e != FP32)) * FP32 + (q + kv) * e * full)
    # SwiGLU: gate and up, silu(gate).
    total += active * 3 * (dims.intermediate // layout.tensor) * e
    if layer - 1 in layout.spec.exit_depths:
        # The stream in fp32, what the gate's first product reads, and its result after the ReLU.
        units = gate_units(layout.spec.gate_width, dims.hidden)
        total += packed.each * load.later / here * (dims.hidden * (FP32 + e) + FP32 * units)
    return total


@dataclass(frozen=True)
class ActorMemory:
    """A rollout actor: `kinds`, bytes by kind on each of its `devices`; `rows` concurrent answers, of `wanted` that it
    is given and may have; positions: capacity of its cache (None: what its rows take); sequence: positions that the
    longest sequence takes, in pages."""

    devices: int
    kinds: dict[str, float]
    rows: int
    wanted: int
    positions: int | None
    sequence: int


def make_actor(
    cfg: RunConfig, layout: Layout, load: Workload, longest: Workload, item: int, device: Device
) -> ActorMemory:
    """load, longest: of an average answer, and of the longest, at full depth; item: bytes per element of the base."""
    rollout, dims, sequence = cfg.rollout, layout.dims, pages_for(longest.prompt + int(longest.answer))
    wanted = min(rollout.max_num_seqs, -(-cfg.rl.prompts_per_step // rollout.actors) * cfg.rl.group_size)
    if rollout.backend != "vllm":
        # A row starts when the pages that it may need are free.
        most = pages_in(rollout.cache_gib, dims, item) if rollout.cache_gib else None
        rows = wanted if most is None else min(wanted, most // sequence)
        kinds = actor_memory(layout, longest, item, max(1, rows), device.on_cpu, most)
        return ActorMemory(1, kinds, rows, wanted, None if most is None else most * PAGE, sequence * PAGE)
    kinds, page = vllm_memory(cfg, layout, item, device), PAGE * position_bytes(dims, item, rollout.tensor)
    left = GPU_SHARE * device.memory - device.reserved - sum(kinds.values())
    kinds["KV cache"] = rollout.cache_gib * GIB or (float(CPU_CACHE_GIB * GIB) if device.on_cpu else max(0.0, left))
    # vLLM keeps one page empty.
    pages = max(0, int(kinds["KV cache"] / page) - 1)
    rows = min(wanted, pages // pages_for(load.prompt + int(load.answer)))
    return ActorMemory(rollout.tensor, kinds, rows, wanted, pages * PAGE, sequence * PAGE)


def actor_memory(
    layout: Layout, load: Workload, item: int, rows: int, on_cpu: bool, most: int | None = None
) -> dict[str, float]:
    """Kind -> bytes of one rollout actor with the embedded engine, a whole replica. The cache is at its fullest when
    every row is about to end: pages for all but the last token, and the pool's spare ones; `most`: pages at most."""
    dims, spec, gates = layout.dims, layout.spec, layout.spec.gate_shapes(layout.dims).items()
    # Matrices exist once more with adapters merged: all of a product of which one has an adapter.
    adapted = [part for parts in JOINT if layout.joint(parts)[2] for part in parts]
    changed = dims.num_layers * sum(math.prod(dims.linear_shapes()[part]) for part in adapted)
    behind = sum(dims.num_layers - depth for depth in spec.exit_depths[:1])
    kinds = {
        "weights": float(item * sum(map(math.prod, dims.tensor_shapes().values()))),
        "adapted matrices": float(item * changed),
        "stacked key/value weights": float(item * behind * 2 * dims.kv_size * dims.hidden),
        "gates": float(sum((FP32 if on_cpu or stays_float32(n) else item) * math.prod(s) for n, s in gates)),
    }
    if on_cpu:
        # The packed form takes the place of an adapted or stacked matrix; the head's is fp32 where the processor has no
        # products of bfloat16 with fp32 sums.
        multiplied = dims.num_layers * linear_elements(dims) - changed
        kinds["packed copies"] = float(item * multiplied + FP32 * dims.vocab * dims.hidden)
    pages = pool_pages(rows * pages_for(load.prompt + int(load.answer) - 1))
    kinds["KV cache"] = float(min(pages, pages if most is None else most) * PAGE * position_bytes(dims, item))
    # Keys and values of the prompts that are prefilled together, and a layer's intermediate tensors.
    read = min(PREFILL, rows * load.prompt)
    kinds["prompts being read"] = float(read * item * (2 * dims.num_layers * dims.kv_size + 3 * dims.intermediate))
    # Sampling: logits, their exponentials and the running sum.
    kinds["logits"] = float(rows * dims.vocab * 3 * FP32)
    return kinds


def vllm_memory(cfg: RunConfig, layout: Layout, item: int, device: Device) -> dict[str, float]:
    """Kind -> bytes on each of vLLM's `rollout.tensor` devices, without the cache. Gates are whole on each."""
    dims, tensor, gates = layout.dims, cfg.rollout.tensor, layout.spec.gate_shapes(layout.dims)
    # A step of CHUNK positions: the stream, its residual, the streams of positions that have exited, a copy of each, a
    # layer's intermediate tensors; and a gate's first matrix, rounded to the stream's dtype.
    widest = max(3 * dims.intermediate, 2 * dims.q_size + 2 * dims.kv_size) // tensor
    first = max((math.prod(shape) for name, shape in gates.items() if name.endswith("fc1.weight")), default=0)
    kinds = {
        "weights": item * vllm_elements(layout, tensor),
        "gates": float(FP32 * sum(map(math.prod, gates.values()))),
        "activations of a step": float(CHUNK * item * (6 * dims.hidden + widest) + item * first),
        "logits": float(cfg.rollout.max_num_seqs * dims.vocab * 3 * FP32),
    }
    if device.on_cpu:
        kinds["packed copies"] = item * linear_elements(dims) * dims.num_layers / tensor
    return kinds


def vllm_elements(layout: Layout, tensor: int) -> float:
    """Elements of the base on each of vLLM's devices: matrices are shared out, but every device has a key-value head
    where there are fewer heads than devices."""
    dims = layout.dims
    again = max(0, tensor - dims.kv_heads) * 2 * dims.head_dim * dims.hidden * dims.num_layers
    return (sum(map(math.prod, dims.tensor_shapes().values())) + again) / tensor


def sync_bytes(layout: Layout, item: int, sync_dtype: str) -> int:
    """One version of the policy's tensors as it travels to actors with elements of `item` bytes; sync_dtype: that of
    `rollout`."""
    wanted, decoder = getattr(torch, sync_dtype), torch.float32 if item == FP32 else torch.bfloat16
    return sum(
        (wanted.itemsize if may_travel_in(wanted, name, decoder) else FP32) * math.prod(shape)
        for name, shape in layout.spec.tensor_shapes(layout.dims).items()
    )
