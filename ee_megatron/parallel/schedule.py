"""One global batch through megatron-core's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from ..model.gpt import EarlyExitGPT, RankModel

MicroBatch = TypeVar("MicroBatch")


def run_schedule(
    model: RankModel,
    micro_batches: Sequence[MicroBatch],
    forward: Callable[[EarlyExitGPT, MicroBatch], Tensor],
    loss: Callable[[MicroBatch, Tensor], Tensor],
    *,
    slots: int,
    train: bool,
) -> None:
    """Run every micro-batch forward and, if `train`, backward; gradients accumulate on the parameters.

    forward(stage, micro_batch) runs on every stage and returns its output [slots, 1, D]; loss(micro_batch, output) runs
    on the last stage and returns a scalar that is summed over micro-batches, undivided. With more than one stage all
    micro-batches have `slots` slots; under virtual pipeline parallelism their number must be a multiple of the pipeline
    ranks (ValueError of megatron-core). Raises whatever the callables raise.
    """

    def forward_step(iterator: Any, chunk: EarlyExitGPT):
        micro_batch = next(iterator)
        return forward(chunk, micro_batch), partial(_loss, micro_batch)

    def _loss(micro_batch: MicroBatch, output: Tensor):
        # A clone: the schedule works in place on what it gets.
        value = loss(micro_batch, output).clone()
        return value, torch.zeros((), dtype=torch.int, device=value.device), {}

    with torch.set_grad_enabled(train):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in model],
            model=list(model),
            num_microbatches=len(micro_batches),
            seq_length=slots,
            micro_batch_size=1,
            forward_only=not train,
        )
