"""One RL step: what it does, and its FLOPs by phase; and what training from random weights costs."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from ..config.schema import RunConfig
from ..families import ModelDims
from .flops import PassMode, decode_cost, prefill_cost, whole_pass
from .layout import Layout
from .workload import Workload


@dataclass(frozen=True)
class Step:
    """What an RL step does. gpus_per_node: devices that reach each other by the fast link; 0: all of them."""

    prompts: int
    group: int
    updates: int
    micro_batch: int
    recompute: bool
    zero_stage: int
    item: int
    actors: int
    rows: int
    gpus_per_node: int

    @property
    def sequences(self) -> int:
        """Rollouts of a step."""
        return self.prompts * self.group

    @property
    def train(self) -> PassMode:
        """How its updates run a batch."""
        return PassMode(train=True, recompute=self.recompute, input_gradient=self.recompute or self.zero_stage == 3)


def rl_step(cfg: RunConfig, item: int) -> Step:
    """The configuration's RL step; `item`: bytes per element of the base."""
    rl = cfg.rl
    return Step(
        prompts=rl.prompts_per_step,
        group=rl.group_size,
        updates=rl.epochs * rl.minibatches,
        micro_batch=cfg.parallel.micro_batch_size,
        recompute=cfg.parallel.recompute,
        zero_stage=cfg.deepspeed.zero_stage,
        item=item,
        actors=cfg.rollout.actors,
        rows=cfg.rollout.rows,
        gpus_per_node=cfg.cluster.gpus_per_node,
    )


def phase_flops(layout: Layout, load: Workload, step: Step) -> dict[str, float]:
    """FLOPs of all ranks and actors by phase of one RL step."""

    def over(sequences: int, how: PassMode) -> float:
        return whole_pass(layout, load, step.micro_batch, sequences, how)

    part = max(1, step.sequences // step.updates)
    policy, reference = PassMode(train=False), PassMode(train=False, policy=False)
    return {
        "rollouts": step.prompts * prefill_cost(layout.dims, load.prompt) + step.sequences * decode_cost(layout, load),
        "scoring": over(step.sequences, policy)
        + over(step.sequences, reference)
        + (step.updates - 1) * over(part, policy),
        "update": step.updates * over(part, step.train),
    }


def pretrain_flops(cfg: RunConfig, dims: ModelDims, length: float, sequences: int) -> float:
    """FLOPs of all ranks in training every weight on `sequences` sequences of `length` tokens, of which one is given
    and the others are predicted, at full depth and without gates (training/pretrain.py)."""
    full = copy.deepcopy(cfg)
    full.adapter.full = True
    load = Workload(1, length - 1, (dims.num_layers,), (1.0,))  # type: ignore[arg-type]
    how = PassMode(train=True, policy=False, recompute=cfg.parallel.recompute)
    return whole_pass(Layout.of(full, dims), load, cfg.parallel.micro_batch_size, sequences, how)
