"""The logit lens (nostalgebraist 2020): predictions of the readout at every exit, also behind the one that was taken.

Behind it the run itself has no predictions, since the stream is frozen. So a token's position is run again to the end,
alone: the positions before it keep their own exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...types import Rollout
from .cache import Prefilled
from .decoder import Decoder
from .prompts import pad
from .scoring import FORWARD_POSITIONS, chunks


@dataclass
class Lens:
    """Predictions at the last R - A positions of the prompt before its end, then at those that predict the answer's
    first A tokens. M exits, k tokens of each readout, the most probable first; natural logs.

    - following int64 [R]: the token that came after the position, in the prompt or written
    - taken int32 [R]: the depth at which the position left in the run; L in the prompt
    - ids int32 [R, M+1, k], logprobs float32 [R, M+1, k]: at each exit, and at the end
    - teacher_ids int32 [R, k], teacher_logprobs float32 [R, k]: the base model's, at full depth
    - given: R - A, how many rows are the prompt's
    """

    following: np.ndarray
    taken: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    teacher_ids: np.ndarray
    teacher_logprobs: np.ndarray
    given: int


@torch.inference_mode()
def lens(
    decoder: Decoder,
    policy: dict[str, Tensor] | None,
    rollouts: Sequence[Rollout],
    top_k: int,
    prompt: int,
    answer: int,
) -> list[Lens]:
    """Compute the lens at the last `prompt` positions of each prompt and the first `answer` tokens of each answer. The
    policy stays loaded. An answer costs about answer² / 2 positions more than a single pass over it.

    Raises ValueError for a rollout without a token.
    """
    if any(not rollout.length for rollout in rollouts):
        raise ValueError("an answer without tokens has no lens; leave it out")
    # The first position read, that of the prompt's last token, one behind the last position read.
    lasts = [len(r.prompt_tokens) - 1 for r in rollouts]
    windows = [
        (max(0, last - prompt), last, last + min(answer, r.length)) for r, last in zip(rollouts, lasts, strict=True)
    ]
    teacher = []
    try:
        decoder.load_policy(None)
        for rollout, (start, _, end) in zip(rollouts, windows, strict=True):
            stream = decoder.forward_parallel(_tensor(decoder, _whole(rollout)[:end])[None], torch.tensor([end]))
            teacher.append(_top(decoder, stream[0, start:end], top_k))
    finally:
        decoder.load_policy(policy)
    lenses = []
    for rollout, (start, last, end), theirs in zip(rollouts, windows, teacher, strict=True):
        streams = [_of_answer(decoder, rollout, end - last)]
        if start < last:
            head = _tensor(decoder, rollout.prompt_tokens[:last])[None]
            final, exits = decoder.forward_with_residuals(head, torch.tensor([last]))
            streams.insert(0, torch.stack([s[0, start:last] for s in (*exits, final)], dim=1))
        taken = np.concatenate([np.full(last - start, decoder.dims.num_layers), rollout.exit_depths[: end - last]])
        ours = _top(decoder, torch.cat(streams), top_k)
        lenses.append(Lens(_whole(rollout)[start + 1 : end + 1], taken.astype(np.int32), *ours, *theirs, last - start))
    return lenses


def _of_answer(decoder: Decoder, rollout: Rollout, count: int) -> Tensor:
    """Streams [count, M+1, D] of the positions that predict the first `count` tokens, each at every exit and the end,
    under the exits of those before it."""
    context = rollout.prompt_tokens[:-1]
    prefix: Prefilled | None = None
    if len(context):
        (prefix,) = decoder.prefill(_tensor(decoder, context)[None], torch.tensor([len(context)]))
    begun = np.concatenate([rollout.prompt_tokens[-1:], rollout.tokens])
    size, streams = max(1, FORWARD_POSITIONS // (count + len(context))), []
    for first in range(0, count, size):
        chosen = range(first, min(first + size, count))
        tokens, lengths = pad([begun[: t + 1] for t in chosen], decoder.device)
        depths = torch.full(tokens.shape, decoder.dims.num_layers, dtype=torch.int64)
        for row, t in enumerate(chosen):
            depths[row, :t] = torch.as_tensor(rollout.exit_depths[:t], dtype=torch.int64)
        final, exits = decoder.forward_with_residuals(tokens, lengths, depths, prefix)
        rows, ends = torch.arange(len(chosen), device=decoder.device), (lengths - 1).to(decoder.device)
        streams.append(torch.stack([stream[rows, ends] for stream in (*exits, final)], dim=1))
    return torch.cat(streams)


def _top(decoder: Decoder, streams: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Streams [N, ..., D] -> ids int32 and log-probabilities float32 [N, ..., k] of the most probable tokens."""
    flat = streams.reshape(-1, streams.shape[-1])
    parts = [decoder.readout(flat[at]).log_softmax(dim=-1).topk(top_k, dim=-1) for at in chunks(decoder, len(flat))]
    shape = (*streams.shape[:-1], top_k)
    logprobs, ids = (torch.cat(column).reshape(shape).cpu().numpy() for column in zip(*parts, strict=True))
    return ids.astype(np.int32), logprobs


def _whole(rollout: Rollout) -> np.ndarray:
    return np.concatenate([rollout.prompt_tokens, rollout.tokens])


def _tensor(decoder: Decoder, tokens: np.ndarray) -> Tensor:
    return torch.as_tensor(tokens, dtype=torch.int64, device=decoder.device)
