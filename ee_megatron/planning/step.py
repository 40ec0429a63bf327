"""FLOPs of an RL step by phase, and of training from random weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..config.derive import exits_read, scoring
from ..config.schema import RunConfig
from ..families import ModelDims
from ..objectives.divergences import TEACHERS, Teacher
from ..objectives.policy_gradient import KL_TERMS
from .flops import PassMode, decode_cost, exits_read_cost, generation_cost, prefill_cost, whole_pass
from .layout import Layout
from .packing import Packing, pack_pass
from .workload import Counted, Workload

POLICY, REFERENCE = PassMode(train=False), PassMode(train=False, policy=False)
"""How rollouts are scored: the policy under their exits, the reference at full depth."""
COMPARED, ASKED = replace(REFERENCE, likelihood=False), replace(POLICY, likelihood=False)
"""Without a readout: the reference's hidden states, which a divergence reads out; the hazards of the policy's gates."""


def rollouts_per_step(cfg: RunConfig) -> int:
    """Answers that one RL step is made of."""
    return cfg.rl.prompts_per_step * cfg.rl.group_size


def updates(cfg: RunConfig) -> tuple[int, int, PassMode]:
    """Updates of one RL step, the sequences of each, and how it runs them."""
    count, again = cfg.rl.epochs * cfg.rl.minibatches, cfg.parallel.recompute
    how = PassMode(
        train=True,
        recompute=again,
        input_gradient=again or cfg.deepspeed.zero_stage == 3,
        divergence=KL_TERMS[cfg.rl.kl_penalty.kind].teacher is Teacher.REFERENCE,
    )
    return count, max(1, rollouts_per_step(cfg) // cfg.rl.minibatches), how


def scored(cfg: RunConfig) -> list[PassMode]:
    """The passes before the first update (training/reinforce.py, `scored`)."""
    wanted = scoring(cfg.rl)
    policy = replace(POLICY, divergence=wanted.divergence)
    return [policy] * wanted.policy + [REFERENCE] * wanted.reference + [COMPARED] * wanted.divergence


def passes(cfg: RunConfig, load: Workload) -> dict[str, list[tuple[float, Packing, PassMode]]]:
    """Passes of the learner by phase of one RL step: how often, over what, and how."""
    count, part, train = updates(cfg)
    whole, each = (pack_pass(cfg, load, n, cfg.rl.group_size) for n in (rollouts_per_step(cfg), part))
    # The policy's scores once more before each further update.
    before = [(1, whole, how) for how in scored(cfg)] + [(count - 1, each, POLICY)]
    # An exact divergence runs the reference again, with every update.
    update = [(count * train.divergence, each, COMPARED), (count, each, train)]
    return {
        phase: [entry for entry in entries if entry[0]] for phase, entries in (("scoring", before), ("update", update))
    }


def phase_flops(layout: Layout, load: Workload, cfg: RunConfig) -> dict[str, float]:
    """FLOPs of all ranks and actors by phase of one RL step, as they are computed: vLLM runs all layers for all tokens.
    No rollouts where recorded ones are learned from."""
    sequences, vllm = rollouts_per_step(cfg), cfg.rollout.backend == "vllm"
    read = cfg.rl.prompts_per_step * prefill_cost(layout.dims, load.prompt - load.first_token)
    made = read + sequences * decode_cost(layout, load.at_full_depth() if vllm else load)
    of_actors = {} if cfg.rl.replay else {"rollouts": made}
    if exits_read(cfg.rl):
        of_actors["exits read"] = sequences * exits_read_cost(layout, load, cfg.rl.group_size)
    return of_actors | {
        phase: sum(times * whole_pass(layout, packed.load, packed.sequences, how) for times, packed, how in entries)
        for phase, entries in passes(cfg, load).items()
    }


def step_flops(
    layout: Layout,
    cfg: RunConfig,
    prompts: Sequence[int],
    depths: Sequence[np.ndarray],
    kept: Sequence[int],
    shared: float,
) -> dict[str, float]:
    """FLOPs by phase of a step that was done, from the lengths of its prompts and the exits of its answers, whoever
    shared the work; recomputation is not counted, and every engine is taken for one that skips. `kept`: answers that
    are learned from; shared: as in `Counted.of`."""
    layout, rl = layout.on_one_rank(), cfg.rl
    count, _, train = updates(cfg)
    train = replace(train, recompute=False, input_gradient=False)

    def counted(rows: Sequence[int]) -> Counted:
        layers, first = layout.dims.num_layers, layout.spec.first_token
        return Counted.of([prompts[i] for i in rows], [depths[i] for i in rows], layers, rl.group_size, shared, first)

    every, learned = counted(range(len(prompts))), counted(kept)
    run = {how: whole_pass(layout, learned, 1, how) for how in (POLICY, COMPARED, train)}
    return {
        "rollout": generation_cost(layout, every, prompts[:: rl.group_size]),
        "score": sum(whole_pass(layout, every, 1, how) for how in scored(cfg)),
        # Each update but the first scores its share again.
        "update": rl.epochs * (run[train] + run[COMPARED] * train.divergence)
        + run[POLICY] * (count - 1) / rl.minibatches,
    }


def calibration_flops(layout: Layout, load: Workload, cfg: RunConfig) -> float:
    """FLOPs of all ranks for an update of calibration and what is scored for it, on average (training/calibrate.py)."""
    c, again = cfg.calibrate, cfg.parallel.recompute
    full = TEACHERS[c.teacher] is Teacher.REFERENCE
    compared = PassMode(train=False, divergence=full)
    update = PassMode(train=True, recompute=again, input_gradient=again, likelihood=not full, divergence=full)
    # The student's own targets, and a reach, take its divergences first, its own exits the hazards of every gate.
    scored = [(1, load, compared)] if c.gate_targets == "current" or c.kl_scale else []
    own = [(c.student_patterns, load.at_full_depth(), ASKED)]
    taught = [(full * (1 + len(scored)), load, COMPARED)]
    return sum(
        times * whole_pass(layout, what, c.batch_size, how)
        for times, what, how in (*scored, *own, *taught, (1, load, update))
    )


def pretrain_flops(cfg: RunConfig, dims: ModelDims, length: float, sequences: int) -> float:
    """FLOPs of all ranks in training every weight on `sequences` sequences of `length` tokens, of which one is given
    and the others are predicted, at full depth and without gates (training/pretrain.py)."""
    full = copy.deepcopy(cfg)
    full.adapter.full = True
    load = Workload(1, length - 1, (dims.num_layers,), (1.0,))  # type: ignore[arg-type]
    how = PassMode(train=True, policy=False, recompute=cfg.parallel.recompute)
    return whole_pass(Layout.of(full, dims), load, sequences, how)
