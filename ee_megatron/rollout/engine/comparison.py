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


def compare(logits: Tensor, others: Tensor, rows: Tensor | None = None, other_rows: Tensor | None = None) -> Comparison:
    """softmax(logits) with softmax(others), float32 [*, V], row by row; of either only `rows`, `other_rows` int64 [n],
    where they are given. -inf where a token has no probability."""
    library = compiled.library(torch.float32) if logits.device.type == "cpu" else None
    if library is not None:
        logits, others = logits.contiguous(), others.contiguous()
        rows, other_rows = (None if which is None else which.contiguous() for which in (rows, other_rows))
        count, vocab = len(logits) if rows is None else len(rows), logits.shape[1]
        found = torch.empty(count, 4)
        library.compare(
            logits.data_ptr(), others.data_ptr(), compiled.pointer(rows), compiled.pointer(other_rows),
            found.data_ptr(), count, vocab,
        )  # fmt: skip
        return Comparison(*found.unbind(1))
    logits, others = (x if which is None else x[which] for x, which in ((logits, rows), (others, other_rows)))
    normaliser, other = logits.logsumexp(-1), others.logsumexp(-1)
    logp = logits - normaliser[:, None]
    p = logp.exp()
    divergence = torch.where(p > 0, p * (logp - (others - other[:, None])), 0.0).sum(-1).clamp(min=0)
    return Comparison(divergence, normaliser, other, -torch.where(p > 0, p * logp, 0.0).sum(-1))
