"""The logit lens (nostalgebraist 2020): what the readout at every exit would write, also behind the one that was taken.

Behind it there is nothing to read in the run itself, since the stream is frozen. So a token's position is read again
and goes on to the end, alone: the positions before it keep their own exits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...types import Rollout
from .decoder import Decoder, Prefilled
from .prompts import pad
from .scoring import FORWARD_POSITIONS, LOGITS_BYTES


@dataclass
class Lens:
    """Readouts at the last R - A positions of the prompt before its end, then at those that predict the answer's first
    A tokens. M exits, k tokens of each readout, the most probable first; natural logs.

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
    """Read the last `prompt` positions of each prompt and the first `answer` tokens of each answer. Leaves the policy
    loaded. An answer costs about answer² / 2 positions more than reading it does.

    Raises ValueError for a rollout without a token.
    """
    if any(not rollout.length for rollout in rollouts):
        raise ValueError("an answer without a token has nothing to look at; leave it out")
    try:
        decoder.load_policy(None)
        teacher = [_teacher(decoder, rollout, top_k, prompt, answer) for rollout in rollouts]
    finally:
        decoder.load_policy(policy)
    return [_read(decoder, r, top_k, prompt, answer, theirs) for r, theirs in zip(rollouts, teacher, strict=True)]


def _rows(rollout: Rollout, prompt: int, answer: int) -> tuple[int, int, int]:
    """(first position read, that of the prompt's last token, one behind the last position read)."""
    last = len(rollout.prompt_tokens) - 1
    return max(0, last - prompt), last, last + min(answer, rollout.length)


def _teacher(decoder: Decoder, rollout: Rollout, top_k: int, prompt: int, answer: int) -> tuple[np.ndarray, np.ndarray]:
    start, _, end = _rows(rollout, prompt, answer)
    tokens = _tensor(decoder, np.concatenate([rollout.prompt_tokens, rollout.tokens])[:end])
    stream = decoder.forward_parallel(tokens[None], torch.tensor([end]))
    ids, logprobs = _top(decoder, stream[0, start:end], top_k)
    return ids.cpu().numpy(), logprobs.cpu().numpy()


def _read(
    decoder: Decoder, rollout: Rollout, top_k: int, prompt: int, answer: int, teacher: tuple[np.ndarray, np.ndarray]
) -> Lens:
    start, last, end = _rows(rollout, prompt, answer)
    whole = np.concatenate([rollout.prompt_tokens, rollout.tokens])
    streams = [_of_answer(decoder, rollout, end - last)]
    if start < last:
        head = _tensor(decoder, rollout.prompt_tokens[:last])[None]
        final, exits = decoder.forward_with_residuals(head, torch.tensor([last]))
        streams.insert(0, torch.stack([s[0, start:last] for s in (*exits, final)], dim=1))
    found = _top(decoder, torch.cat(streams), top_k)
    taken = np.concatenate([np.full(last - start, decoder.dims.num_layers), rollout.exit_depths[: end - last]])
    ids, logprobs = (part.cpu().numpy() for part in found)
    return Lens(whole[start + 1 : end + 1], taken.astype(np.int32), ids, logprobs, *teacher, last - start)


def _of_answer(decoder: Decoder, rollout: Rollout, count: int) -> Tensor:
    """Streams [count, M+1, D] of the positions that predict the first `count` tokens, each at every exit and the end,
    under the exits of those before it."""
    layers, context = decoder.dims.num_layers, rollout.prompt_tokens[:-1]
    prefix: Prefilled | None = None
    if len(context):
        (prefix,) = decoder.prefill(_tensor(decoder, context)[None], torch.tensor([len(context)]))
    begun = np.concatenate([rollout.prompt_tokens[-1:], rollout.tokens])
    size, found = max(1, FORWARD_POSITIONS // (count + len(context))), []
    for first in range(0, count, size):
        chosen = range(first, min(first + size, count))
        tokens, lengths = pad([begun[: t + 1] for t in chosen], decoder.device)
        depths = torch.full(tokens.shape, layers, dtype=torch.int64)
        for row, t in enumerate(chosen):
            depths[row, :t] = torch.as_tensor(rollout.exit_depths[:t], dtype=torch.int64)
        depths = depths.to(decoder.device)
        final, exits = decoder.forward_with_residuals(tokens, lengths, depths, prefix)
        rows = torch.arange(len(chosen), device=decoder.device)
        ends = torch.tensor([int(n) - 1 for n in lengths], device=decoder.device)
        found.append(torch.stack([stream[rows, ends] for stream in (*exits, final)], dim=1))
    return torch.cat(found)


def _top(decoder: Decoder, streams: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Streams [N, ..., D] -> ids int32 and log-probabilities float32 [N, ..., k] of the most probable tokens."""
    flat = streams.reshape(-1, streams.shape[-1])
    size, ids, logprobs = max(1, LOGITS_BYTES // (4 * decoder.dims.vocab)), [], []
    for part in flat.split(size):
        best = decoder.readout(part).log_softmax(dim=-1).topk(top_k, dim=-1)
        ids.append(best.indices.int())
        logprobs.append(best.values)
    shape = (*streams.shape[:-1], top_k)
    return torch.cat(ids).reshape(shape), torch.cat(logprobs).reshape(shape)


def _tensor(decoder: Decoder, tokens: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(tokens), dtype=torch.int64, device=decoder.device)
