"""Answers as responses show them: OpenAI's fields, and `early_exit` with a depth for each token."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from ..engine.request import Event
from ..engine.sampling import TopLogprobs
from ..engine.scoring import PromptScore
from .protocol import ChatRequest, GenerationFields

# The lowest log-probability that is written; JSON has no -inf.
LOWEST = -9999.0
Decode = Callable[[Sequence[int]], str]


class Choice:
    """One answer as it grows. `echo`: the prompt's text if the answer begins with it, `score`: its log-probabilities
    if those are wanted."""

    def __init__(
        self, index: int, prompt: Sequence[int], asked: GenerationFields, decode: Decode, echo: str = "",
        score: PromptScore | None = None,
    ):  # fmt: skip
        self.events: list[Event] = []
        self.prompt = prompt
        self._index, self._top, self._decode, self._echo, self._score = index, asked.top, decode, echo, score
        self._chat, self._only_prompt = isinstance(asked, ChatRequest), asked.limit == 0
        self._written = len(echo)

    def whole(self) -> dict:
        """The choice of a response that isn't streamed."""
        text = self._echo + "".join(event.text for event in self.events)
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._fields(content, self.events, len(self._echo), with_prompt=True)

    def prompt_piece(self) -> dict:
        """The choice of a streamed chunk that repeats the prompt."""
        return self._fields({"text": self._echo}, [], 0, with_prompt=True)

    def piece(self, event: Event) -> dict:
        """The choice of a streamed chunk that reports one token."""
        self.events.append(event)
        role = {"role": "assistant"} if len(self.events) == 1 else {}
        content: dict[str, Any] = {"delta": {**role, "content": event.text}} if self._chat else {"text": event.text}
        offset, self._written = self._written, self._written + len(event.text)
        return self._fields(content, [event], offset, with_prompt=False)

    def _fields(self, content: dict, events: list[Event], offset: int, with_prompt: bool) -> dict:
        finished = self.events[-1].finished if self.events else "length" if self._only_prompt else None
        if self._top is None:
            logprobs = None
        elif self._chat:
            logprobs = {"content": [self._chat_entry(event) for event in events]}
        else:
            logprobs = self._columns(events, offset, with_prompt)
        exits = {
            "token_ids": [event.token for event in events],
            "depths": [event.depth for event in events],
            "logprobs": [bounded(event.logprob) for event in events],
            "exit_logprobs": [bounded(event.exit_logprob) for event in events],
        }
        return {
            "index": self._index, **content, "finish_reason": finished, "logprobs": logprobs, "early_exit": exits
        }  # fmt: skip

    def _chat_entry(self, event: Event) -> dict:
        def fields(token: int, logprob: float) -> dict:
            piece = self._decode([token])
            return {"token": piece, "logprob": bounded(logprob), "bytes": list(piece.encode())}

        top = [fields(*pair) for pair in event.top[: self._top]]
        return {**fields(event.token, event.full_logprob), "top_logprobs": top}

    def _columns(self, events: list[Event], offset: int, with_prompt: bool) -> dict:
        """`logprobs` of completions: an entry per token, of the prompt's too if it is repeated."""
        entries: list[tuple[int, float | None, TopLogprobs, int]] = []
        if with_prompt and self._score is not None:
            # Nothing comes before the first token, so it has no log-probability.
            logprobs, tops = (None, *self._score.logprobs), ((), *self._score.top)
            entries += zip(self.prompt, logprobs, tops, text_offsets(self.prompt, self._decode), strict=True)
        for event in events:
            entries.append((event.token, event.full_logprob, event.top, offset))
            offset += len(event.text)
        return {
            "tokens": [self._decode([token]) for token, *_ in entries],
            "token_logprobs": [None if logprob is None else bounded(logprob) for _, logprob, _, _ in entries],
            "top_logprobs": [self._best(*entry[:3]) for entry in entries] if self._top else None,
            "text_offset": [offset for *_, offset in entries],
        }

    def _best(self, token: int, logprob: float | None, top: TopLogprobs) -> dict[str, float] | None:
        """The most probable tokens and the chosen one; of tokens with the same text the most probable counts."""
        if logprob is None:
            return None
        best: dict[str, float] = {}
        for other, value in (*top[: self._top], (token, logprob)):
            best.setdefault(self._decode([other]), bounded(value))
        return best


class Reply:
    """All choices of one request, as one response or as server-sent events."""

    def __init__(self, asked: GenerationFields, choices: list[Choice], num_layers: int, model: str):
        self.choices, self._asked, self._num_layers = choices, asked, num_layers
        chat = isinstance(asked, ChatRequest)
        kind = ("chat.completion.chunk" if asked.stream else "chat.completion") if chat else "text_completion"
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": id, "object": kind, "created": int(time.time()), "model": model}

    def body(self) -> bytes:
        """The whole response. Raises ValueError for a log-probability that is no number."""
        return to_json({**self._head, "choices": [choice.whole() for choice in self.choices], "usage": self._usage()})

    def chunk(self, piece: dict) -> bytes:
        """The event that sends a choice's piece."""
        return server_sent({**self._head, "choices": [piece]})

    def end(self) -> bytes:
        """The usage if it is asked for, and the mark that ends a stream."""
        wanted = self._asked.stream_options and self._asked.stream_options.include_usage
        usage = server_sent({**self._head, "choices": [], "usage": self._usage()}) if wanted else b""
        return usage + b"data: [DONE]\n\n"

    def _usage(self) -> dict:
        """Token counts (a prompt counts once for its n answers); the mean depth is a share of the layers."""
        depths = [event.depth for choice in self.choices for event in choice.events]
        prompt = sum(len(choice.prompt) for choice in self.choices[:: self._asked.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": len(depths),
            "total_tokens": prompt + len(depths),
            "mean_depth": sum(depths) / len(depths) / self._num_layers if depths else None,
        }


def text_offsets(tokens: Sequence[int], decode: Decode) -> list[int]:
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


def to_json(body: dict) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def server_sent(body: dict) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"
