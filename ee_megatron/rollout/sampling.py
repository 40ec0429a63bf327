"""How exits and tokens are chosen: exit policies, token sampling, and random numbers that do not depend on batching."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..exits import ExitLayout

KINDS = ("sample", "threshold", "fixed", "off", "confidence", "prescribed")


@dataclass(frozen=True)
class ExitPolicy:
    """When a generated position exits.

    - sample: gate i fires with its hazard, as in training
    - threshold: at the first gate whose hazard exceeds `value`
    - fixed: every position at depth `value` (an exit depth, or L)
    - off: never
    - confidence: at the first exit whose readout gives some token more than the probability `value`
    - prescribed: replay; `depths` maps (prompt id, sample index) to the depth of every generated token, entry 0 is L

    Raises ValueError for an unknown kind or a value that the kind can't use.
    """

    kind: str = "sample"
    value: float | int = 0.5
    depths: Mapping[tuple[str, int], Sequence[int]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"exit policy {self.kind!r} is unknown; expected one of {', '.join(KINDS)}")
        if self.kind in ("threshold", "confidence") and not 0 <= self.value <= 1:
            raise ValueError(f"exit policy {self.kind}: value {self.value} outside 0..1; set a probability")

    def check(self, layout: ExitLayout, has_gates: bool) -> None:
        """Raises ValueError if a decoder with these exits and gates can't follow the policy."""
        if self.kind == "fixed" and self.value not in layout.outcomes:
            raise ValueError(f"fixed exit {self.value} is no exit depth; expected one of {list(layout.outcomes)}")
        if self.kind in ("sample", "threshold") and not has_gates:
            raise ValueError(
                f"exit policy {self.kind} needs gates, but the teacher is loaded; load a policy or use 'off'"
            )
        if self.kind == "prescribed":
            for key, depths in self.depths.items():
                wrong = sorted(set(map(int, depths)) - set(layout.outcomes))
                if wrong or (len(depths) and int(depths[0]) != layout.num_layers):
                    raise ValueError(
                        f"prescribed exits of {key}: {wrong or int(depths[0])} not possible; expected "
                        f"{layout.num_layers} first (prompts never exit), then any of {list(layout.outcomes)}"
                    )


@dataclass(frozen=True)
class SamplingParams:
    """Token sampling. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary.

    Generation ends at an end-of-sequence token, once a string of `stop` is in the text, or after max_new_tokens.
    Raises ValueError for a value out of range.
    """

    temperature: float = 1.0
    max_new_tokens: int = 48
    stop: tuple[str, ...] = ()
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; set 0 (greedy) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens} is not positive; set at least 1")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k {self.top_k}, top_p {self.top_p}: expected top_k >= 0 and 0 < top_p <= 1")
        if "" in self.stop:
            raise ValueError("stop contains an empty string, which every text contains; remove it")


def stream_key(seed: int, prompt_id: str, sample: int) -> int:
    """The 64-bit key of one answer's random stream: depends on nothing but its arguments."""
    name = f"{seed}\n{sample}\n{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def uniforms(keys: np.ndarray, positions: np.ndarray, draws: int) -> np.ndarray:
    """keys uint64 [R], positions int [R] -> float64 [R, draws] in [0, 1): a pure function of key, position and draw.

    SplitMix64 (Steele, Lea, Flood 2014) used as a counter-based generator: the state is key + counter · golden ratio.
    """
    counter = positions.astype(np.uint64)[:, None] * np.uint64(draws) + np.arange(1, draws + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z: np.ndarray = keys[:, None] + counter * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits float32 [R, V], uniform [R] in [0, 1) -> token ids int64 [R], log-probabilities float32 [R].

    The log-probability is the sampled distribution's (temperature, top-k and top-p applied); for greedy choice it is
    that of the distribution at temperature 1. Inverse-CDF sampling: one uniform per token, whatever the batch.
    """
    if params.temperature == 0:
        best = logits.argmax(dim=-1)
        return best, log_prob(logits, best)
    if params.temperature != 1:
        logits = logits / params.temperature
    if params.top_k or params.top_p < 1:
        logits = truncate(logits, params.top_k, params.top_p)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    aim = uniform.to(logits)[:, None] * total
    tokens = torch.searchsorted(cumulative, aim, right=True)
    # Rounding can put the aim on the total: the last token with any weight is meant.
    last = torch.searchsorted(cumulative, total)
    tokens = torch.minimum(tokens, last).squeeze(-1)
    return tokens, log_prob(logits, tokens)


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [R, V], tokens [R] -> log softmax at the tokens, float32 [R]."""
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf outside the top_k most probable tokens and outside the smallest set that holds top_p of the mass."""
    ordered, order = logits.sort(dim=-1, descending=True)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k:
        drop[:, top_k:] = True
    if top_p < 1:
        probabilities = ordered.masked_fill(drop, float("-inf")).softmax(dim=-1)
        drop |= probabilities.cumsum(dim=-1) - probabilities >= top_p
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
