"""Bytes per learner rank and per rollout actor of the embedded engine, by kind.

Activations are what autograd keeps of one layer for the micro-batches in flight, tensor by tensor as model/ computes
them; the peak is taken with every token at full depth, since a batch may contain such answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..exits import gate_units
from ..families import padded_vocab
from ..parallel.readout_chunk import chunk_positions
from ..policy import may_travel_in, stays_float32
from ..rollout.engine.cache import PAGE, pages_for, pool_pages
from .flops import PassMode, carries_gradient
from .layout import JOINT, KEY_VALUE, ROW_PARALLEL, Layout, PipelineStage, joint, rank_parameters
from .packing import Packing
from .workload import Workload

FP32, INDEX = 4, 8
REDUCE_BUCKET = 500_000_000
"""Elements of the buffer that DeepSpeed reduces gradients in (its default)."""


@dataclass(frozen=True)
class Training:
    """What decides a learner rank's memory beside its layout. item: bytes of an element of the base (2 or 4); on_cpu:
    attention runs in fp32 there; divergence: the loss has an exact one, from the reference."""

    item: int
    recompute: bool
    zero_stage: int
    offload: bool
    on_cpu: bool
    divergence: bool = False


def learner_memory(layout: Layout, packed: Packing, t: Training, pipeline_rank: int) -> dict[str, float]:
    """Kind -> bytes on the device of one rank in an update. "optimizer (host)" is not on the device."""
    full, counted = layout.spec.full, rank_parameters(layout, pipeline_rank)
    # Adapters and gates are fp32 whatever the base is; DeepSpeed's engine needs each learning-rate group, so a rank
    # without gates or adapters brings one idle element.
    small = FP32 * (counted.adapters + counted.gates)
    trained = small + (t.item * (counted.base + counted.copy) if full else 0)
    count, share = counted.trained(full), layout.data if t.zero_stage else 1
    weights = float(t.item * (counted.base + counted.copy) + small)
    if t.zero_stage == 3:
        weights += trained / share - trained
    found = {"weights": weights, "gradients": float(trained)}
    moments = 2 * (trained if t.zero_stage == 0 else FP32 * count / share)
    master = 0 if t.zero_stage == 0 else FP32 * count / share
    found["optimizer (host)" if t.offload else "optimizer"] = moments + master
    if t.zero_stage:
        # After the backward pass: the averaged partition beside the local gradients.
        found["gradients"] += FP32 * count / share
        found["reduction bucket"] = reduction_bucket(counted.base + counted.copy if full else 0, small, t)
    found["activations"] = activations(layout, packed, t, pipeline_rank)
    if layout.pipeline > 1:
        # Outputs are kept until their gradient returns (deallocate_pipeline_outputs is off).
        whole = packed.width * layout.dims.hidden * t.item
        found["pipeline buffers"] = float(whole * (1 + in_flight(layout, pipeline_rank, packed.micro_batches)))
    if any(stage.head for stage in layout.stages(pipeline_rank)):
        found["logits chunk"] = logits_chunk(layout, packed, t)
        if t.divergence:
            # The reference runs ahead of the update by one micro-batch or, to fill a pipeline, one for each of its
            # ranks.
            hidden = packed.each * packed.load.answer * layout.dims.hidden
            found["reference states"] = layout.pipeline * hidden * t.item
    if full:
        found["reference"] = float(t.item * (counted.base + counted.copy))
    return found


def reduction_bucket(base: int, small: int, t: Training) -> float:
    """DeepSpeed stages gradients in a buffer of fixed size for each of their dtypes; a CPU maps only what is written of
    it. base: trained elements of the base; small: bytes of adapters and gates, fp32."""
    sizes = {FP32: small // FP32}
    sizes[t.item] = sizes.get(t.item, 0) + base
    used = {item: count for item, count in sizes.items() if count}
    return float(sum(item * (min(n, REDUCE_BUCKET) if t.on_cpu else REDUCE_BUCKET) for item, n in used.items()))


def in_flight(layout: Layout, pipeline_rank: int, batches: int) -> int:
    """Micro-batches whose forward pass is done and whose backward pass is not, at most (1F1B; with virtual stages
    counted in stages, megatron-core's interleaved schedule)."""
    behind = layout.pipeline - pipeline_rank
    if layout.virtual == 1:
        return min(behind, batches)
    warm_up = 2 * (behind - 1) + (layout.virtual - 1) * layout.pipeline + 1
    return min(warm_up, batches * layout.virtual)


def activations(layout: Layout, packed: Packing, t: Training, pipeline_rank: int) -> float:
    """Peak of what autograd keeps on a rank: at the end of a micro-batch's forward pass or, under recomputation, while
    a layer is run again."""
    stages, flying = layout.stages(pipeline_rank), in_flight(layout, pipeline_rank, packed.micro_batches)
    kept = [stage_activations(layout, packed, t, stage) for stage in stages]
    final = final_activations(layout, packed, t) if any(stage.head for stage in stages) else 0.0
    others = (flying - 1) * sum(kept) / len(stages)
    peak = others + kept[-1] + final
    if t.recompute:
        # The layer's own input is kept already, and those of the layers behind it are gone.
        entered = layer_input(layout, packed, t)
        again = [
            (at + (t.item != FP32)) * entered + layer_activations(layout, packed, t, layer)
            for stage in stages
            for at, layer in enumerate(stage.layers)
        ]
        peak = max(peak, others + max(again))
    return peak


def layer_input(layout: Layout, packed: Packing, t: Training) -> float:
    share = layout.tensor if layout.sequence_parallel else 1
    return packed.width * layout.dims.hidden * t.item / share


def stage_activations(layout: Layout, packed: Packing, t: Training, stage: PipelineStage) -> float:
    if t.recompute:
        return len(stage.layers) * layer_input(layout, packed, t)
    return sum(layer_activations(layout, packed, t, layer) for layer in stage.layers)


def final_activations(layout: Layout, packed: Packing, t: Training) -> float:
    """The final norm's input (and what follows it, where it is trained), and the gradients that the loss has made
    already: of the counted positions' hidden states and, where it is trained, of the head."""
    dims, full = layout.dims, layout.spec.full
    share = layout.tensor if layout.sequence_parallel else 1
    normed = packed.width * dims.hidden / share * (FP32 + (t.item if full else 0))
    counted = packed.each * packed.load.answer
    head = padded_vocab(dims.vocab, layout.tensor) // layout.tensor * dims.hidden * t.item if full else 0
    return normed + counted * dims.hidden * t.item * (1 + t.divergence) + head


def layer_activations(layout: Layout, packed: Packing, t: Training, layer: int) -> float:
    """Bytes that autograd keeps of one layer and one micro-batch, every token at full depth; parameters left out."""
    dims, e, full = layout.dims, t.item, layout.spec.full
    every, active = packed.width, packed.filled
    here = layout.tensor if layout.sequence_parallel else 1
    inner = dims.intermediate // layout.tensor
    entering = carries_gradient(layout, layer, PassMode(True, input_gradient=t.recompute or t.zero_stage == 3))
    # Norms keep their input in fp32 (in fp32 that is the residual stream itself) and, where the gain is trained, what
    # it multiplies.
    kept = ((every if entering else 0) + active) / here * dims.hidden * FP32
    if full:
        kept += (every + active) / here * dims.hidden * e
    if here > 1:
        # Sequence parallelism: what is put at its place before a gather and before the two reduce-scatters.
        kept += (active / here + 2 * active) * dims.hidden * e
    kept += linear_inputs(layout, t, active) + adapter_activations(layout, t, active)
    kept += attention_activations(layout, packed, t)
    # SwiGLU: gate and up, silu(gate).
    kept += active * 3 * inner * e
    if layer - 1 in layout.spec.exit_depths:
        asked = packed.each * packed.load.later / here
        # The stream in fp32, what the gate's first product reads, and its result after the ReLU.
        kept += asked * (dims.hidden * (FP32 + e) + FP32 * gate_units(layout.spec.gate_width, dims.hidden))
    return kept


def linear_inputs(layout: Layout, t: Training, active: float) -> float:
    """What linears read: kept for their adapters' sake, or for their own gradient. Frozen ones keep nothing; queries,
    keys and values are made of the same."""
    found = {parts: joint(layout, parts) for parts in JOINT}
    kept = {parts: columns for parts, (_, columns, rank) in found.items() if layout.spec.full or rank}
    if JOINT[0] in kept:
        kept.pop(KEY_VALUE, None)
    return t.item * active * sum(kept.values())


def attention_activations(layout: Layout, packed: Packing, t: Training) -> float:
    """Rotated queries and keys, values, output, one sum per query; with norms on heads their inputs too. On a CPU the
    kernel runs in fp32. Values are a view of the joint product, which stays with them, unless keys and values of a
    prompt are handed to all of its sequences."""
    dims, e, active, load = layout.dims, t.item, packed.filled, packed.load
    q, kv, heads = (size // layout.tensor for size in (dims.q_size, dims.kv_size, dims.heads))
    kernel = FP32 if t.on_cpu else e
    kept = active * (2 * q * kernel + heads * FP32)
    if load.shared or kernel != e:
        kept += packed.each * (load.prompt + load.answer - 1) * 2 * kv * kernel
    else:
        kept += active * (kv + q + 2 * kv) * e
    if dims.qk_norm:
        # Queries of a single group are a view of the joint product; of several they are put side by side.
        copied = q if e != FP32 or dims.kv_heads > layout.tensor else 0
        kept += active * (copied + heads + (kv if e != FP32 else 0)) * FP32
        if layout.spec.full:
            kept += active * (q + kv) * e
    return kept


def adapter_activations(layout: Layout, t: Training, active: float) -> float:
    """The narrow products, and the factors as joined for one product each."""
    kept = 0.0
    for parts in JOINT:
        rows, columns, rank = joint(layout, parts)
        # A row-parallel linear's second factor is one adapter's own: a parameter, or its narrower copy.
        joined = columns + (rows if parts[0] not in ROW_PARALLEL or t.item != FP32 else 0)
        kept += rank * (active + joined) * t.item
    return kept


def logits_chunk(layout: Layout, packed: Packing, t: Training) -> float:
    """Scoring: a chunk's logits in fp32, and p log p beside them; a divergence has two distributions and what its
    slope is made of; a CPU multiplies with a copy of the head, of fp32 where the processor has no products of bfloat16
    with fp32 sums."""
    trained = layout.spec.full
    rows = padded_vocab(layout.dims.vocab, layout.tensor) // layout.tensor
    chunk = min(chunk_positions(rows, on_cpu=t.on_cpu, trained=trained), packed.each * packed.load.answer)
    slope = FP32 * rows * layout.dims.hidden if trained else 0
    copied = FP32 * rows * layout.dims.hidden if t.on_cpu and t.item != FP32 else 0
    return (7 if t.divergence else 2) * chunk * rows * FP32 + copied + slope


def actor_memory(
    layout: Layout, load: Workload, item: int, rows: int, packed: bool, most: int | None = None
) -> dict[str, float]:
    """Kind -> bytes of one rollout actor with the embedded engine, a whole replica (rollout/engine/weights.py): the
    base, the matrices that adapters change once more, stacked key/value weights of the layers behind each exit, gates;
    on a CPU packed forms of what is multiplied with. The cache is at its fullest when every row is about to end: pages
    for all but the last token, and the pool's spare ones; `most`: pages that it may have."""
    dims, spec = layout.dims, layout.spec
    linears = {name: shape[0] * shape[1] for name, shape in dims.linear_shapes().items()}
    base = sum(math.prod(shape) for shape in dims.tensor_shapes().values())
    changed = [sum(linears[p] for p in parts) for parts in JOINT if joint(layout, parts)[2]]
    behind = sum(dims.num_layers - depth for depth in spec.exit_depths[:1])
    stacked = behind * 2 * dims.kv_size * dims.hidden
    gates = sum(
        (FP32 if packed or stays_float32(name) else item) * math.prod(shape)
        for name, shape in spec.gate_shapes(dims).items()
    )
    found = {
        "weights": float(item * base),
        "adapted matrices": float(item * dims.num_layers * sum(changed)),
        "stacked key/value weights": float(item * stacked),
        "gates": float(gates),
    }
    if packed:
        # The packed form takes the place of an adapted or stacked matrix; the head's is fp32 where the processor has no
        # products of bfloat16 with fp32 sums (rollout/engine/linear.py).
        multiplied = dims.num_layers * (sum(linears.values()) - sum(changed))
        found["packed copies"] = float(item * multiplied + FP32 * dims.vocab * dims.hidden)
    pages = min(pool_pages(rows * pages_for(load.prompt + load.answer - 1)), math.inf if most is None else most)
    found["KV cache"] = float(2 * item * dims.num_layers * dims.kv_size * pages * PAGE)
    # One prefill reads up to 8192 positions: their keys and values, and what a layer makes of them.
    read = min(8192, rows * load.prompt)
    found["prompts being read"] = float(read * item * (2 * dims.num_layers * dims.kv_size + 3 * dims.intermediate))
    # Sampling: logits, their exponentials and the running sum.
    found["logits"] = float(rows * dims.vocab * 3 * FP32)
    return found


def sync_bytes(layout: Layout, item: int, sync_dtype: str) -> int:
    """One version of the policy's tensors as it travels to actors with elements of `item` bytes; sync_dtype: that of
    `rollout`."""
    wanted, decoder = getattr(torch, sync_dtype), torch.float32 if item == FP32 else torch.bfloat16
    return sum(
        (wanted.itemsize if may_travel_in(wanted, name, decoder) else FP32) * math.prod(shape)
        for name, shape in layout.spec.tensor_shapes(layout.dims).items()
    )
