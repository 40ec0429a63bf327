"""What the learner computes on: sequences with their prescribed exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..objectives.weights import TensorRows


@dataclass(frozen=True)
class ReplayBatch(TensorRows):
    """B sequences of S positions, padded on the right. Position p predicts token p + 1.

    - tokens       int64 [B, S]
    - exit_depths  int32 [B, S]: prescribed; L where a position does not exit (prompt), 0 for padding
    - loss_mask    bool [B, S]: the position predicts a generated token
    - gate_mask    bool [B, S]: gates decide at the position (`loss_mask`, a sequence's first only where it may exit)
    - teacher_ids  int64 [B, S, k], teacher_logprobs float32 [B, S, k] or None: the stored teacher's distribution
    """

    tokens: Tensor
    exit_depths: Tensor
    loss_mask: Tensor
    gate_mask: Tensor
    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.tokens.size(0)

    def at_full_depth(self, num_layers: int) -> ReplayBatch:
        """The same sequences without exits; padding stays padding."""
        full = torch.where(self.exit_depths > 0, num_layers, 0).to(self.exit_depths.dtype)
        return replace(self, exit_depths=full)

    def lengths(self) -> Tensor:
        """Positions of each sequence, int64 [B]; its last token is an input of nothing and has none."""
        return (self.exit_depths > 0).sum(1)

    def shareable(self) -> Tensor:
        """Positions of each sequence that another one with the same tokens there may run for it, int64 [B]: the prompt
        short of the last one. They run at full depth and predict nothing that counts."""
        return torch.where(self.loss_mask.any(1), self.loss_mask.int().argmax(1), 0)

    def labels(self) -> Tensor:
        """The token that each position predicts, int64 [B, S]; the last column repeats and never counts."""
        return torch.cat([self.tokens[:, 1:], self.tokens[:, -1:]], dim=1)


def pack(
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    exit_depths: Sequence[np.ndarray] | None,
    num_layers: int,
    first_token: bool = False,
) -> ReplayBatch:
    """Prompt tokens [P], answer tokens [T] and exit depths [T] per sequence -> a batch, None for full depth.

    Entry t of `exit_depths` belongs to the position that predicted answer token t; first_token as in `ExitLayout`. The
    last answer token is an input of nothing, but keeping it makes `labels` a shift.
    """
    rows = len(prompts)
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    depths = torch.zeros(rows, width, dtype=torch.int32)
    loss_mask = torch.zeros(rows, width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, length = len(prompt) - 1, len(answer)
        depths[row, : start + length] = num_layers
        tokens[row, : start + 1] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
        tokens[row, start + 1 : start + 1 + length] = torch.as_tensor(np.asarray(answer, dtype=np.int64))
        loss_mask[row, start : start + length] = True
        if exit_depths is not None:
            depths[row, start : start + length] = torch.as_tensor(np.asarray(exit_depths[row], dtype=np.int32))
            if length and not first_token and int(depths[row, start]) != num_layers:
                raise ValueError(
                    "the first generated token comes from the prompt, which never exits: its depth must be L"
                )
    gate_mask = loss_mask.clone()
    if not first_token:
        gate_mask[:, 1:] &= loss_mask[:, :-1]
        gate_mask[:, 0] = False
    return ReplayBatch(tokens, depths, loss_mask, gate_mask)


def spread(batch: ReplayBatch, values: Sequence[np.ndarray]) -> Tensor:
    """Per-sequence arrays [T, ...] placed at the positions that predict their tokens -> [B, S, ...], 0 elsewhere."""
    first = torch.as_tensor(np.asarray(values[0]))
    out = torch.zeros(*batch.tokens.shape, *first.shape[1:], dtype=first.dtype)
    for row, value in enumerate(values):
        out[row][batch.loss_mask[row]] = torch.as_tensor(np.asarray(value)).to(out.dtype)
    return out
