"""Token sampling, with random numbers that do not depend on batching."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ...kernels import compiled
from ...tensors import to_device, to_host

# How many of the most probable tokens are sorted to find a nucleus; a flat distribution takes a whole sort.
NUCLEUS = 512


# (token, log-probability), the most probable first.
TopLogprobs = tuple[tuple[int, float], ...]
# Token ids of a row's prompt and of its answer so far.
History = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class SamplingParams:
    """Token sampling. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep the whole vocabulary.

    The penalties are vLLM's: repetition_penalty for tokens of prompt and answer, 1 for none; presence_penalty and
    frequency_penalty (per occurrence) for tokens of the answer, 0 for none.
    Generation ends at an end-of-sequence token or one of stop_token_ids, once a string of `stop` is in the text, or
    after max_new_tokens. Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    max_new_tokens: int = 48
    stop: tuple[str, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: expected 0 (greedy) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is not positive; set at least 1")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k {self.top_k}, top_p {self.top_p}: expected top_k >= 0 and 0 < top_p <= 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p}: expected a number from 0 to 1")
        # Beyond these bounds float32 logits could overflow.
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty {self.repetition_penalty}: expected a number from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} {getattr(self, name)}: expected a number from -2 to 2")
        if "" in self.stop:
            raise ValueError("stop contains an empty string, which every text contains; remove it")

    @cached_property
    def distribution(self) -> SamplingParams:
        """The parameters that affect the next token's distribution, not those that end an answer. Rows with equal
        values are sampled in one batch."""
        return replace(self, max_new_tokens=1, stop=(), stop_token_ids=())

    @cached_property
    def is_penalised(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """64-bit key of one answer's random stream: depends on nothing but its arguments."""
    name = f"{seed}\n{sample}\n{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def uniforms(keys: np.ndarray, positions: np.ndarray, draws: int) -> np.ndarray:
    """float64 [R, draws] in [0, 1) for keys uint64 [R], positions int [R]: a pure function of key, position and draw.

    SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based generator: the state is key + counter · golden ratio.
    """
    counter = positions.astype(np.uint64)[:, None] * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z: np.ndarray = keys[:, None] + counter * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(
    logits: Tensor, params: SamplingParams, uniform: Tensor, histories: Sequence[History] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """logits float32 [R, V], uniform float64 [R] in [0, 1) -> token ids int64 [R], two log-probabilities float32 [R]:
    under the distribution that was sampled from and under the model's own (temperature applied; 1 for a greedy choice).
    Inverse-CDF sampling: one uniform per token, whatever the batch. `histories` [R]: read if there are penalties."""
    penalised = penalise(logits, params, histories) if params.is_penalised else logits
    if params.temperature == 0:
        tokens, logprobs = greedy(penalised)
        return tokens, logprobs, logprobs if penalised is logits else log_prob(logits, tokens)
    if params.temperature != 1:
        scaled = logits / params.temperature
        logits, penalised = scaled, scaled if penalised is logits else penalised / params.temperature
    truncated = truncate(drop_improbable(penalised, params.min_p), params.top_k, params.top_p)
    tokens, logprobs = inverse_cdf(truncated, uniform)
    return tokens, logprobs, logprobs if truncated is logits else log_prob(logits, tokens)


def penalise(logits: Tensor, params: SamplingParams, histories: Sequence[History]) -> Tensor:
    """Logits [R, V] after the penalties, in vLLM's order: logits of tokens in prompt or answer are divided by
    repetition_penalty where positive, else multiplied; of tokens in the answer presence_penalty is subtracted, and
    frequency_penalty as often as the token is there."""
    result = logits.reshape(-1).clone()

    def places(texts: Iterable[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
        """Where each row's distinct tokens stand in `result`, and how often each occurs."""
        each = [np.fromiter(chain(*text), np.int64) + row * logits.shape[-1] for row, text in enumerate(texts)]
        found, counts = np.unique(np.concatenate(each), return_counts=True)
        at, times = to_device((torch.from_numpy(found), torch.from_numpy(counts)), logits.device)
        return at, times.to(logits)

    if params.repetition_penalty != 1:
        at, _ = places(histories)
        values = result[at]
        result[at] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    at, counts = places([answer] for _, answer in histories)
    result[at] -= counts * params.frequency_penalty + params.presence_penalty
    return result.view_as(logits)


def drop_improbable(logits: Tensor, min_p: float) -> Tensor:
    """Set logits to -inf where a token is less probable than min_p times the most probable one."""
    if not min_p:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), float("-inf"))


def prescribe(
    logits: Tensor, params: SamplingParams, drawn: tuple[Tensor, Tensor, Tensor], given: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of `sample_tokens` for logits [R, V], with the (row, token) pairs `given` in place of samples."""
    rows, tokens = to_device(torch.tensor(given), logits.device).unbind(1)
    taken, logprobs, full = (column.clone() for column in drawn)
    taken[rows] = tokens.to(taken)
    scores = log_prob(logits[rows] / (params.temperature or 1.0), tokens)
    logprobs[rows] = full[rows] = scores.to(full)
    return taken, logprobs, full


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the most probable tokens int64 [R] of logits [R, V], and its log-probability float32 [R]."""
    library = _library(logits)
    if library is None:
        tokens = logits.argmax(dim=-1)
        return tokens, log_prob(logits, tokens)
    logits = logits.contiguous()
    tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    library.best(logits.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), *map(int, logits.shape))
    return tokens, logprobs


def _library(logits: Tensor) -> compiled.Library | None:
    return compiled.library(torch.float32) if logits.device.type == "cpu" and logits.dtype == torch.float32 else None


def inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [R] at the quantiles uniform [R] of softmax(logits [R, V]), and their log-probabilities [R]."""
    library = _library(logits)
    if library is not None:
        tokens, logprobs = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
        logits, uniform = logits.contiguous(), uniform.to(torch.float64).contiguous()
        library.sample(
            logits.data_ptr(), uniform.data_ptr(), tokens.data_ptr(), logprobs.data_ptr(), *map(int, logits.shape)
        )
        return tokens, logprobs
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    # In float32 a scan over a large vocabulary loses tokens of little weight on a GPU, which adds up by pairs.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    aim = uniform.to(cumulative)[:, None] * total
    tokens = torch.searchsorted(cumulative, aim, right=True)
    # Rounding can put the aim on the total: the last token with any weight is meant.
    last = torch.searchsorted(cumulative, total)
    tokens = torch.minimum(tokens, last).squeeze(-1)
    return tokens, log_prob(logits, tokens)


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens [R] under logits [R, V], float32 [R]."""
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)


def most_probable(logits: Tensor, params: SamplingParams, counts: Sequence[int]) -> list[TopLogprobs]:
    """For each of logits [R, V] its `counts[r]` most probable tokens, most probable first, under the whole distribution
    (temperature applied, 1 where it is 0)."""
    wanted = [i for i, count in enumerate(counts) if count]
    top: list[TopLogprobs] = [()] * len(counts)
    if wanted:
        chosen = logits[to_device(torch.tensor(wanted), logits.device)] / (params.temperature or 1.0)
        values, tokens = chosen.topk(min(max(counts), logits.shape[-1]), dim=-1)
        values, tokens = to_host(values - chosen.logsumexp(dim=-1, keepdim=True), tokens)
        for i, row_tokens, row_values in zip(wanted, tokens.tolist(), values.tolist(), strict=True):
            top[i] = tuple(zip(row_tokens, row_values, strict=True))[: counts[i]]
    return top


def truncate(logits: Tensor, top_k: int, top_p: float, candidates: int = NUCLEUS) -> Tensor:
    """Set logits to -inf outside the top_k most probable tokens and outside the smallest set that holds top_p of the
    mass. Sorts the best `candidates` only, where they hold top_p."""
    if not top_k and top_p >= 1:
        return logits
    vocab = logits.shape[-1]
    width = min(vocab, top_k or candidates)
    values, order = logits.topk(width, dim=-1)
    retained = torch.ones_like(values, dtype=torch.bool)
    if top_p < 1:
        total = (values if top_k else logits).logsumexp(dim=-1, keepdim=True)
        probabilities = (values - total).exp()
        retained = probabilities.cumsum(dim=-1) - probabilities < top_p
        # However small top_p is, float32's zero included.
        retained[:, 0] = True
    drop = torch.ones_like(logits, dtype=torch.bool).scatter(-1, order, ~retained)
    result = logits.masked_fill(drop, float("-inf"))
    if not top_k and width < vocab and len(short := retained[:, -1].nonzero().squeeze(-1)):
        result[short] = truncate(logits[short], 0, top_p, vocab)
    return result
