"""What the learner computes on: sequences with their prescribed exits, and a weight for every term of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import SEQUENCE_MULTIPLE
from ..model.control import make_control


@dataclass
class ReplayBatch:
    """B sequences of S positions, padded on the right. Position p predicts token p + 1.

    - tokens       int64 [B, S]
    - depths       int32 [B, S]: prescribed exit depth; L where a position does not exit (prompt), 0 for padding
    - counts       bool [B, S]: the position predicts a generated token
    - asked        bool [B, S]: gates are asked at the position (`counts` without the first one of a sequence)
    - token_weight float32 [B, S], exit_weight float32 [B, S]: weights of the two terms of the loss, already normalised
      over the global batch; 0 where nothing counts
    - soft_targets float32 [B, S, M] or None: target hazards instead of the prescribed exit, -1 where there is none
    - entropy_weight float32 [B, S]: weight of the gates' entropy at the position, in nats, as a bonus
    - kl_weight float32 [B, S] or None: weight of the whole divergence from the reference at the position, nats, where
      it stands beside the likelihood
    - teacher_ids  int64 [B, S, k], teacher_logprobs float32 [B, S, k] or None: the teacher's distribution
    """

    tokens: Tensor
    depths: Tensor
    counts: Tensor
    asked: Tensor
    token_weight: Tensor
    exit_weight: Tensor
    soft_targets: Tensor | None = None
    entropy_weight: Tensor | None = None
    kl_weight: Tensor | None = None
    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.tokens.size(0)

    def select(self, index: slice | Tensor) -> ReplayBatch:
        part: dict[str, Any] = {f.name: _take(getattr(self, f.name), index) for f in fields(self)}
        return replace(self, **part)

    def pad_rows(self, rows: int) -> ReplayBatch:
        """Extended by sequences of padding to `rows`."""
        extra = rows - self.rows
        if not extra:
            return self
        full: dict[str, Any] = {f.name: _extend(getattr(self, f.name), extra) for f in fields(self)}
        return replace(self, **full)

    def to(self, device: torch.device) -> ReplayBatch:
        moved: dict[str, Any] = {
            f.name: v.to(device) if (v := getattr(self, f.name)) is not None else None for f in fields(self)
        }
        return replace(self, **moved)

    def at_full_depth(self, num_layers: int) -> ReplayBatch:
        """The same sequences without exits; padding stays padding."""
        return replace(self, depths=torch.where(self.depths > 0, num_layers, 0).to(self.depths.dtype))

    def sources(self) -> Tensor:
        """The sequence that each position takes its key and value from, int64 [B, S]: its own, or an earlier one that
        begins with the same tokens; -1 for padding.

        Only prompt positions are shared, short of the last one: they run at full depth and predict nothing that counts,
        so what sequences of a group (or with common few-shot examples) have in common is run once, with the sum of
        their gradients.
        """
        rows, width = self.tokens.shape
        before = torch.where(self.counts.any(1), self.counts.int().argmax(1), 0)
        alike = (self.tokens.unsqueeze(1) == self.tokens).int().cumprod(-1).sum(-1)
        common = torch.minimum(alike, torch.minimum(before.unsqueeze(1), before))
        here = torch.arange(width, device=self.tokens.device)
        found = torch.arange(rows, device=self.tokens.device).unsqueeze(1).repeat(1, width)
        found[self.depths == 0] = -1
        for row in range(1, rows):
            length, leader = common[row, :row].max(0)
            found[row] = torch.where(here < length, found[leader], found[row])
        return found

    def control(self) -> Tensor:
        """The layers' control tensor [S, B, C] (model/control.py)."""
        return make_control(
            self.depths, self.asked, self.exit_weight, self.entropy_weight, self.sources(), self.soft_targets
        )

    def labels(self) -> Tensor:
        """The token that each position predicts, int64 [B, S]; the last column repeats and never counts."""
        return torch.cat([self.tokens[:, 1:], self.tokens[:, -1:]], dim=1)


def _take(value: Tensor | None, index: slice | Tensor) -> Tensor | None:
    return None if value is None else value[index]


def _extend(value: Tensor | None, extra: int) -> Tensor | None:
    return None if value is None else torch.cat([value, value.new_zeros(extra, *value.shape[1:])])


def pack(
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    exit_depths: Sequence[np.ndarray] | None,
    num_layers: int,
    multiple: int = SEQUENCE_MULTIPLE,
) -> ReplayBatch:
    """Prompt tokens [P], answer tokens [T] and depths [T] per sequence -> a batch with all weights 0.

    Entry t of `exit_depths` belongs to the position that predicted answer token t. The last answer token is an input of
    nothing, but keeping it makes `labels` a shift. S is rounded up to `multiple` (a tensor-parallel degree divides it).
    """
    rows = len(prompts)
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    width = -(-longest // multiple) * multiple
    tokens = torch.zeros(rows, width, dtype=torch.int64)
    depths = torch.zeros(rows, width, dtype=torch.int32)
    counts = torch.zeros(rows, width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, length = len(prompt) - 1, len(answer)
        depths[row, : start + length] = num_layers
        tokens[row, : start + 1] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
        tokens[row, start + 1 : start + 1 + length] = torch.as_tensor(np.asarray(answer, dtype=np.int64))
        counts[row, start : start + length] = True
        if exit_depths is not None:
            depths[row, start : start + length] = torch.as_tensor(np.asarray(exit_depths[row], dtype=np.int32))
            if length and int(depths[row, start]) != num_layers:
                raise ValueError(
                    "the first generated token comes from the prompt, which never exits: its depth must be L"
                )
    asked = counts.clone()
    asked[:, 1:] &= counts[:, :-1]
    asked[:, 0] = False
    zero = torch.zeros(rows, width)
    return ReplayBatch(tokens, depths, counts, asked, zero, zero.clone())


def spread(batch: ReplayBatch, values: Sequence[np.ndarray], into: Tensor | None = None) -> Tensor:
    """Per-sequence arrays [T, ...] placed at the positions that predict their tokens -> [B, S, ...], 0 elsewhere."""
    first = np.asarray(values[0])
    out = (
        into
        if into is not None
        else torch.zeros(*batch.tokens.shape, *first.shape[1:], dtype=torch.as_tensor(first[:0]).dtype)
    )
    for row, value in enumerate(values):
        out[row][batch.counts[row]] = torch.as_tensor(np.asarray(value)).to(out.dtype)
    return out


def mean_weights(batch: ReplayBatch, where: Tensor) -> Tensor:
    """Weights of "mean over the sequence's positions in `where`, then mean over sequences", float32 [B, S].

    The divisor is the number of generated tokens of the sequence, also for exits, so that both means of the method run
    over the same positions.
    """
    lengths = batch.counts.sum(1, keepdim=True).clamp(min=1)
    return where.float() / lengths / max(1, int((batch.counts.any(1)).sum()))
