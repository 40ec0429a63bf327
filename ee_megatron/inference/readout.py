"""Predictions of every exit for a given text, read once in parallel and unembedded at each depth (logit lens).

Shapes: T positions, N depths (the last is L), M exits, V vocabulary, k top tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..exits import exit_distribution
from ..rollout.engine.decoder import Decoder
from ..rollout.engine.prompts import piece
from ..rollout.engine.sampling import log_prob
from ..rollout.engine.scoring import chunks, compare

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Readout:
    """Predictions at every position and depth: position t reads a token and predicts the next; row n is the prediction
    at depth n. On the CPU; natural logs, temperature 1, entropies and divergences in nats.

    - depths: N numbers of layers, increasing; the last is L. Those of the model's M exits, unless others were requested
    - tokens int64 [T]: the token that each position reads; next_tokens int64 [T]: the one that follows, -1 at the end
    - logits float32 [N, T, V], or None: only with `full`
    - top_ids int64 [N, T, k], top_logprobs float32 [N, T, k]: the k most probable next tokens, the best first
    - next_logprobs float32 [N, T]: log-probability of the token that follows; NaN at the end
    - entropies float32 [N, T]; divergences float32 [N, T]: KL(last layer ‖ this depth), 0 in the last row
    - hazards float32 [N - 1, T]: probability that the gate at this depth stops a position that has come to it; NaN
      where there is no gate
    """

    depths: tuple[int, ...]
    tokens: Tensor
    next_tokens: Tensor
    logits: Tensor | None
    top_ids: Tensor
    top_logprobs: Tensor
    next_logprobs: Tensor
    entropies: Tensor
    divergences: Tensor
    hazards: Tensor
    tokenizer: PreTrainedTokenizerBase

    @property
    def logprobs(self) -> Tensor:
        """Log-probabilities float32 [N, T, V]. Raises ValueError unless the logits were stored."""
        if self.logits is None:
            raise ValueError("the logits were not stored; ask for readout(..., full=True)")
        return self.logits.log_softmax(dim=-1)

    @property
    def exit_probabilities(self) -> Tensor:
        """Probability of each exit under sampled exits, float32 [N, T]; columns sum to 1. Raises ValueError where a
        depth other than the last has no gate."""
        if bool(self.hazards.isnan().any()):
            raise ValueError("some of these depths have no gate; use the model's exits, with its gates")
        return exit_distribution(self.hazards.T).T

    def piece(self, token: int) -> str:
        """The text of a token alone; "" for -1."""
        return "" if token < 0 else piece(self.tokenizer, token)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with a row per position and depth: position, depth (int), token, next_token, top_token (str),
        top_id (int), top_logprob, next_logprob, entropy, divergence, hazard (float; NaN in the last layer)."""
        import pandas as pd

        N, T = self.entropies.shape
        never = torch.full((1, T), float("nan"))
        best = self.top_ids[:, :, 0]

        def flat(table: Tensor) -> list:
            return table.T.flatten().tolist()

        def by_position(row: Tensor) -> list[str]:
            return [self.piece(token) for token in row.tolist() for _ in range(N)]

        return pd.DataFrame(
            {
                "position": [t for t in range(T) for _ in range(N)],
                "depth": list(self.depths) * T,
                "token": by_position(self.tokens),
                "next_token": by_position(self.next_tokens),
                "top_token": [self.piece(token) for token in flat(best)],
                "top_id": flat(best),
                "top_logprob": flat(self.top_logprobs[:, :, 0]),
                "next_logprob": flat(self.next_logprobs),
                "entropy": flat(self.entropies),
                "divergence": flat(self.divergences),
                "hazard": flat(torch.cat([self.hazards, never])),
            }
        )


@torch.inference_mode()
def read(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    first: int = 0,
    at: Sequence[int] | None = None,
    exits: Sequence[int] | None = None,
    top_k: int = 5,
    full: bool = False,
) -> Readout:
    """Unembed positions `first`.. of a sequence at depths `at` (None: the exits; every layer if there are none).

    exits: the depth of each position of the sequence, which goes no deeper; None: all run through. Vocabulary-sized
    tensors exist for a chunk of positions at a time, unless `full` keeps them. Raises ValueError for tokens, depths or
    a `top_k` that the model doesn't have.
    """
    dims, device = decoder.dims, decoder.device
    depths = _depths(decoder, at)
    if not tokens or not all(0 <= token < dims.vocab for token in tokens):
        raise ValueError(f"{len(tokens)} tokens: expected at least one, all in 0..{dims.vocab - 1}")
    if len(tokens) > dims.max_positions:
        raise ValueError(f"{len(tokens)} tokens: the model has {dims.max_positions} positions; shorten the text")
    if not 1 <= top_k <= dims.vocab:
        raise ValueError(f"top_k={top_k}: expected 1..{dims.vocab}, how many of the most probable tokens to keep")
    sequence = torch.tensor([list(tokens)], device=device)
    prescribed = None if exits is None else torch.tensor([list(exits)], device=device)
    lengths = torch.tensor([len(tokens)])
    final, inner = decoder.forward_with_residuals(sequence, lengths, prescribed, at=depths[:-1])
    streams = [stream[0, first:] for stream in (*inner, final)]
    following = torch.tensor([*tokens[first + 1 :], -1], device=device)
    parts = [_read_at(decoder, streams, following, at, top_k, full) for at in chunks(decoder, len(following))]
    logits, ids, values, said, entropies, divergences = (
        torch.cat(column, dim=1).cpu() for column in zip(*parts, strict=True)
    )
    hazards = torch.full((len(depths) - 1, len(following)), float("nan"), device=device)
    for n, depth in enumerate(depths[:-1]):
        if decoder.gates is not None and depth in decoder.layout.depths:
            hazards[n] = decoder.gate_logit(decoder.layout.depths.index(depth), streams[n]).sigmoid()
    return Readout(
        depths, sequence[0, first:].cpu(), following.cpu(), logits if full else None, ids, values, said, entropies,
        divergences, hazards.cpu(), tokenizer,
    )  # fmt: skip


def _depths(decoder: Decoder, at: Sequence[int] | None) -> tuple[int, ...]:
    layers = decoder.dims.num_layers
    if at is None:
        return (*(decoder.layout.depths or range(1, layers)), layers)
    wrong = [depth for depth in at if not 1 <= depth <= layers]
    if wrong:
        raise ValueError(f"depths {wrong}: the model has {layers} layers; give depths in 1..{layers}")
    return (*sorted({int(depth) for depth in at} - {layers}), layers)


def _read_at(
    decoder: Decoder, streams: list[Tensor], following: Tensor, at: slice, top_k: int, full: bool
) -> tuple[Tensor, ...]:
    """Of some positions: logits [N, n, V] (or [N, n, 0]), ids and values [N, n, k], the next token's log-probabilities,
    entropies and divergences [N, n]."""
    targets, last = following[at], decoder.readout(streams[-1][at])
    columns: list[tuple[Tensor, ...]] = []
    for stream in streams:
        logits = last if stream is streams[-1] else decoder.readout(stream[at])
        ours = logits.log_softmax(dim=-1)
        best = ours.topk(top_k, dim=-1)
        said = log_prob(logits, targets.clamp(min=0)).masked_fill(targets < 0, float("nan"))
        cost = torch.zeros_like(said) if stream is streams[-1] else compare(last, logits).divergence
        stored = logits if full else logits[:, :0]
        columns.append((stored, best.indices, best.values, said, -(ours.exp() * ours).sum(-1), cost))
    return tuple(torch.stack(column) for column in zip(*columns, strict=True))
