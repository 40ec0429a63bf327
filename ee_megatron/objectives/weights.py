"""Weights of the loss terms, and the batch fields that they are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorRows:
    """A record whose fields are tensors [B, ...], one row per sequence, or None."""

    def select(self, index: slice | Tensor) -> Self:
        """The record of some of the sequences."""
        return self._each(lambda value: value[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if value is not None}
        return replace(self, **changed)


@dataclass(frozen=True)
class Weights(TensorRows):
    """Weights of the terms of the loss at every position, normalised over the global batch; None: no such term.

    - token       float32 [B, S]: of -log p(next token)
    - exit        float32 [B, S]: of -log q(prescribed exit), or [B, S, M]: of each gate's share of it
    - hazard      float32 [B, S, M]: of the hazard of every gate that the position reaches
    - divergence  float32 [B, S]: of the divergence, nats, from the teacher
    - target_hazards float32 [B, S, M]: what the gates learn with weight `exit` instead of the prescribed exit, by
      cross-entropy; -1 where there is no target
    """

    token: Tensor | None = None
    exit: Tensor | None = None
    hazard: Tensor | None = None
    divergence: Tensor | None = None
    target_hazards: Tensor | None = None


class Positions(Protocol):
    """The part of a batch (learner/batch.py, `ReplayBatch`) that weights depend on; all [B, S]."""

    @property
    def exit_depths(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def gate_mask(self) -> Tensor: ...


def _per_answer(lengths: Tensor, constant: int) -> Tensor:
    return lengths.clamp(min=1) * max(1, int((lengths > 0).sum()))


def _per_token(lengths: Tensor, constant: int) -> Tensor:
    return lengths * 0 + lengths.sum().clamp(min=1)


def _per_constant(lengths: Tensor, constant: int) -> Tensor:
    return lengths * 0 + constant * max(1, int((lengths > 0).sum()))


AVERAGES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "answer": _per_answer,
    "token": _per_token,
    "constant": _per_constant,
}
"""What a position's share of the loss is divided by, from the answers' lengths [B, 1]: a mean over each answer, then
over answers (a token of a long one counts less); a mean over all tokens (Yu et al. 2025, "DAPO", arXiv 2503.14476); a
sum over each answer by a constant, then the mean (Liu et al. 2025, "Dr. GRPO", arXiv 2503.20783)."""


def mean_weights(batch: Positions, where: Tensor, average: str = "answer", constant: int = 1) -> Tensor:
    """Weights of the mean over positions in `where` by `average`, one of AVERAGES, float32 [B, S].

    Lengths are those in generated tokens, also for exits, so that both means of the method run over the same positions.
    """
    return where.float() / AVERAGES[average](batch.loss_mask.sum(1, keepdim=True), constant)


def answer_likelihood(batch: Positions) -> Weights:
    """Weights of - log p averaged over an answer's tokens, then over answers (stage 0)."""
    return Weights(token=mean_weights(batch, batch.loss_mask))


def text_likelihood(batch: Positions) -> Weights:
    """Weights of - log p averaged over all predicted tokens (pretraining)."""
    return Weights(token=batch.loss_mask / batch.loss_mask.sum())
