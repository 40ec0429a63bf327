"""FLOPs of an RL step by phase, and of training from random weights."""

from __future__ import annotations

import copy

from ..config.schema import RunConfig
from ..families import ModelDims
from .flops import PassMode, decode_cost, prefill_cost, whole_pass
from .layout import Layout
from .workload import Workload

POLICY, REFERENCE = PassMode(train=False), PassMode(train=False, policy=False)
"""How rollouts are scored: the policy under their exits, the reference at full depth."""


def rollouts_per_step(cfg: RunConfig) -> int:
    """Answers that one RL step is made of."""
    return cfg.rl.prompts_per_step * cfg.rl.group_size


def updates(cfg: RunConfig) -> tuple[int, int, PassMode]:
    """Updates of one RL step, the sequences of each, and how it runs them."""
    count, again = cfg.rl.epochs * cfg.rl.minibatches, cfg.parallel.recompute
    how = PassMode(train=True, recompute=again, input_gradient=again or cfg.deepspeed.zero_stage == 3)
    return count, max(1, rollouts_per_step(cfg) // count), how


def phase_flops(layout: Layout, load: Workload, cfg: RunConfig) -> dict[str, float]:
    """FLOPs of all ranks and actors by phase of one RL step, as they are computed: vLLM reads a prompt for each of its
    answers and runs all layers for every token."""

    def over(sequences: int, how: PassMode) -> float:
        return whole_pass(layout, load, cfg.parallel.micro_batch_size, sequences, how)

    sequences, (count, part, train) = rollouts_per_step(cfg), updates(cfg)
    vllm = cfg.rollout.backend == "vllm"
    read = (sequences if vllm else cfg.rl.prompts_per_step) * prefill_cost(layout.dims, load.prompt)
    return {
        "rollouts": read + sequences * decode_cost(layout, load.at_full_depth() if vllm else load),
        # The policy's scores once more before each further update.
        "scoring": over(sequences, POLICY) + over(sequences, REFERENCE) + (count - 1) * over(part, POLICY),
        "update": count * over(part, train),
    }


def pretrain_flops(cfg: RunConfig, dims: ModelDims, length: float, sequences: int) -> float:
    """FLOPs of all ranks in training every weight on `sequences` sequences of `length` tokens, of which one is given
    and the others are predicted, at full depth and without gates (training/pretrain.py)."""
    full = copy.deepcopy(cfg)
    full.adapter.full = True
    load = Workload(1, length - 1, (dims.num_layers,), (1.0,))  # type: ignore[arg-type]
    how = PassMode(train=True, policy=False, recompute=cfg.parallel.recompute)
    return whole_pass(Layout.of(full, dims), load, cfg.parallel.micro_batch_size, sequences, how)
