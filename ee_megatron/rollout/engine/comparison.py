"""Two distributions over the vocabulary beside each other, from their logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import compiled


class Comparison(NamedTuple):
    """Of n pairs of distributions p and q, float32 [n] each, natural logs: KL(p ‖ q) in nats, log sum exp of either's
    logits, the entropy of p in nats."""

    divergence: Tensor
    normaliser: Tensor
    other_normaliser: Tensor
    entropy: Tensor


def compare(logits: Tensor, others: Tensor, of: Tensor | None = None) -> Comparison:
    """softmax(logits) [n, V] with softmax(others) [*, V], row by row or, given `of` int64 [n], with these of its rows.
    Float32; -inf where a token has no probability."""
    library = compiled.library(torch.float32) if logits.device.type == "cpu" else None
    if library is not None:
        of = torch.arange(len(logits)) if of is None else of.contiguous()
        logits, others, found = logits.contiguous(), others.contiguous(), torch.empty(len(logits), 4)
        library.compare(
            logits.data_ptr(), others.data_ptr(), of.data_ptr(), found.data_ptr(), len(logits), logits.shape[1]
        )  # fmt: skip
        return Comparison(*found.unbind(1))
    theirs = others if of is None else others[of]
    normaliser, other = logits.logsumexp(-1), theirs.logsumexp(-1)
    logp = logits - normaliser[:, None]
    p = logp.exp()
    divergence = torch.where(p > 0, p * (logp - (theirs - other[:, None])), 0.0).sum(-1).clamp(min=0)
    return Comparison(divergence, normaliser, other, -torch.where(p > 0, p * logp, 0.0).sum(-1))
