"""Divergence from a teacher over the whole, sharded vocabulary, and its gradient, a chunk of positions at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives.divergences import Direction
from .vocabulary import Head


def full_divergence(
    head: Head, hidden: Tensor, teacher_head: Head, teacher_hidden: Tensor, weight: Tensor, direction: Direction
) -> tuple[Tensor, Tensor]:
    """Sum of weight * divergence over positions -> (loss, fp32 scalar; the divergences [N], nats, detached).

    hidden, teacher_hidden [N, D]; weight fp32 [N]. The loss has a gradient for the student's hidden states and, where
    it is trained, for its head.
    """
    if torch.is_grad_enabled():
        loss, divergence = _Distillation.apply(
            head.entering(hidden), head.weight, head, teacher_head, teacher_hidden, weight, direction
        )
        return loss, divergence.detach()
    divergence = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
    for at in head.chunks(hidden):
        teacher = _log_softmax(teacher_head, teacher_hidden[at])
        divergence[at], _ = direction.sharded(_log_softmax(head, hidden[at]), teacher, head.total)
    return (weight * divergence).sum(), divergence


class _Distillation(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        rows: Tensor,
        head: Head,
        teacher_head: Head,
        teacher_hidden: Tensor,
        weight: Tensor,
        direction: Direction,
    ) -> tuple[Tensor, Tensor]:
        divergence = torch.zeros(hidden.size(0), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden)
        d_rows = torch.zeros_like(rows, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for at in head.chunks(hidden):
            teacher = _log_softmax(teacher_head, teacher_hidden[at])
            divergence[at], slope = direction.sharded(_log_softmax(head, hidden[at]), teacher, head.total)
            d_logits = slope.mul_(weight[at].unsqueeze(1) / head.temperature).to(rows.dtype)
            torch.mm(d_logits, rows, out=d_hidden[at])
            if d_rows is not None:
                d_rows += d_logits.t() @ hidden[at]
        ctx.save_for_backward(d_hidden, None if d_rows is None else d_rows.to(rows.dtype))
        ctx.mark_non_differentiable(divergence)
        return (weight * divergence).sum(), divergence

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_rows = ctx.saved_tensors
        return d_hidden * gradient, None if d_rows is None else d_rows * gradient, None, None, None, None, None


def _log_softmax(head: Head, hidden: Tensor) -> Tensor:
    """log p over this rank's rows [n, V_local], fp32; -inf at padded rows."""
    logits, top = head.logits(hidden)
    total = (logits - top).exp_().sum(-1, keepdim=True)
    return logits.sub_(head.total(total).log() + top)
