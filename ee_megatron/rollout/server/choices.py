"""Answers as they grow, and as responses show them: OpenAI's fields, and `early_exit` with depths per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..engine.request import Event
from ..engine.sampling import TopLogprobs
from ..engine.scoring import PromptScore

# What JSON can hold of a log-probability, and other servers' own bound.
LOWEST = -9999.0
Decode = Callable[[Sequence[int]], str]


class Choice:
    """One answer as it grows: events in, fields of a response out.

    - top: how many of the most probable tokens are named with each; None: no log-probabilities in OpenAI's place
    - echo: the prompt's text, which the answer is to begin with; None: it isn't
    """

    def __init__(
        self, index: int, prompt: Sequence[int], chat: bool, top: int | None, decode: Decode, echo: str | None = None
    ):
        self.index, self.chat, self.top = index, chat, top
        self.prompt_tokens = len(prompt)
        self._prompt, self._decode, self._echo = prompt, decode, echo
        self._score: PromptScore | None = None
        self._only_prompt, self._length = False, 0
        self.events: list[Event] = []

    @property
    def finished(self) -> str | None:
        return self.events[-1].finished if self.events else "length" if self._only_prompt else None

    def scored(self, score: PromptScore | None, last: bool) -> None:
        """What the prompt's tokens score; `last`: there will be no others."""
        self._score, self._only_prompt = score, last

    def whole(self) -> dict:
        """The choice of a response that isn't streamed."""
        text = "".join(event.text for event in self.events)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": self._begin() + text}
        return self._fields(content, self.events, 0, with_prompt=True)

    def prompt_piece(self) -> dict:
        """The choice of a streamed chunk that says what the prompt was."""
        return self._fields({"text": self._begin()}, [], 0, with_prompt=True)

    def piece(self, event: Event) -> dict:
        """The choice of a streamed chunk that reports one token."""
        self.events.append(event)
        if not self.chat:
            content: dict[str, Any] = {"text": event.text}
        else:
            role = {"role": "assistant"} if len(self.events) == 1 else {}
            content = {"delta": {**role, "content": event.text}}
        before, self._length = self._length, self._length + len(event.text)
        return self._fields(content, [event], len(self._begin()) + before, with_prompt=False)

    def _begin(self) -> str:
        return self._echo or ""

    def _fields(self, content: dict, events: list[Event], offset: int, with_prompt: bool) -> dict:
        return {
            "index": self.index,
            **content,
            "finish_reason": self.finished,
            "logprobs": None if self.top is None else self._logprobs(events, offset, with_prompt),
            "early_exit": {
                "token_ids": [event.token for event in events],
                "depths": [event.depth for event in events],
                "logprobs": [bounded(event.logprob) for event in events],
                "exit_logprobs": [bounded(event.exit_logprob) for event in events],
            },
        }

    def _logprobs(self, events: list[Event], offset: int, with_prompt: bool) -> dict:
        if self.chat:
            return {"content": [self._entry(event) for event in events]}
        columns = _Columns(self._decode, self.top or 0)
        if with_prompt and self._echo is not None:
            columns.add_prompt(self._prompt, self._score)
            offset = len(self._echo)
        for event in events:
            columns.add(event.token, event.full_logprob, event.top, offset)
            offset += len(event.text)
        return columns.fields()

    def _entry(self, event: Event) -> dict:
        def said(token: int, logprob: float) -> dict:
            piece = self._decode([token])
            return {"token": piece, "logprob": bounded(logprob), "bytes": list(piece.encode())}

        top = [said(*pair) for pair in event.top[: self.top]]
        return {**said(event.token, event.full_logprob), "top_logprobs": top}


class _Columns:
    """`logprobs` as completions have it: an entry per token, of the prompt's too if it is echoed."""

    def __init__(self, decode: Decode, top: int):
        self._decode, self._top = decode, top
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._best: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token: int, logprob: float | None, top: TopLogprobs, offset: int) -> None:
        piece = self._decode([token])
        self._tokens.append(piece)
        self._logprobs.append(None if logprob is None else bounded(logprob))
        self._offsets.append(offset)
        if logprob is None:
            self._best.append(None)
            return
        best: dict[str, float] = {}
        # Tokens that look alike share a name: the more probable one has it.
        for other, value in top[: self._top]:
            best.setdefault(self._decode([other]), bounded(value))
        best.setdefault(piece, bounded(logprob))
        self._best.append(best)

    def add_prompt(self, prompt: Sequence[int], score: PromptScore | None) -> None:
        """The first token has no log-probability: nothing comes before it."""
        for i, (token, offset) in enumerate(zip(prompt, offsets(prompt, self._decode), strict=True)):
            if i and score is not None:
                self.add(token, score.logprobs[i - 1], score.top[i - 1], offset)
            else:
                self.add(token, None, (), offset)

    def fields(self) -> dict:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._best if self._top else None,
            "text_offset": self._offsets,
        }


def offsets(tokens: Sequence[int], decode: Decode) -> list[int]:
    """Where each token's text begins in the whole; tokens that make one character together begin where it does."""
    found, start, pending = list[int](), 0, list[int]()
    for token in tokens:
        pending.append(token)
        found.append(start)
        text = decode(pending)
        if not text.endswith("\ufffd") or len(pending) > 8:
            start += len(text)
            pending = []
    return found


def bounded(logprob: float) -> float:
    """As JSON can hold it. Raises ValueError for NaN: the model's weights are broken then."""
    if logprob != logprob:
        raise ValueError("the model gave no number (NaN) for a token's log-probability; its weights may be damaged")
    return max(logprob, LOWEST)


def usage(choices: list[Choice], n: int, num_layers: int) -> dict:
    """Token counts (a prompt counts once for its n answers) and the mean depth as a share of the layers."""
    depths = [event.depth for choice in choices for event in choice.events]
    prompt = sum(choice.prompt_tokens for choice in choices[::n])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": len(depths),
        "total_tokens": prompt + len(depths),
        "mean_depth": sum(depths) / len(depths) / num_layers if depths else None,
    }
