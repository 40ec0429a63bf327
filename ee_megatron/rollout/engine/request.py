"""What the scheduler is asked and what it reports: requests, answers in the making, events."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from ...exit_rules import ExitRule, Off
from ...types import Prompt, Rollout
from .ending import StopChecker
from .sampling import SamplingParams, TopLogprobs

# Told how many of how many answers there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationRequest:
    """What a pool is asked for: `samples` answers to each prompt by each of the `rules`, `exits` and `others`, those by
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
        """The same by these rules instead."""
        return replace(self, exits=exits, others=others)


@dataclass(frozen=True)
class Request:
    """One answer wanted.

    - prompt: text (tokenised as it stands) or token ids
    - seed, prompt_id, sample: name the answer's random stream, and nothing else does: same names, same answer. A
      prompt's samples differ in `sample`; requests with equal prompts that wait together are read once.
    - stream: whether events carry text (it costs a detokenisation per token)
    - top_logprobs: how many of the most probable tokens events name beside the chosen one
    - prefill: tokens that the answer is made to begin with. They are part of it and count towards max_new_tokens; their
      exits are chosen by `exits`, their log-probabilities are those of the whole distribution
    - begun: its first tokens, as `Scheduler.take_unfinished` gave them: they are read again, at their own exits, under
      the weights now loaded, and the answer goes on from there
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
    begun: Rollout | None = None


class NextToken(NamedTuple):
    """What a row gets next: fields as in `Event`."""

    token: int
    depth: int
    logprob: float
    full_logprob: float
    exit_logprob: float
    finished: str | None
    top: TopLogprobs = ()


def check_logits(full_logprobs: Iterable[float]) -> None:
    """Raises ValueError for a NaN among tokens' `full_logprob`, which any NaN among the logits makes of it."""
    if any(map(math.isnan, full_logprobs)):
        raise ValueError(
            "the model's logits are not finite (NaN). A policy in training has diverged: lower its learning rate. Else "
            "the model's weights (`ee-megatron convert inspect DIR` names them) or numbers in its config.json "
            "(rope_theta, rms_norm_eps, ...) are wrong: copy it again"
        )


@dataclass(frozen=True)
class Event:
    """A request got a token: its id, the text that became certain with it, its exit depth and log-probabilities.

    `finished` is None, or why this was the last: "stop" (end of sequence or a stop string) or "length". `top`: the most
    probable tokens at this place, as many as the request wanted, with their `full_logprob`.
    """

    request: int
    token: int
    text: str
    depth: int
    logprob: float
    full_logprob: float
    exit_logprob: float
    finished: str | None
    top: TopLogprobs = ()


@dataclass(eq=False)
class Row:
    """One answer in the making; lists as in `Rollout`.

    `read` is what of the prompt is read in parallel, at full depth: all of it, or all but its last token, which then is
    run as a generated one.
    `segment` is the last that ran for the token being made: at the readout, the index of its exit.
    `slot` is its place in the cache (-1: none yet), `shown` the characters that events have reported.
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
    tokens: list[int] = field(default_factory=list)
    exit_depths: list[int] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    full_logprobs: list[float] = field(default_factory=list)
    exit_logprobs: list[float] = field(default_factory=list)
    finished: str | None = None

    def __post_init__(self) -> None:
        if self.request.begun is not None:
            for name in ("tokens", "exit_depths", "token_logprobs", "full_logprobs", "exit_logprobs"):
                setattr(self, name, getattr(self.request.begun, name).tolist())

    @property
    def given(self) -> int | None:
        """The token that the prefill prescribes next; None where the model is free."""
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
        """Why the answer ends if this token comes next, as in `Event.finished`; None: it goes on."""
        made = len(self.tokens) + 1
        # What was given can't end an answer: it would leave the model nothing to say.
        if made > len(self.request.prefill) and self.stopping.ends(self.tokens, token):
            return "stop"
        return "length" if made >= self.request.sampling.max_new_tokens else None

    def append(self, new: NextToken) -> Event:
        self.tokens.append(new.token)
        self.exit_depths.append(new.depth)
        self.token_logprobs.append(new.logprob)
        self.full_logprobs.append(new.full_logprob)
        self.exit_logprobs.append(new.exit_logprob)
        self.finished = new.finished
        text = self._new_text() if self.request.stream else ""
        return Event(
            self.id, new.token, text, new.depth, new.logprob, new.full_logprob, new.exit_logprob, new.finished, new.top
        )

    def rollout(self, version: int) -> Rollout:
        token_logprobs = np.array(self.token_logprobs, dtype=np.float32)
        sampling = self.request.sampling
        cut = sampling.temperature > 0 and (sampling.top_k or sampling.top_p < 1)
        begun = self.request.begun
        versions = np.full(len(self.tokens), version, dtype=np.int32)
        if begun is not None and begun.weight_versions is not None:
            versions[: begun.length] = begun.weight_versions
        return Rollout(
            prompt_id=self.request.prompt_id,
            prompt_tokens=np.array(self.prompt_tokens, dtype=np.int64),
            tokens=np.array(self.tokens, dtype=np.int64),
            exit_depths=np.array(self.exit_depths, dtype=np.int32),
            token_logprobs=token_logprobs,
            exit_logprobs=np.array(self.exit_logprobs, dtype=np.float32),
            text=self.stopping.text(self.tokens),
            finished=self.finished == "stop",
            weight_version=version,
            full_logprobs=np.array(self.full_logprobs, dtype=np.float32) if cut else token_logprobs,
            weight_versions=versions,
        )

    def _new_text(self) -> str:
        text = self.stopping.text(self.tokens) if self.finished else self.stopping.settled(self.tokens)
        new = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return new
