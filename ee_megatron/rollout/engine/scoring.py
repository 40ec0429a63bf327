"""Reading finished answers again in parallel: traces for calibration, log-probabilities, divergence from the teacher.

Vocabulary-sized tensors exist only for a chunk of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...exits import gate_log_term
from ...types import Rollout, Trace
from .decoder import Decoder
from .prompts import pad
from .scheduler import Progress

# Positions per parallel forward (padding included) and bytes of one float32 logits chunk.
FORWARD_POSITIONS = 4096
LOGITS_BYTES = 1 << 25


@dataclass
class Score:
    """A rollout read again; T entries as in `Rollout`, float32, natural logs, temperature 1.

    - policy_logprobs: log π(token) at the rollout's own exits
    - exit_logprobs: log q(exit); 0 for entry 0 and without gates
    - teacher_logprobs, teacher_entropy: of the base model at full depth
    - divergence: KL(teacher ‖ policy at the rollout's own exits), nats
    """

    policy_logprobs: np.ndarray
    exit_logprobs: np.ndarray
    teacher_logprobs: np.ndarray
    teacher_entropy: np.ndarray
    divergence: np.ndarray


@dataclass
class Inspection:
    """What a rollout's gates and streams held at its own exits; T entries as in `Rollout`, M exits.

    - hazards float32 [T, M]: what gate i gave; NaN where it was not asked: behind the exit, at entry 0, without gates
    - divergences float32 [T, M]: KL(teacher at full depth ‖ policy's readout at exit i), nats, NaN where not asked
    - said int32 [T, M], said_logprobs float32 [T, M]: exit i's most probable token; -1 and NaN where not asked
    - teacher_said int32 [T], teacher_said_logprobs float32 [T]: the teacher's, at full depth
    - streams float16 [T, M+1, D] or None: the stream at each exit depth and at the end, over its root mean square
      (float16 couldn't hold some of the raw ones); frozen behind the exit
    """

    hazards: np.ndarray
    divergences: np.ndarray
    said: np.ndarray
    said_logprobs: np.ndarray
    teacher_said: np.ndarray
    teacher_said_logprobs: np.ndarray
    streams: np.ndarray | None


@torch.inference_mode()
def inspect(
    decoder: Decoder,
    policy: dict[str, Tensor] | None,
    rollouts: Sequence[Rollout],
    streams: bool = False,
    progress: Progress | None = None,
) -> list[Inspection]:
    """What exiting would have cost wherever a gate was asked, and what the gate said. Leaves the policy loaded."""
    plan = list(batches(rollouts, decoder.device))
    teacher, teacher_readout = _teacher_streams(decoder, policy, rollouts, plan)
    found: dict[int, Inspection] = {}
    for (indices, tokens, lengths), teacher_ND in zip(plan, teacher, strict=True):
        depths = replay_depths([rollouts[i] for i in indices], tokens.shape[1], decoder)
        where = [_predicting(rollouts[i]) for i in indices]
        hidden, residuals = decoder.forward_with_residuals(tokens, lengths, depths)
        exits_ND = [_pick(residual, where) for residual in residuals]
        taken = torch.cat([depths[b, w] for b, w in enumerate(where)])
        first = torch.cat([torch.arange(rollouts[i].length) == 0 for i in indices]).to(decoder.device)
        outcomes = torch.tensor(decoder.layout.depths, device=decoder.device)
        asked_NM = (taken[:, None] >= outcomes) & ~first[:, None]
        parts = [
            _inspect_chunk(decoder, teacher_readout(teacher_ND[at]), [s[at] for s in exits_ND], asked_NM[at])
            for at in _chunks(len(taken), decoder)
        ]
        columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
        kept = _scaled([*exits_ND, _pick(hidden, where)]) if streams else None
        start = 0
        for i in indices:
            span = slice(start, start + rollouts[i].length)
            hazards, costs, said, logprobs, theirs, their_logprobs = (column[span] for column in columns)
            held = None if kept is None else kept[span]
            found[i] = Inspection(hazards, costs, said, logprobs, theirs, their_logprobs, held)
            start = span.stop
        if progress:
            progress(len(found), len(rollouts))
    return [found[i] for i in range(len(rollouts))]


def _inspect_chunk(
    decoder: Decoder, teacher_logits: Tensor, exits_ND: list[Tensor], asked_NM: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Inspection` but the streams, for one chunk of positions; the exits are read where asked_NM is."""
    logp = teacher_logits.log_softmax(dim=-1)
    p = logp.exp()
    negative_entropy, best = (p * logp).sum(-1), logp.max(dim=-1)
    hazards, costs, logprobs = (torch.full(asked_NM.shape, float("nan"), device=decoder.device) for _ in range(3))
    said = torch.full(asked_NM.shape, -1, dtype=torch.int32, device=decoder.device)
    for i, stream in enumerate(exits_ND):
        at = asked_NM[:, i].nonzero().squeeze(-1)
        if not len(at):
            continue
        if decoder.gates is not None:
            hazards[at, i] = decoder.gate_logit(i, stream[at]).sigmoid()
        logits = decoder.readout(stream[at])
        costs[at, i] = divergence(p[at], negative_entropy[at], logits)
        top = logits.max(dim=-1)
        said[at, i], logprobs[at, i] = top.indices.int(), top.values - logits.logsumexp(-1)
    return hazards, costs, said, logprobs, best.indices.int(), best.values


def _scaled(streams_ND: list[Tensor]) -> np.ndarray:
    """S streams [N, D] -> float16 [N, S, D], each divided by its root mean square."""
    stacked = torch.stack(streams_ND, dim=1).float()
    scaled: np.ndarray = (stacked * stacked.pow(2).mean(-1, keepdim=True).rsqrt()).half().cpu().numpy()
    return scaled


@torch.inference_mode()
def trace(decoder: Decoder, rollouts: Sequence[Rollout], top_k: int, progress: Progress | None = None) -> list[Trace]:
    """Traces under the weights now loaded, at full depth; method.md, stage 1. `correct` is False: the caller judges.

    Raises ValueError unless 1 <= top_k <= V.
    """
    if not 1 <= top_k <= decoder.dims.vocab:
        raise ValueError(
            f"top_k {top_k} outside 1..{decoder.dims.vocab} (the vocabulary); choose how many tokens to keep"
        )
    traces: dict[int, Trace] = {}
    for indices, tokens, lengths in batches(rollouts, decoder.device):
        hidden, residuals = decoder.forward_with_residuals(tokens, lengths)
        where = [_predicting(rollouts[i]) for i in indices]
        final_ND = _pick(hidden, where)
        exits_ND = [_pick(residual, where) for residual in residuals]
        parts = [_trace_chunk(decoder, final_ND, exits_ND, at, top_k) for at in _chunks(len(final_ND), decoder)]
        joined = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
        start = 0
        for i in indices:
            stop = start + rollouts[i].length
            divergences, ids, logprobs, entropy = (column[start:stop] for column in joined)
            traces[i] = Trace(
                prompt_id=rollouts[i].prompt_id,
                prompt_tokens=rollouts[i].prompt_tokens,
                tokens=rollouts[i].tokens,
                divergences=divergences,
                topk_ids=ids,
                topk_logprobs=logprobs,
                entropy=entropy,
                correct=False,
                text=rollouts[i].text,
            )
            start = stop
        if progress:
            progress(len(traces), len(rollouts))
    return [traces[i] for i in range(len(rollouts))]


def _trace_chunk(
    decoder: Decoder, final_ND: Tensor, exits_ND: list[Tensor], at: slice, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Divergences [n, M], top-k ids int32 [n, k], their log-probabilities [n, k], entropy [n] of one chunk."""
    logp = decoder.readout(final_ND[at]).log_softmax(dim=-1)
    p = logp.exp()
    negative_entropy = (p * logp).sum(-1)
    divergences = torch.zeros(len(logp), len(exits_ND), device=logp.device)
    for i, stream in enumerate(exits_ND):
        divergences[:, i] = divergence(p, negative_entropy, decoder.readout(stream[at]))
    best = logp.topk(top_k, dim=-1)
    return divergences, best.indices.int(), best.values, -negative_entropy


def divergence(p: Tensor, negative_entropy: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ softmax(logits)) >= 0: sum p log p - sum p·logits + logsumexp(logits); p, logits [n, V] -> [n]."""
    cross = torch.einsum("nv,nv->n", p, logits)
    return (negative_entropy - cross + logits.logsumexp(-1)).clamp(min=0)


@torch.inference_mode()
def score(
    decoder: Decoder, policy: dict[str, Tensor] | None, rollouts: Sequence[Rollout], progress: Progress | None = None
) -> list[Score]:
    """Score rollouts under a policy (None: the teacher itself) and the teacher. Leaves the policy loaded.

    The teacher's streams at the predicting positions are kept, then the policy is loaded: one replica serves both.
    Under full fine-tuning the teacher is read from disk again and its head is kept as well until all is scored.
    """
    plan = list(batches(rollouts, decoder.device))
    teacher, teacher_readout = _teacher_streams(decoder, policy, rollouts, plan)
    scores: dict[int, Score] = {}
    for (indices, tokens, lengths), teacher_ND in zip(plan, teacher, strict=True):
        depths = replay_depths([rollouts[i] for i in indices], tokens.shape[1], decoder)
        where = [_predicting(rollouts[i]) for i in indices]
        hidden, residuals = decoder.forward_with_residuals(tokens, lengths, depths)
        policy_ND, taken = _pick(hidden, where), torch.cat([depths[b, w] for b, w in enumerate(where)])
        exits = _exit_logprobs(decoder, [_pick(r, where) for r in residuals], taken)
        targets = torch.cat([torch.as_tensor(rollouts[i].tokens) for i in indices]).to(decoder.device)
        parts = [
            _score_chunk(decoder.readout(policy_ND[at]), teacher_readout(teacher_ND[at]), targets[at])
            for at in _chunks(len(taken), decoder)
        ]
        ours, theirs, entropy, kl = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        start = 0
        for i in indices:
            at = slice(start, start + rollouts[i].length)
            first = exits[at].cpu().numpy().copy()
            first[:1] = 0.0
            scores[i] = Score(ours[at], first, theirs[at], entropy[at], kl[at])
            start = at.stop
        if progress:
            progress(len(scores), len(rollouts))
    return [scores[i] for i in range(len(rollouts))]


def _teacher_streams(
    decoder: Decoder,
    policy: dict[str, Tensor] | None,
    rollouts: Sequence[Rollout],
    plan: Sequence[tuple[list[int], Tensor, Tensor]],
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """The teacher's streams [N, D] at the predicting positions of each batch, and its readout; then the policy's
    weights are loaded again."""
    streams: list[Tensor] = []
    try:
        decoder.load_policy(None)
        for indices, tokens, lengths in plan:
            where = [_predicting(rollouts[i]) for i in indices]
            streams.append(_pick(decoder.forward_parallel(tokens, lengths), where))
        return streams, decoder.current_readout()
    finally:
        decoder.load_policy(policy)


def _score_chunk(logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """log π(target), log π_teacher(target), the teacher's entropy and KL(teacher ‖ policy), each [n]."""
    logp = teacher_logits.log_softmax(dim=-1)
    p = logp.exp()
    negative_entropy = (p * logp).sum(-1)
    ours = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return (
        ours,
        logp.gather(-1, targets[:, None]).squeeze(-1),
        -negative_entropy,
        divergence(p, negative_entropy, logits),
    )


def _exit_logprobs(decoder: Decoder, residuals_ND: list[Tensor], taken: Tensor) -> Tensor:
    """log q(taken depth) float32 [N] from the streams at the exits; zeros without gates."""
    total = torch.zeros(len(taken), device=decoder.device)
    if decoder.gates is not None:
        for i, (depth, stream) in enumerate(zip(decoder.layout.depths, residuals_ND, strict=True)):
            total += gate_log_term(decoder.gate_logit(i, stream), taken, depth)
    return total


def replay_depths(rollouts: Sequence[Rollout], width: int, decoder: Decoder) -> Tensor:
    """Recorded exits as depths int64 [B, width] per position; L for prompts, padding and the unread last token."""
    depths = torch.full((len(rollouts), width), decoder.dims.num_layers, dtype=torch.int64)
    for b, rollout in enumerate(rollouts):
        depths[b, _predicting(rollout)] = torch.tensor(rollout.exit_depths, dtype=torch.int64)
    return depths.to(decoder.device)


def batches(rollouts: Sequence[Rollout], device: torch.device) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Rollouts of like length together: (their indices, tokens int64 [B, T], lengths [B]) with B·T bounded."""
    sizes = [len(r.prompt_tokens) + r.length for r in rollouts]
    order = sorted((i for i, r in enumerate(rollouts) if r.length), key=lambda i: -sizes[i])
    if len(order) < len(rollouts):
        raise ValueError(f"{len(rollouts) - len(order)} rollouts have no generated token; expected at least one each")
    while order:
        count = max(1, FORWARD_POSITIONS // sizes[order[0]])
        chosen, order = order[:count], order[count:]
        sequences = [np.concatenate([rollouts[i].prompt_tokens, rollouts[i].tokens]) for i in chosen]
        yield chosen, *pad(sequences, device)


def _predicting(rollout: Rollout) -> slice:
    """The positions that predict the generated tokens: the prompt's last up to the last but one of the sequence."""
    start = len(rollout.prompt_tokens) - 1
    return slice(start, start + rollout.length)


def _pick(stream_BTD: Tensor, where: list[slice]) -> Tensor:
    return torch.cat([stream_BTD[b, at] for b, at in enumerate(where)])


def _chunks(count: int, decoder: Decoder) -> list[slice]:
    size = max(1, LOGITS_BYTES // (4 * decoder.dims.vocab))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
