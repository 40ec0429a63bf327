"""Scores finished answers in parallel: traces for calibration, log-probabilities, divergence from the teacher.

What several answers share of a prompt is read once. Vocabulary-sized tensors exist for a chunk of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...exits import gate_log_term
from ...kernels import compiled
from ...tensors import to_device, to_host
from ...types import ExitReading, Rollout, Trace
from .cache import Prefilled
from .decoder import Decoder
from .prompts import pad
from .request import Progress
from .sampling import SamplingParams, TopLogprobs, log_prob, most_probable

# Positions per parallel forward (padding included) and bytes of one float32 logits chunk.
FORWARD_POSITIONS = 4096
LOGITS_BYTES = 1 << 25
# Prompts are read apart from their answers where that saves this part of the positions: answers then attend to them
# under a mask.
SHARED_FROM = 1 / 8
# What a pass costs whatever it reads, in positions: weights are read, kernels started. 60 were measured on a CPU with
# AMX (SmolLM2-135M, bfloat16, a thread); by count an H100 does some 300 positions while it reads the weights.
PASS_POSITIONS = 128


class Comparison(NamedTuple):
    """Comparison of n pairs of distributions p and q, float32 [n] each, natural logs: KL(p ‖ q) in nats, log sum exp of
    either's logits, the entropy of p in nats."""

    divergence: Tensor
    normaliser: Tensor
    other_normaliser: Tensor
    entropy: Tensor


def compare(logits: Tensor, others: Tensor) -> Comparison:
    """Compare softmax(logits) and softmax(others), float32 [n, V], by rows. -inf where a token has no probability."""
    library = compiled.library(torch.float32) if logits.device.type == "cpu" else None
    if library is not None:
        logits, others, figures = logits.contiguous(), others.contiguous(), torch.empty(len(logits), 4)
        library.compare(logits.data_ptr(), others.data_ptr(), figures.data_ptr(), *map(int, logits.shape))
        return Comparison(*figures.unbind(1))
    normaliser, other = logits.logsumexp(-1), others.logsumexp(-1)
    logp = logits - normaliser[:, None]
    p = logp.exp()
    divergence = torch.where(p > 0, p * (logp - (others - other[:, None])), 0.0).sum(-1).clamp(min=0)
    return Comparison(divergence, normaliser, other, -torch.where(p > 0, p * logp, 0.0).sum(-1))


