"""FLOPs of scoring, learning and generating, by the products that the code runs.

A multiply-add counts 2. The learner's attention counts the keys that each query sees, sequence by sequence. Norms,
activations and softmax are not counted: they cost memory traffic, not products.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ..exits import gate_units
from ..families import ModelDims, padded_vocab
from .layout import JOINT, KEY_VALUE, Layout, joint
from .workload import Counted, Load, Workload


@dataclass(frozen=True)
class Product:
    """One linear of a layer on one tensor-parallel rank: base FLOPs, its adapters' way down and up."""

    base: float
    down: float
    up: float


def products(layout: Layout, every: float, active: float) -> dict[str, Product]:
    """A layer's products for `active` positions that run it, keys and values for all `every` positions."""

    def product(parts: tuple[str, ...]) -> Product:
        rows, columns, rank = joint(layout, parts)
        positions = every if parts == KEY_VALUE else active
        # Parts share one product down to all their ranks, and one up in which each ignores the others' ranks.
        return Product(2 * positions * rows * columns, 2 * positions * columns * rank, 2 * positions * rows * rank)

    return {name: product(parts) for name, parts in zip(("q", "kv", "out", "gate_up", "down"), JOINT, strict=True)}


def attention(layout: Layout, load: Load, sequences: float, layer: int, full: bool) -> float:
    """FLOPs of scores and weighted values, forward, of a layer's active positions on one tensor-parallel rank."""
    width = layout.dims.heads // layout.tensor * layout.dims.head_dim
    return 4 * width * sequences * load.seen(layer, full)


def gate(dims: ModelDims, width: float, positions: float) -> float:
    """FLOPs of one gate of width `width` · D on `positions` positions, forward."""
    return 2 * positions * gate_units(width, dims.hidden) * (dims.hidden + 1)


@dataclass(frozen=True)
class PassMode:
    """How a batch is run. train: with backward pass; recompute: layers run forward twice; policy: with adapters, gates
    and exits (False: the reference at full depth); input_gradient: the first layer's input asks for a gradient;
    likelihood: tokens' log-probabilities are read out; divergence: so is that from the reference over the whole
    vocabulary (another pass makes the reference's hidden states)."""

    train: bool
    policy: bool = True
    recompute: bool = False
    input_gradient: bool = False
    likelihood: bool = True
    divergence: bool = False


def layer_cost(layout: Layout, load: Load, layer: int, sequences: float, how: PassMode) -> float:
    """FLOPs of one layer on one rank."""
    active = load.active(layer, full=not how.policy)
    found = products(layout, sequences * load.written, sequences * active)
    linear = sum(p.base for p in found.values())
    adapters = sum(p.down + p.up for p in found.values()) if how.policy else 0.0
    attended = attention(layout, load, sequences, layer, not how.policy)
    gated = gate_cost(layout, load, layer, sequences) if how.policy else 0.0
    forward = linear + adapters + attended + gated
    if not how.train:
        return forward
    spec = layout.spec
    entering = carries_gradient(layout, layer, how)
    through = linear if entering else linear - found["q"].base - found["kv"].base
    own = linear if spec.full else 0.0
    trained = 2 * adapters - (0.0 if entering else found["q"].down + found["kv"].down)
    if not (entering or spec.full or spec.rank):
        # Gates alone, and none before this layer: nothing in it is differentiated.
        through = trained = attended = 0.0
    backward = through + own + trained + 2.5 * attended + 2 * gated
    return forward + backward + (forward if how.recompute else 0.0)


def carries_gradient(layout: Layout, layer: int, how: PassMode) -> bool:
    """Whether what enters the layer asks for a gradient: all but the first layer's input does where anything before it
    is trained."""
    if how.input_gradient or layout.spec.full:
        return True
    if layout.spec.rank:
        return layer > 1
    return layer > 1 + min(layout.spec.exit_depths, default=layout.dims.num_layers)


def gate_cost(layout: Layout, load: Load, layer: int, sequences: float) -> float:
    if layer - 1 not in layout.spec.exit_depths:
        return 0.0
    # Under sequence parallelism each tensor-parallel rank asks at its own positions; else all of them at all.
    share = layout.tensor if layout.sequence_parallel else 1
    return gate(layout.dims, layout.spec.gate_width, sequences * load.asked(layer - 1)) / share


def head_cost(layout: Layout, load: Load, sequences: float, how: PassMode) -> float:
    """FLOPs of the readout on one tensor-parallel rank; a divergence needs the teacher's distribution beside the
    policy's, and whatever is learnt goes back through the policy's once."""
    rows = padded_vocab(layout.dims.vocab, layout.tensor) // layout.tensor
    backward = (1 + layout.spec.full) if how.train else 0
    readouts = (1 + backward) * (how.likelihood or how.divergence) + how.divergence
    return 2 * sequences * load.answer * rows * layout.dims.hidden * readouts


def stage_cost(layout: Layout, load: Load, pipeline_rank: int, sequences: float, how: PassMode) -> float:
    """FLOPs of `sequences` sequences on one (tensor, pipeline) rank."""
    total = 0.0
    for stage in layout.stages(pipeline_rank):
        for layer in stage.layers:
            total += layer_cost(layout, load, layer, sequences, how)
        if stage.head:
            total += head_cost(layout, load, sequences, how)
    return total


