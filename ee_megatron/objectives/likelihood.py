"""Maximum likelihood: of chosen answers (stage 0) and of whole texts (pretraining)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .weights import Positions, Weights, mean_weights

if TYPE_CHECKING:
    from torch import Tensor


class Likelihood:
    """- log p: its mean over an answer's tokens, then over answers."""

    teacher: ClassVar[None] = None

    def weights(self, batch: Positions) -> Weights:
        return Weights(token=mean_weights(batch, batch.counts))


class TextLikelihood:
    """- log p: its mean over all predicted tokens alike."""

    teacher: ClassVar[None] = None

    def weights(self, batch: Positions) -> Weights:
        return Weights(token=batch.counts / batch.counts.sum())


def loss_of(weights: Weights, token_logprobs: Tensor) -> float:
    """The loss of a likelihood, nats, from log p of the next tokens [B, S]."""
    assert weights.token is not None
    return -float((token_logprobs * weights.token).sum())
