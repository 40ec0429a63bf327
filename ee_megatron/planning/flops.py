"""FLOPs of scoring, learning and generating, by the products that the code runs, and of whole RL steps.

A multiply-add counts 2. Attention counts the keys that each query sees. Norms, activations and softmax are not counted:
they cost memory traffic, not products.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..config.derive import exits_read, scoring
from ..config.schema import RunConfig
from ..exits import gate_units
from ..families import ModelDims
from ..objectives.divergences import TEACHERS, Teacher
from ..objectives.policy_gradient import KL_TERMS
from .layout import JOINT, KEY_VALUE, Layout
from .workload import Load, Packing, Workload, pack_pass


@dataclass(frozen=True)
class PassMode:
    """How the learner runs a batch. train: with backward pass; recompute: layers run forward twice; policy: with
    adapters, gates and exits (False: the reference at full depth); input_gradient: the first layer's input needs a
    gradient; likelihood: tokens' log-probabilities are read out; divergence: so is that from the reference over the
    whole vocabulary (another pass makes the reference's hidden states)."""

    train: bool
    policy: bool = True
    recompute: bool = False
    input_gradient: bool = False
    likelihood: bool = True
    divergence: bool = False


POLICY, REFERENCE = PassMode(train=False), PassMode(train=False, policy=False)
"""Passes that score rollouts: the policy under their exits, the reference at full depth."""
COMPARED, HAZARDS = replace(REFERENCE, likelihood=False), replace(POLICY, likelihood=False)
"""Without a readout: the reference's hidden states for a divergence; the policy's hazards."""


def gate(dims: ModelDims, width: float, positions: float) -> float:
    """FLOPs of one gate of width `width` · D on `positions` positions, forward."""
    return 2 * positions * gate_units(width, dims.hidden) * (dims.hidden + 1)


def carries_gradient(layout: Layout, layer: int, how: PassMode) -> bool:
    """Whether the layer's input needs a gradient: any but the first layer's does if something before it is trained."""
    if how.input_gradient or layout.spec.full:
        return True
    if layout.spec.rank:
        return layer > 1
    return layer > 1 + min(layout.spec.exit_depths, default=layout.dims.num_layers)


def layer_cost(layout: Layout, load: Load, layer: int, sequences: float, how: PassMode) -> float:
    """FLOPs of one layer on one rank."""
    spec, dims = layout.spec, layout.dims
    active = sequences * load.active(layer, full=not how.policy)
    linear = adapters = entered = entered_adapters = 0.0
    for parts in JOINT:
        rows, columns, rank = layout.joint(parts)
        # Keys and values are made at all positions. Parts share one product down to all their ranks, and one up in
        # which each ignores the others' ranks.
        positions = sequences * load.written if parts == KEY_VALUE else active
        base, down, up = (2 * positions * size for size in (rows * columns, columns * rank, rows * rank))
        linear, adapters = linear + base, adapters + (down + up) * how.policy
        if parts in JOINT[:2]:
            entered, entered_adapters = entered + base, entered_adapters + down
    width = dims.heads // layout.tensor * dims.head_dim
    attended = 4 * width * sequences * load.seen(layer, not how.policy)
    gated = 0.0
    if how.policy and layer - 1 in spec.exit_depths:
        # Under sequence parallelism each tensor-parallel rank computes its own positions; else all of them do all.
        gated = gate(dims, spec.gate_width, sequences * load.reaching(layer - 1)) / layout.sequence_ranks
    forward = linear + adapters + attended + gated
    if not how.train:
        return forward
    entering = carries_gradient(layout, layer, how)
    through = linear if entering else linear - entered
    trained = 2 * adapters - (0.0 if entering else entered_adapters)
    if not (entering or spec.full or spec.rank):
        # Gates alone, and none before this layer: nothing in it is differentiated.
        through = trained = attended = 0.0
    backward = through + linear * spec.full + trained + 2.5 * attended + 2 * gated
    return forward + backward + (forward if how.recompute else 0.0)


def head_cost(layout: Layout, load: Load, sequences: float, how: PassMode) -> float:
    """FLOPs of the head on one tensor-parallel rank; a divergence needs the teacher's distribution beside the policy's,
    and the backward pass goes through the policy's once."""
    backward = (1 + layout.spec.full) if how.train else 0
    readouts = (1 + backward) * (how.likelihood or how.divergence) + how.divergence
    return 2 * sequences * load.answer * layout.vocabulary_rows * layout.dims.hidden * readouts


def pass_cost(layout: Layout, load: Load, sequences: float, how: PassMode) -> list[float]:
    """FLOPs by pipeline rank of a data rank's even share of the sequences, on one tensor-parallel rank."""
    each = sequences / layout.data

    def rank_cost(pipeline_rank: int) -> float:
        layers = itertools.chain(*layout.stages(pipeline_rank))
        total = sum(layer_cost(layout, load, layer, each, how) for layer in layers)
        return total + (head_cost(layout, load, each, how) if layout.has_head(pipeline_rank) else 0.0)

    return [rank_cost(p) for p in range(layout.pipeline)]


def whole_pass(layout: Layout, load: Load, sequences: float, how: PassMode) -> float:
    """FLOPs of all ranks."""
    return layout.tensor * layout.data * sum(pass_cost(layout, load, sequences, how))


def linear_elements(dims: ModelDims) -> int:
    """Elements of a layer's matrices."""
    return sum(rows * columns for rows, columns in dims.linear_shapes().values())


def prefill_cost(dims: ModelDims, prompt: int) -> float:
    """FLOPs of reading one prompt at full depth; logits of its last position only."""
    attended = 4 * dims.heads * dims.head_dim * prompt * prompt
    return dims.num_layers * (2 * prompt * linear_elements(dims) + attended) + 2 * dims.vocab * dims.hidden


def merged_layers_cost(dims: ModelDims, load: Load, full: bool = False) -> float:
    """FLOPs of every layer at the positions that run it, and of keys and values for the others; full: without exits."""
    linears, total = linear_elements(dims), 0.0
    for layer in range(1, dims.num_layers + 1):
        run = load.active(layer, full)
        total += 2 * linears * run + 4 * dims.heads * dims.head_dim * load.seen(layer, full)
        total += 4 * dims.kv_size * dims.hidden * (load.written - run)
    return total


def exits_read_cost(layout: Layout, load: Workload, group: int) -> float:
    """FLOPs of scoring an answer's exits (rl.exit_credit.divergence=all), its prompt once per group: by the reference
    at full depth, by the policy at the answer's own exits. Unembedded are the reference's end and, where a token may
    exit, every exit that it passed or took, and the policy's end if the token reached it."""
    dims, together = layout.dims, load.in_groups(group)
    readouts = load.answer + sum(load.reaching(depth) for depth in load.outcomes)
    layers = merged_layers_cost(dims, together, full=True) + merged_layers_cost(dims, together)
    return layers + 2 * dims.vocab * dims.hidden * readouts


def decode_cost(layout: Layout, load: Load) -> float:
    """FLOPs of the tokens that don't come from reading prompts: layers up to the exit, keys and values of the others,
    the gates on the way, the readout."""
    dims, made = layout.dims, load.without_prompts()
    total = made.written * 2 * dims.vocab * dims.hidden + merged_layers_cost(dims, made)
    return total + sum(gate(dims, layout.spec.gate_width, made.reaching(depth)) for depth in layout.spec.exit_depths)


def answer_cost(
    dims: ModelDims, exit_depths: Sequence[int], gate_width: float, prompt: int, depths: Sequence[int],
    needs: Collection[str] = ("gates",), first_token: bool = False,
) -> int:  # fmt: skip
    """FLOPs of one answer by the exits that it took: `prefill_cost` of its prompt and, as `decode_cost` does, of its
    tokens, with what its exit rule needs.

    depths [T], the first of them the prompt's unless `first_token`, with which the prompt's last token is run as later
    ones; needs, of an `ExitRule`: "gates" (of width gate_width · D) and "readout" (of every exit on the way) cost
    something.
    """
    head = 2 * dims.vocab * dims.hidden
    made = Load.counted([prompt], [np.asarray(depths)], dims.num_layers, first_token=first_token).without_prompts()
    total = prefill_cost(dims, prompt - first_token) + merged_layers_cost(dims, made) + head * made.written
    if "gates" in needs:
        total += sum(gate(dims, gate_width, made.reaching(exit_)) for exit_ in exit_depths)
    if "readout" in needs:
        # The exit that is taken is read out anyway.
        total += head * sum(made.reaching(exit_) - made.by_depth[exit_] for exit_ in exit_depths)
    return round(total)


def rollouts_per_step(cfg: RunConfig) -> int:
    """Answers that one RL step is made of."""
    return cfg.rl.prompts_per_step * cfg.rl.group_size


def updates(cfg: RunConfig) -> tuple[int, int, PassMode]:
    """Updates of one RL step, the sequences of each, and how it runs them."""
    again = cfg.parallel.recompute
    how = PassMode(
        train=True, recompute=again, input_gradient=again or cfg.deepspeed.zero_stage == 3,
        divergence=KL_TERMS[cfg.rl.kl_penalty.kind].teacher is Teacher.REFERENCE,
    )  # fmt: skip
    return cfg.rl.minibatches, max(1, rollouts_per_step(cfg) // cfg.rl.minibatches), how


def scoring_passes(cfg: RunConfig) -> list[PassMode]:
    """The passes before the first update."""
    wanted = scoring(cfg.rl)
    policy = replace(POLICY, divergence=wanted.divergence)
    return [policy] * wanted.policy + [REFERENCE] * wanted.reference + [COMPARED] * wanted.divergence


def passes(cfg: RunConfig, load: Workload) -> dict[str, list[tuple[float, Packing, PassMode]]]:
    """Passes of the learner by phase of one RL step: how often, over what, and how."""
    count, part, train = updates(cfg)
    whole, each = (pack_pass(cfg, load, n, cfg.rl.group_size) for n in (rollouts_per_step(cfg), part))
    # The policy's scores once more before each further update.
    before = [(1, whole, how) for how in scoring_passes(cfg)] + [(count - 1, each, POLICY)]
    # An exact divergence runs the reference again, with every update.
    update = [(count * train.divergence, each, COMPARED), (count, each, train)]
    return {
        phase: [entry for entry in entries if entry[0]] for phase, entries in (("scoring", before), ("update", update))
    }


def phase_flops(layout: Layout, load: Workload, cfg: RunConfig) -> dict[str, float]:
    """FLOPs of all ranks and actors by phase of one RL step, as computed: vLLM runs all layers for all tokens."""
    sequences, vllm = rollouts_per_step(cfg), cfg.rollout.backend == "vllm"
    read = cfg.rl.prompts_per_step * prefill_cost(layout.dims, load.prompt - load.first_token)
    of_actors = {"rollouts": read + sequences * decode_cost(layout, load.at_full_depth() if vllm else load)}
    if exits_read(cfg.rl):
        of_actors["exits read"] = sequences * exits_read_cost(layout, load, cfg.rl.group_size)
    return of_actors | {
        phase: sum(times * whole_pass(layout, packed.load, packed.sequences, how) for times, packed, how in entries)
        for phase, entries in passes(cfg, load).items()
    }


def step_flops(
    layout: Layout, cfg: RunConfig, prompts: Sequence[int], depths: Sequence[np.ndarray], learned: Sequence[int],
    shared: float,
) -> dict[str, float]:  # fmt: skip
    """FLOPs by phase of a step that was done, from the lengths of its prompts and the exits of its answers, whoever
    shared the work; recomputation is not counted, and engines are assumed to skip layers. `learned`: answers that the
    updates use; shared: as in `Load.counted`."""
    layout, rl = layout.on_one_rank(), cfg.rl
    count, _, train = updates(cfg)
    train = replace(train, recompute=False, input_gradient=False)

    def counted(rows: Sequence[int]) -> Load:
        layers, first = layout.dims.num_layers, layout.spec.first_token
        return Load.counted([prompts[i] for i in rows], [depths[i] for i in rows], layers, rl.group_size, shared, first)

    every, of_learned = counted(range(len(prompts))), counted(learned)
    run = {how: whole_pass(layout, of_learned, 1, how) for how in (POLICY, COMPARED, train)}
    read = sum(prefill_cost(layout.dims, prompt - layout.spec.first_token) for prompt in prompts[:: rl.group_size])
    return {
        "rollout": read + decode_cost(layout, every),
        "score": sum(whole_pass(layout, every, 1, how) for how in scoring_passes(cfg)),
        # Each update but the first scores its share again.
        "update": run[train] + run[COMPARED] * train.divergence + run[POLICY] * (count - 1) / rl.minibatches,
    }


def calibration_flops(layout: Layout, load: Workload, cfg: RunConfig) -> float:
    """FLOPs of all ranks for an update of calibration and its scoring passes, on average."""
    c, again = cfg.calibrate, cfg.parallel.recompute
    full = TEACHERS[c.teacher] is Teacher.REFERENCE
    compared = PassMode(train=False, divergence=full)
    update = PassMode(train=True, recompute=again, input_gradient=again, likelihood=not full, divergence=full)
    # The student's own targets, and kl_scale, need its divergences first; its own exits need every gate's hazards.
    before = [(1, load, compared)] if c.gate_targets == "current" or c.kl_scale else []
    own = [(c.student_patterns, load.at_full_depth(), HAZARDS)]
    teacher = [(full * (1 + len(before)), load, COMPARED)]
    return sum(
        times * whole_pass(layout, what, c.batch_size, how)
        for times, what, how in (*before, *own, *teacher, (1, load, update))
    )


def pretrain_flops(cfg: RunConfig, dims: ModelDims, length: float, sequences: int) -> float:
    """FLOPs of all ranks in training every weight on `sequences` sequences of `length` tokens, of which all but the
    first are predicted, at full depth and without gates."""
    full = copy.deepcopy(cfg)
    full.adapter.full = True
    load = Workload(1, length - 1, (dims.num_layers,), (1.0,))
    how = PassMode(train=True, policy=False, recompute=cfg.parallel.recompute)
    return whole_pass(Layout.of(full, dims), load, sequences, how)
