"""Requests checked against the model, the answers in progress, and an event per new token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...exit_rules import ExitRule, Off
from ...exits import ExitLayout
from ...types import Prompt, Rollout
from .prompts import encode_text
from .sampling import SamplingParams, TopLogprobs, stream_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Sets of stop strings that are remembered: requests may come with any.
STOPS_KEPT = 64
# Called with the number of answers done and in all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationRequest:
    """A generation request: `samples` answers to each prompt by each of the `rules`, `exits` and `others`, those by
    one rule next to each other. With the weights it decides the answers; a rule's don't depend on the other rules."""

    prompts: Sequence[Prompt]
    samples: int
    sampling: SamplingParams
    exits: ExitRule
    seed: int
    others: tuple[ExitRule, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))

    @property
    def rules(self) -> tuple[ExitRule, ...]:
        return (self.exits, *self.others)

    @property
    def per_prompt(self) -> int:
        """Answers to one prompt."""
        return self.samples * len(self.rules)

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.per_prompt

    def by(self, exits: ExitRule, *others: ExitRule) -> GenerationRequest:
        """The same request with these rules."""
        return replace(self, exits=exits, others=others)


@dataclass(frozen=True)
class Request:
    """Request of one answer.

    - prompt: text (tokenised as it stands) or token ids; equal prompts that wait together are read once
    - seed, prompt_id, sample: name the answer's random stream: same names, same answer
    - stream: whether events carry text (it costs a detokenisation per token)
    - top_logprobs: how many of the most probable tokens events name beside the chosen one
    - prefill: tokens that the answer is made to begin with, which count towards max_new_tokens; their exits are chosen
      by `exits`, their log-probabilities are those of the whole distribution
    """

    prompt: str | Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    exits: ExitRule = field(default_factory=Off)
    seed: int = 0
    prompt_id: str = ""
    sample: int = 0
    stream: bool = False
    top_logprobs: int = 0
    prefill: Sequence[int] = ()


def check_logits(full_logprobs: Iterable[float]) -> None:
    """Raises ValueError for a NaN among tokens' `full_logprob`, which follows from any NaN among the logits."""
    if any(map(math.isnan, full_logprobs)):
        raise ValueError(
            "the model's logits are not finite (NaN). A policy in training has diverged: lower its learning rate. Else "
            "the model's weights (`ee-megatron convert inspect DIR` names them) or numbers in its config.json "
            "(rope_theta, rms_norm_eps, ...) are wrong: copy it again"
        )


class Event(NamedTuple):
    """One new token of a request: its id, the text that became certain with it, its exit depth and log-probabilities.

    `finished` is None, or why this was the last: "stop" (a stop token or string) or "length". `top`: the most
    probable tokens at this place, as many as the request wanted, with their `full_logprob`. `drafted`: a shallow exit
    had proposed it (`Speculate`).
    """

    request: int
    token: int
    depth: int
    logprob: float
    full_logprob: float
    exit_logprob: float
    finished: str | None
    top: TopLogprobs = ()
    text: str = ""
    drafted: bool = False


class StopChecker:
    """End-of-sequence ids, further `ids` that end an answer, and stop strings. Decodes the answer only when its newest
    token could complete a stop."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int], stop: Sequence[str], ids: Sequence[int] = ()
    ):
        self.tokenizer = tokenizer
        # A special token never shows up in decoded text: as a stop string it is an end-of-sequence id.
        special = {text: tokenizer.convert_tokens_to_ids(text) for text in stop if text in tokenizer.all_special_tokens}
        ends = set(eos_ids) or {tokenizer.eos_token_id} - {None}
        self.end_ids = frozenset({*ends, *special.values(), *ids})
        self.stop = tuple(text for text in stop if text not in special)
        self._last_characters = {text[-1] for text in self.stop}
        # A space may be lost and a character beyond ASCII split when a token is decoded alone: then always look.
        self._always = any(last == " " or not last.isascii() for last in self._last_characters)
        self._could_complete = cache(self._completes)

    def ends(self, tokens: Sequence[int], newest: int) -> bool:
        """Whether an answer ends with the token that comes next after its `tokens`."""
        if newest in self.end_ids:
            return True
        if not self.stop or not (self._always or self._could_complete(newest)):
            return False
        text = self.decode([*tokens, newest])
        return any(stop in text for stop in self.stop)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer's text without special tokens, up to the first stop string."""
        text = self.decode(tokens)
        cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        return text[: min(cuts)] if cuts else text

    def settled(self, tokens: Sequence[int]) -> str:
        """The part of the text that later tokens can't change: no broken character, no beginning of a stop string."""
        text = self.text(tokens).rstrip("\ufffd")
        held = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[: len(text) - max(held, default=0)]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _completes(self, token: int) -> bool:
        piece = self.decode([token])
        return any(last in piece for last in self._last_characters)