def pass_cost(layout: Layout, load: Load, sequences: float, how: PassMode) -> list[float]:
    """FLOPs by pipeline rank of a data rank's even share of the sequences, on one tensor-parallel rank."""
    return [stage_cost(layout, load, p, sequences / layout.data, how) for p in range(layout.pipeline)]


def wide_cost(layout: Layout, load: Load, pipeline_rank: int, sequences: float, how: PassMode) -> float:
    """Of `stage_cost` what a CPU multiplies in float32 whatever the model's dtype: attention, gates, logits."""
    total = 0.0
    for stage in layout.stages(pipeline_rank):
        for layer in stage.layers:
            total += attention(layout, load, sequences, layer, not how.policy) * (3.5 if how.train else 1)
            total += gate_cost(layout, load, layer, sequences) * how.policy * (3 if how.train else 1)
        if stage.head:
            total += head_cost(layout, load, sequences, replace(how, train=False))
    return total


def whole_pass(layout: Layout, load: Load, sequences: float, how: PassMode) -> float:
    """FLOPs of all ranks."""
    return layout.tensor * layout.data * sum(pass_cost(layout, load, sequences, how))


def prefill_cost(dims: ModelDims, prompt: int) -> float:
    """Reading one prompt at full depth by the decoder, whose adapters are merged; logits of its last position only."""
    linears = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    attended = 4 * dims.heads * dims.head_dim * prompt * prompt
    return dims.num_layers * (2 * prompt * linears + attended) + 2 * dims.vocab * dims.hidden


def merged_layers_cost(dims: ModelDims, load: Load, full: bool = False) -> float:
    """Every layer at the positions that run it, with adapters merged, and keys and values of the others; full: without
    exits."""
    linears = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    total = 0.0
    for layer in range(1, dims.num_layers + 1):
        run = load.active(layer, full)
        total += 2 * linears * run + 4 * dims.heads * dims.head_dim * load.seen(layer, full)
        total += 4 * dims.kv_size * dims.hidden * (load.written - run)
    return total


def exits_read_cost(layout: Layout, load: Workload, group: int) -> float:
    """An answer read once more (rl.exit_credit.divergence=all), its prompt once for a group of them: by the
    reference at full depth, by the policy at the answer's own exits. Read out are the reference's end and, where a
    token may exit, every exit that it came by or took, and the policy's end if it got there."""
    dims, together = layout.dims, load.in_groups(group)
    readouts = load.answer + load.later * sum(load.reaching(depth) for depth in load.outcomes)
    layers = merged_layers_cost(dims, together, full=True) + merged_layers_cost(dims, together)
    return layers + 2 * dims.vocab * dims.hidden * readouts


def decode_cost(layout: Layout, load: Workload) -> float:
    """Generating the tokens of one answer that don't come from reading its prompt: layers up to the exit, keys and
    values of the others, the gates on the way, the readout. Attention sees the tokens so far."""
    dims, tokens = layout.dims, load.later
    linears = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    skipped = 2 * dims.kv_size * dims.hidden
    span = load.prompt + load.answer / 2
    total = 0.0
    for layer in range(1, dims.num_layers + 1):
        share = load.reaching(layer)
        total += share * (2 * linears + 4 * dims.heads * dims.head_dim * span) + (1 - share) * 2 * skipped
    for depth in layout.spec.exit_depths:
        total += gate(dims, layout.spec.gate_width, load.reaching(depth))
    return tokens * (total + 2 * dims.vocab * dims.hidden)


def generation_cost(layout: Layout, made: Counted, prompts: Sequence[int]) -> float:
    """FLOPs of answers by the exits that they took, by an engine that skips, as `decode_cost` and `answer_cost` count
    them; `prompts`: lengths of those that are read."""
    dims, first, made = layout.dims, layout.spec.first_token, made.without_prompts()
    total = sum(prefill_cost(dims, prompt - first) for prompt in prompts) + made.written * 2 * dims.vocab * dims.hidden
    total += merged_layers_cost(dims, made)
    return total + sum(gate(dims, layout.spec.gate_width, made.asked(depth)) for depth in layout.spec.exit_depths)


def answer_cost(
    dims: ModelDims,
    exit_depths: Sequence[int],
    gate_width: float,
    prompt: int,
    depths: Sequence[int],
    needs: Collection[str] = ("gates",),
    first_token: bool = False,
) -> float:
    """FLOPs of one answer by the exits that it took: `prefill_cost` of its prompt, then every later token's layers, the
    keys and values that it owes the others, its readout, and what its exit rule asked for on the way.

    depths [T], the first of them the prompt's unless `first_token`, with which the prompt's last token is run as later
    ones; needs, of an `ExitRule`: "gates" (of width gate_width · D) and "readout" (of every exit on the way) cost
    something. `decode_cost` is the mean of this over a distribution of exits.
    """
    linears = sum(rows * columns for rows, columns in dims.linear_shapes().values())
    head, skipped = 2 * dims.vocab * dims.hidden, 4 * dims.kv_size * dims.hidden
    begin = 0 if first_token else 1
    total = prefill_cost(dims, prompt - first_token)
    for t, depth in enumerate(depths[begin:], begin):
        total += depth * (2 * linears + 4 * dims.heads * dims.head_dim * (prompt + t))
        total += (dims.num_layers - depth) * skipped + head
        if "gates" in needs:
            total += gate(dims, gate_width, sum(e <= depth for e in exit_depths))
        if "readout" in needs:
            # The exit that is taken is read out anyway.
            total += head * (sum(e <= depth for e in exit_depths) - (depth in exit_depths))
    return total