@dataclass
class Score:
    """Scores of a rollout; T entries as in `Rollout`, float32, natural logs, temperature 1.

    - policy_logprobs: log π(token) at the rollout's own exits
    - exit_logprobs: log q(exit); 0 where no gate ran: at entry 0 unless the first token may exit, without gates
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
    """Gate hazards and divergences of a rollout at its own exits; T entries as in `Rollout`, M exits.

    - score: of the same rollout, as `score` gives it
    - hazards float32 [T, M]: what gate i gave; NaN where it didn't run: behind the exit, without gates, at entry 0
      unless the first token may exit
    - divergences float32 [T, M]: KL(teacher at full depth ‖ policy's readout at exit i), nats; NaN if not reached
    - said int32 [T, M], said_logprobs float32 [T, M]: exit i's most probable token; -1 and NaN if not reached
    - teacher_said int32 [T], teacher_said_logprobs float32 [T]: the teacher's, at full depth
    - streams float16 [T, M+1, D] or None: the stream at each exit depth and at the end, over its root mean square
      (float16 couldn't hold some of the raw ones); frozen behind the exit
    """

    score: Score
    hazards: np.ndarray
    divergences: np.ndarray
    said: np.ndarray
    said_logprobs: np.ndarray
    teacher_said: np.ndarray
    teacher_said_logprobs: np.ndarray
    streams: np.ndarray | None = None


class PromptScore(NamedTuple):
    """Scores of a prompt of T tokens: T - 1 entries, for its second token on. Natural logs, temperature 1.

    - logprobs: log π(token | the tokens before it)
    - ranks: how many tokens are at least as probable, itself included
    - top: the most probable tokens in its place, as many as were wanted, most probable first
    """

    logprobs: list[float]
    ranks: list[int]
    top: list[TopLogprobs]


@torch.inference_mode()
def score_prompts(
    decoder: Decoder, prompts: Sequence[Sequence[int]], counts: Sequence[int], logits_bytes: int = LOGITS_BYTES
) -> list[PromptScore]:
    """Score prompts [B] of token ids, none empty, together under the loaded weights; `counts[b]`: how many of the most
    probable tokens to return.

    Prompt positions never exit (method.md), so these are at full depth, whatever a request's exit rule is.
    """
    tokens, lengths = pad(prompts, decoder.device)
    stream = decoder.forward_parallel(tokens, lengths)
    scores = []
    for b, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        score = PromptScore([], [], [])
        for at in chunks(decoder, len(prompt) - 1, logits_bytes):
            logits, chosen = decoder.readout(stream[b, at]), tokens[b, 1:][at]
            ranks = (logits >= logits.gather(-1, chosen[:, None])).sum(-1)
            logprobs, ranks = to_host(log_prob(logits, chosen), ranks)
            score.logprobs.extend(logprobs.tolist())
            score.ranks.extend(ranks.tolist())
            score.top.extend(most_probable(logits, SamplingParams(), [count] * len(logits)))
        scores.append(score)
    return scores


def chunks(decoder: Decoder, count: int, logits_bytes: int | None = None) -> Iterator[slice]:
    """Split `count` positions into chunks whose logits take `logits_bytes` (None: LOGITS_BYTES)."""
    size = max(1, (logits_bytes or LOGITS_BYTES) // (4 * decoder.dims.vocab))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


Columns = dict[str, Tensor]
"""Field name -> values [n, ...] of n positions."""


@dataclass
class _Batch:
    """Rollouts scored together: inputs at the N positions that predict their tokens.

    tokens, taken, gate_mask [N]: the tokens, the depths at which they were made, whether they might exit;
    final [N, D], exits M x [N, D]: streams; teacher [N, D]: its final stream, `final` itself where the model is the
    teacher at full depth, and its readout.
    """

    tokens: Tensor
    taken: Tensor
    gate_mask: Tensor
    final: Tensor
    exits: list[Tensor]
    teacher: Tensor
    teacher_readout: Callable[[Tensor], Tensor]


Chunk = Callable[[_Batch, slice], Columns]
"""A record's fields for some of a batch's positions."""


@torch.inference_mode()
def score(
    decoder: Decoder, policy: dict[str, Tensor] | None, rollouts: Sequence[Rollout], progress: Progress | None = None
) -> list[Score]:
    """Score rollouts under a policy (None: the teacher itself) and the teacher. The policy stays loaded.

    The teacher's streams at the predicting positions are stored, then the policy is loaded: one replica serves both.
    Under full fine-tuning the teacher is read from disk again and its head is stored as well until all is scored.
    """
    teacher = _teacher(decoder, policy, rollouts)
    read = _read(decoder, rollouts, partial(_score_chunk, decoder), progress, teacher)
    return [Score(**columns) for columns in read]


@torch.inference_mode()
def inspect(
    decoder: Decoder,
    policy: dict[str, Tensor] | None,
    rollouts: Sequence[Rollout],
    streams: bool = False,
    progress: Progress | None = None,
) -> list[Inspection]:
    """Cost of exiting at each exit that a token reached, and its gate's hazard. The policy stays loaded."""
    teacher = _teacher(decoder, policy, rollouts)
    read = _read(decoder, rollouts, lambda part, at: _inspect_chunk(decoder, part, at, streams), progress, teacher)
    scores = [Score(**{field.name: columns.pop(field.name) for field in fields(Score)}) for columns in read]
    return [Inspection(score, **columns) for score, columns in zip(scores, read, strict=True)]


@torch.inference_mode()
def read_exits(
    decoder: Decoder,
    policy: dict[str, Tensor] | None,
    rollouts: Sequence[Rollout],
    progress: Progress | None = None,
) -> list[ExitReading]:
    """Divergence from the teacher and gate hazards at every exit that the tokens reached. The policy stays loaded."""
    teacher = _teacher(decoder, policy, rollouts)
    read = _read(decoder, rollouts, partial(_exits_chunk, decoder), progress, teacher)
    return [ExitReading(**columns) for columns in read]


@torch.inference_mode()
def trace(decoder: Decoder, rollouts: Sequence[Rollout], top_k: int, progress: Progress | None = None) -> list[Trace]:
    """Traces under the loaded weights, at full depth; method.md, stage 1. `correct` is False: the caller judges.

    Raises ValueError unless 1 <= top_k <= V.
    """
    if not 1 <= top_k <= decoder.dims.vocab:
        raise ValueError(
            f"top_k {top_k} outside 1..{decoder.dims.vocab} (the vocabulary); choose how many tokens to keep"
        )
    read = _read(decoder, rollouts, lambda part, at: _trace_chunk(decoder, part, at, top_k), progress)
    return [
        Trace(
            prompt_id=r.prompt_id, prompt_tokens=r.prompt_tokens, tokens=r.tokens, correct=False, text=r.text, **columns
        )
        for r, columns in zip(rollouts, read, strict=True)
    ]


def _score_chunk(decoder: Decoder, batch: _Batch, at: slice) -> Columns:
    """The fields of `Score`."""
    return _scores(decoder, batch, at, batch.teacher_readout(batch.teacher[at]))[0]


def _scores(decoder: Decoder, batch: _Batch, at: slice, theirs: Tensor) -> tuple[Columns, Comparison]:
    """The fields of `Score`, and the comparison behind them; theirs [n, V]: the teacher's logits."""
    # The teacher's own answers need no second readout.
    logits = theirs if batch.teacher is batch.final else decoder.readout(batch.final[at])
    compared, targets = compare(theirs, logits), batch.tokens[at][:, None]
    exit_logprobs = torch.zeros(len(theirs), device=decoder.device)
    if decoder.gates is not None:
        for i, (depth, stream) in enumerate(zip(decoder.layout.depths, batch.exits, strict=True)):
            exit_logprobs += gate_log_term(decoder.gate_logit(i, stream[at]), batch.taken[at], depth)
    return {
        "policy_logprobs": logits.gather(-1, targets).squeeze(-1) - compared.other_normaliser,
        "exit_logprobs": exit_logprobs.where(batch.gate_mask[at], 0.0),
        "teacher_logprobs": theirs.gather(-1, targets).squeeze(-1) - compared.normaliser,
        "teacher_entropy": compared.entropy,
        "divergence": compared.divergence,
    }, compared


def _inspect_chunk(decoder: Decoder, batch: _Batch, at: slice, streams: bool) -> Columns:
    """The fields of `Score`, then the others of `Inspection`; the exits are read where they were reached."""
    theirs = batch.teacher_readout(batch.teacher[at])
    (scores, compared), best = _scores(decoder, batch, at, theirs), theirs.max(dim=-1)
    shape = len(theirs), len(batch.exits)
    hazards, costs, logprobs = (torch.full(shape, float("nan"), device=decoder.device) for _ in range(3))
    said = torch.full(shape, -1, dtype=torch.int32, device=decoder.device)
    for i, (depth, stream) in enumerate(zip(decoder.layout.depths, batch.exits, strict=True)):
        reached = _passed(batch, at, depth)
        if not len(reached):
            continue
        hidden = stream[at][reached]
        if decoder.gates is not None:
            hazards[reached, i] = decoder.gate_logit(i, hidden).sigmoid()
        logits = decoder.readout(hidden)
        against, top = compare(theirs[reached], logits), logits.max(dim=-1)
        costs[reached, i] = against.divergence
        said[reached, i], logprobs[reached, i] = top.indices.int(), top.values - against.other_normaliser
    columns = {
        **scores, "hazards": hazards, "divergences": costs, "said": said, "said_logprobs": logprobs,
        "teacher_said": best.indices.int(), "teacher_said_logprobs": best.values - compared.normaliser,
    }  # fmt: skip
    if streams:
        stacked = torch.stack([stream[at] for stream in (*batch.exits, batch.final)], dim=1).float()
        columns["streams"] = (stacked * stacked.pow(2).mean(-1, keepdim=True).rsqrt()).half()
    return columns


def _exits_chunk(decoder: Decoder, batch: _Batch, at: slice) -> Columns:
    """The fields of `ExitReading`."""
    theirs, exits = batch.teacher_readout(batch.teacher[at]), len(batch.exits)
    divergences, hazards = (
        torch.full((len(theirs), columns), float("nan"), device=decoder.device) for columns in (exits + 1, exits)
    )
    for i, (depth, stream) in enumerate(zip(decoder.layout.outcomes, (*batch.exits, batch.final), strict=True)):
        passed = _passed(batch, at, depth)
        if not len(passed):
            continue
        hidden = stream[at][passed]
        divergences[passed, i] = compare(decoder.readout(hidden), theirs[passed]).divergence
        if i < exits and decoder.gates is not None:
            hazards[passed, i] = decoder.gate_logit(i, hidden).sigmoid()
    return {"divergences": divergences, "hazards": hazards}


def _passed(batch: _Batch, at: slice, depth: int) -> Tensor:
    """Which of these positions reached an exit, taken or not: int64 [*]."""
    return ((batch.taken[at] >= depth) & batch.gate_mask[at]).nonzero().squeeze(-1)


def _trace_chunk(decoder: Decoder, batch: _Batch, at: slice, top_k: int) -> Columns:
    theirs = batch.teacher_readout(batch.teacher[at])
    own, best = compare(theirs, theirs), theirs.topk(top_k, dim=-1)
    costs = [compare(theirs, decoder.readout(stream[at])).divergence for stream in batch.exits]
    return {
        "divergences": torch.stack(costs, dim=1) if costs else theirs.new_zeros(len(theirs), 0),
        "topk_ids": best.indices.int(),
        "topk_logprobs": best.values - own.normaliser[:, None],
        "entropy": own.entropy,
    }


@dataclass
class _Part:
    """Rollouts that are read together: their indices, and tokens int64 [B, T], lengths [B] behind the first `shared`
    tokens, which were `read` before; [] where there are none."""

    indices: list[int]
    rollouts: list[Rollout]
    tokens: Tensor
    lengths: Tensor
    shared: int
    read: list[Prefilled]

    def pick(self, stream_BT: Tensor) -> Tensor:
        """[B, T, ...] at the positions that predict generated tokens, [N, ...]."""
        return torch.cat([stream_BT[b, _predicting(r, self.shared)] for b, r in enumerate(self.rollouts)])


def _read(
    decoder: Decoder,
    rollouts: Sequence[Rollout],
    chunk: Chunk,
    progress: Progress | None,
    teacher: tuple[list[Tensor], Callable[[Tensor], Tensor]] | None = None,
) -> list[dict[str, np.ndarray]]:
    """Each rollout's part of the columns [n, ...] that `chunk` computes for some of a batch's positions.

    Rollouts are read at their own exits where there is a `teacher` (its streams and readout), else at full depth.
    """
    results: dict[int, dict[str, np.ndarray]] = {}
    device = decoder.device
    for number, part in enumerate(_parts(decoder, rollouts)):
        depths = replay_depths(part.rollouts, part.tokens.shape[1], decoder, part.shared)
        final, exits = decoder.forward_with_residuals(part.tokens, part.lengths, depths if teacher else None, part.read)
        final, exits = part.pick(final), [part.pick(stream) for stream in exits]
        tokens = torch.cat([torch.as_tensor(r.tokens) for r in part.rollouts])
        gate_mask = torch.cat([(torch.arange(r.length) > 0) | decoder.layout.first_token for r in part.rollouts])
        tokens, gate_mask = to_device((tokens, gate_mask), device)
        theirs, readout = (teacher[0][number], teacher[1]) if teacher else (final, decoder.readout)
        batch = _Batch(tokens, part.pick(depths), gate_mask, final, exits, theirs, readout)
        parts = [chunk(batch, at) for at in chunks(decoder, len(tokens))]
        whole = to_host(*(torch.cat([one[name] for one in parts]) for name in parts[0]))
        columns, start = {name: column.numpy() for name, column in zip(parts[0], whole, strict=True)}, 0
        for i, rollout in zip(part.indices, part.rollouts, strict=True):
            # Copies, for what they are copied from is pinned.
            results[i] = {name: column[start : start + rollout.length].copy() for name, column in columns.items()}
            start += rollout.length
        if progress:
            progress(len(results), len(rollouts))
    return [results[i] for i in range(len(rollouts))]


def _teacher(
    decoder: Decoder, policy: dict[str, Tensor] | None, rollouts: Sequence[Rollout]
) -> tuple[list[Tensor], Callable[[Tensor], Tensor]] | None:
    """The teacher's streams [N, D] at the predicting positions of each part, and its readout; None where the rollouts
    are its own at full depth, which are read once. Then the policy's weights are loaded."""
    own = policy is None and all(np.all(rollout.exit_depths == decoder.dims.num_layers) for rollout in rollouts)
    try:
        decoder.load_policy(None)
        if own:
            return None
        streams = [
            part.pick(decoder.forward_parallel(part.tokens, part.lengths, prefix=part.read))
            for part in _parts(decoder, rollouts)
        ]
        return streams, decoder.current_readout()
    finally:
        if policy is not None:
            decoder.load_policy(policy)


def replay_depths(rollouts: Sequence[Rollout], width: int, decoder: Decoder, shared: int = 0) -> Tensor:
    """Recorded exits as depths int64 [B, width] per position behind the first `shared`; L for prompts, padding and the
    unread last token."""
    depths = torch.full((len(rollouts), width), decoder.dims.num_layers, dtype=torch.int64)
    for b, rollout in enumerate(rollouts):
        depths[b, _predicting(rollout, shared)] = torch.tensor(rollout.exit_depths, dtype=torch.int64)
    return to_device(depths, decoder.device)


def _predicting(rollout: Rollout, shared: int) -> slice:
    """The positions, behind the first `shared`, that predict the generated tokens: the prompt's last up to the last but
    one of the sequence."""
    start = _begun(rollout) - shared
    return slice(start, start + rollout.length)


def _begun(rollout: Rollout) -> int:
    """Positions that the answers to a prompt can share: all of it but its last token, whose position predicts."""
    return len(rollout.prompt_tokens) - 1


def _parts(decoder: Decoder, rollouts: Sequence[Rollout]) -> Iterator[_Part]:
    """All rollouts, some at a time, each time the same, what several share of a prompt read before by the weights now
    loaded. B·(shared + T) is bounded."""
    if empty := sum(not r.length for r in rollouts):
        raise ValueError(f"{empty} rollouts have no generated token; expected at least one each")
    by_prompt: dict[bytes, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        by_prompt.setdefault(np.asarray(rollout.prompt_tokens, dtype=np.int64).tobytes(), []).append(i)
    alone: list[int] = []
    for bunch in _bunches(rollouts, by_prompt.values()):
        owner = {i: number for number, group in enumerate(bunch) for i in group}
        shared = _begun(rollouts[bunch[0][0]])
        positions = sum(len(rollouts[i].prompt_tokens) + rollouts[i].length for i in owner)
        if (len(owner) - len(bunch)) * shared < max(PASS_POSITIONS, SHARED_FROM * positions):
            alone += owner
            continue
        heads, lengths = pad([rollouts[group[0]].prompt_tokens[:shared] for group in bunch], decoder.device)
        read = decoder.prefill(heads, lengths)
        yield from _of_like_length(decoder, rollouts, {i: read[owner[i]] for i in sorted(owner)}, shared)
    yield from _of_like_length(decoder, rollouts, dict.fromkeys(sorted(alone)), 0)


def _bunches(rollouts: Sequence[Rollout], groups: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """Answers by prompt, prompts of like length next to each other and the shortest first: as far as that goes, all are
    read together, and what the others have beyond it with each of their answers. A bunch ends where this would cost
    more than the two passes that another takes, or where its beginnings fill one."""
    bunch: list[list[int]] = []
    shortest, beyond = 0, 0
    for group in sorted(groups, key=lambda group: _begun(rollouts[group[0]])):
        own = _begun(rollouts[group[0]])
        beyond += (len(group) - 1) * (own - shortest)
        if bunch and (beyond > 2 * PASS_POSITIONS or (len(bunch) + 1) * shortest > FORWARD_POSITIONS):
            yield bunch
            bunch = []
        if not bunch:
            shortest, beyond = own, 0
        bunch.append(group)
    if bunch:
        yield bunch


def _of_like_length(
    decoder: Decoder, rollouts: Sequence[Rollout], read: dict[int, Prefilled] | dict[int, None], shared: int
) -> Iterator[_Part]:
    """The rollouts of these indices, the longest first, with their scored parts."""
    sizes = {i: len(rollouts[i].prompt_tokens) + rollouts[i].length for i in read}
    order = sorted(read, key=lambda i: -sizes[i])
    while order:
        count = max(1, FORWARD_POSITIONS // sizes[order[0]])
        indices, order = order[:count], order[count:]
        chosen = [rollouts[i] for i in indices]
        sequences = [np.concatenate([r.prompt_tokens, r.tokens])[shared:] for r in chosen]
        before = [one for i in indices if (one := read[i]) is not None]
        yield _Part(indices, chosen, *pad(sequences, decoder.device), shared, before)
