"""Weights of the terms of the loss, and what they are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorRows:
    """Fields are tensors [B, ...], one row per sequence, or None."""

    def select(self, index: slice | Tensor) -> Self:
        """Some of the sequences."""
        return self._each(lambda value: value[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if value is not None}
        return replace(self, **changed)


@dataclass(frozen=True)
class Weights(TensorRows):
    """Weights of the terms of the loss at every position, normalised over the global batch; None: no such term.

    - token       float32 [B, S]: of -log p(next token)
    - exit        float32 [B, S]: of -log q(prescribed exit)
    - entropy     float32 [B, S]: of the gates' entropy at the position, nats, as a bonus
    - divergence  float32 [B, S]: of the divergence, nats, from the teacher
    - target_hazards float32 [B, S, M]: what the gates learn with weight `exit` instead of the prescribed exit, by
      cross-entropy; -1 where there is no target
    """

    token: Tensor | None = None
    exit: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None
    target_hazards: Tensor | None = None


class Positions(Protocol):
    """The part of a batch (learner/batch.py, `ReplayBatch`) that weights depend on; all [B, S]."""

    @property
    def exit_depths(self) -> Tensor: ...
    @property
    def counts(self) -> Tensor: ...
    @property
    def asked(self) -> Tensor: ...


def mean_weights(batch: Positions, where: Tensor) -> Tensor:
    """Weights of "mean over the sequence's positions in `where`, then mean over sequences", float32 [B, S].

    The divisor is the number of generated tokens of the sequence, also for exits, so that both means of the method run
    over the same positions.
    """
    lengths = batch.counts.sum(1, keepdim=True).clamp(min=1)
    return where.float() / lengths / max(1, int((batch.counts.any(1)).sum()))


def answer_likelihood(batch: Positions) -> Weights:
    """Weights of - log p, its mean over an answer's tokens, then over answers (stage 0)."""
    return Weights(token=mean_weights(batch, batch.counts))


def text_likelihood(batch: Positions) -> Weights:
    """Weights of - log p, its mean over all predicted tokens alike (pretraining)."""
    return Weights(token=batch.counts / batch.counts.sum())