@dataclass(eq=False)
class Row:
    """One answer in progress.

    `read` is what of the prompt is read in parallel, at full depth: all of it, or all but its last token, which then is
    run as a generated one. `events`: one per token of `tokens`.
    `segment` is the last that ran for the token being made: at the readout, the index of its exit.
    `slot` is its place in the cache (-1: none yet), `shown` the characters that events have reported, `ahead` how many
    tokens to draft next.
    """

    id: int
    request: Request
    prompt_tokens: tuple[int, ...]
    read: tuple[int, ...]
    key: int
    stopping: StopChecker
    slot: int = -1
    segment: int = -1
    shown: int = 0
    ahead: int = 4
    tokens: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def finished(self) -> str | None:
        """Why the answer ended, as in `Event`; None while it is in progress."""
        return self.events[-1].finished if self.events else None

    @property
    def given(self) -> int | None:
        """Next token prescribed by the prefill; None where the model is free."""
        at = len(self.tokens)
        return int(self.request.prefill[at]) if at < len(self.request.prefill) else None

    @property
    def last(self) -> int:
        """The token whose position predicts the next one."""
        return self.tokens[-1] if self.tokens else self.prompt_tokens[-1]

    @property
    def length(self) -> int:
        return len(self.prompt_tokens) + len(self.tokens)

    @property
    def longest(self) -> int:
        return len(self.prompt_tokens) + self.request.sampling.max_new_tokens

    def ending(self, token: int) -> str | None:
        """Why the answer ends if this token comes next, as in `Event.finished`; None: it continues."""
        made = len(self.tokens) + 1
        # What was given can't end an answer: it would leave the model nothing to say.
        if made > len(self.request.prefill) and self.stopping.ends(self.tokens, token):
            return "stop"
        return "length" if made >= self.request.sampling.max_new_tokens else None

    def append(self, new: Event) -> Event:
        """Add the next token; returns its event, with text if the request is streamed."""
        self.tokens.append(new.token)
        self.events.append(new)
        if not self.request.stream:
            return new
        text = self.stopping.text(self.tokens) if new.finished else self.stopping.settled(self.tokens)
        added, self.shown = text[self.shown :], max(self.shown, len(text))
        return new._replace(text=added)

    def rollout(self, version: int) -> Rollout:
        """The finished answer as a record, with the version of its weights."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(event, name) for event in self.events], dtype=dtype)

        return Rollout(
            prompt_id=self.request.prompt_id,
            prompt_tokens=np.array(self.prompt_tokens, dtype=np.int64),
            tokens=np.array(self.tokens, dtype=np.int64),
            exit_depths=column("depth", np.int32),
            token_logprobs=column("logprob", np.float32),
            exit_logprobs=column("exit_logprob", np.float32),
            text=self.stopping.text(self.tokens),
            finished=self.finished == "stop",
            weight_version=version,
            full_logprobs=column("full_logprob", np.float32),
            drafted=sum(event.drafted for event in self.events),
        )


class RequestValidator:
    """Checks requests for one model: its tokenizer, end-of-sequence ids, exits, longest sequence."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int], layout: ExitLayout, max_positions: int
    ):
        self.tokenizer, self.layout, self.max_positions = tokenizer, layout, max_positions
        self._stopping = lru_cache(STOPS_KEPT)(partial(StopChecker, tokenizer, eos_ids))

    def begin(self, number: int, request: Request, gated: bool) -> Row:
        """Make the row of a request; `gated`: gates are loaded. Raises ValueError for what the model can't answer."""
        request.exits.check(self.layout, gated)
        prompt, prefill, sampling = request.prompt, request.prefill, request.sampling
        tokens = tuple(encode_text(self.tokenizer, prompt) if isinstance(prompt, str) else prompt)
        if not tokens:
            raise ValueError(f"prompt {request.prompt_id!r} has no tokens; give it a text")
        stopping = self._stopping(sampling.stop, sampling.stop_token_ids)
        if prefill and len(prefill) >= sampling.max_new_tokens:
            raise ValueError(
                f"prefill of {request.prompt_id!r} has {len(prefill)} tokens, the answer may have "
                f"{sampling.max_new_tokens}; raise max_new_tokens"
            )
        if prefill and any(stop in stopping.decode(prefill) for stop in stopping.stop):
            raise ValueError(f"prefill of {request.prompt_id!r} holds a stop string; cut it there")
        # The position that may exit is run as those of generated tokens are.
        read = tokens[:-1] if self.layout.first_token else tokens
        key = stream_key(request.seed, request.prompt_id, request.sample)
        row = Row(number, request, tokens, read, key, stopping)
        if row.longest > self.max_positions:
            raise ValueError(
                f"prompt and answer take up to {row.longest} positions, the model has {self.max_positions}; "
                "shorten the prompts or lower max_new_tokens"
            )
        return row
