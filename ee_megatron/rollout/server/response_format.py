"""Formats answers as responses: OpenAI's fields, and `early_exit` with a depth for each token."""

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


class Choice:
    """One answer while it grows. `piece`: text of a token; `echo`: the prompt's text if the answer begins with it,
    `score`: its log-probabilities if they are requested."""

    def __init__(
        self, index: int, prompt: Sequence[int], query: GenerationFields, piece: Callable[[int], str], echo: str = "",
        score: PromptScore | None = None,
    ):  # fmt: skip
        self.events: list[Event] = []
        self.prompt, self._index, self._query = prompt, index, query
        self._piece, self._echo, self._score = piece, echo, score
        self._top = query.top or 0

    def add(self, events: Sequence[Event], echo: bool = False) -> dict:
        """Format these further tokens as the choice of a response, or of a streamed chunk, after the prompt if that is
        to be repeated. Raises ValueError for a NaN log-probability."""
        role = {} if self.events or not isinstance(self._query, ChatRequest) else {"role": self._query.role}
        self.events += events
        text = (self._echo if echo else "") + "".join(event.text for event in events)
        chat, logprobs = isinstance(self._query, ChatRequest), None
        content: dict[str, Any] = {"text": text}
        if chat:
            content = {"delta" if self._query.stream else "message": {**role, "content": text}}
        if self._query.top is not None:
            logprobs = {"content": [self._entry(event) for event in events]} if chat else self._columns(events, echo)
        finished = "length" if self._query.max_tokens == 0 else self.events[-1].finished if self.events else None
        return {
            "index": self._index,
            **content,
            **({} if chat else self.prompt_logprobs()),
            "finish_reason": finished,
            "logprobs": logprobs,
            "early_exit": {
                "token_ids": [event.token for event in events],
                "depths": [event.depth for event in events],
                "logprobs": [bounded(event.logprob) for event in events],
                "exit_logprobs": [bounded(event.exit_logprob) for event in events],
            },
        }

    def prompt_logprobs(self) -> dict:
        """Field `prompt_logprobs` if it is requested, in vLLM's form: by position None or {token id: logprob, rank,
        decoded_token}, of the most probable tokens and the prompt's own."""
        if self._query.prompt_logprobs is None or self._score is None:
            return {}
        positions: list[dict | None] = [None]
        for token, logprob, rank, top in zip(self.prompt[1:], *self._score, strict=True):
            best = enumerate(top[: self._query.prompt_logprobs], start=1)
            ranked = {token: (logprob, rank)} | {other: (value, at) for at, (other, value) in best}
            positions.append(
                {
                    str(one): {"logprob": bounded(value), "rank": at, "decoded_token": self._piece(one)}
                    for one, (value, at) in ranked.items()
                }
            )
        return {"prompt_logprobs": positions}

    def _entry(self, event: Event) -> dict:
        def fields(token: int, logprob: float) -> dict:
            piece = self._piece(token)
            return {"token": piece, "logprob": bounded(logprob), "bytes": list(piece.encode())}

        top = [fields(*pair) for pair in event.top[: self._top]]
        return {**fields(event.token, event.full_logprob), "top_logprobs": top}

    def _columns(self, events: Sequence[Event], echo: bool) -> dict:
        """`logprobs` of completions: an entry per token, of the prompt's too if it is repeated."""
        entries: list[tuple[int, float | None, TopLogprobs]] = []
        if echo and self._query.echo and self._score is not None:
            # Nothing comes before the first token, so it has no log-probability.
            entries += zip(self.prompt, (None, *self._score.logprobs), ((), *self._score.top), strict=True)
        entries += [(event.token, event.full_logprob, event.top) for event in events]
        return {
            "tokens": [self._piece(token) for token, *_ in entries],
            "token_logprobs": [None if logprob is None else bounded(logprob) for _, logprob, _ in entries],
            "top_logprobs": [self._best(*entry) for entry in entries] if self._top else None,
        }

    def _best(self, token: int, logprob: float | None, top: TopLogprobs) -> dict[str, float] | None:
        """The most probable tokens and the chosen one; of tokens with the same text the most probable counts."""
        if logprob is None:
            return None
        best: dict[str, float] = {}
        for other, value in (*top[: self._top], (token, logprob)):
            best.setdefault(self._piece(other), bounded(value))
        return best


class Reply:
    """All choices of one request, as one response or as server-sent events."""

    def __init__(self, query: GenerationFields, choices: list[Choice], num_layers: int, model: str):
        self.choices, self.query, self._num_layers = choices, query, num_layers
        chat = isinstance(query, ChatRequest)
        kind = ("chat.completion.chunk" if query.stream else "chat.completion") if chat else "text_completion"
        id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": id, "object": kind, "created": int(time.time()), "model": model}

    def body(self, choices: list[dict], usage: bool = True) -> dict:
        """Format a response or a chunk. Its usage counts a prompt once for its n answers; the mean depth is a share of
        the layers."""
        if not usage:
            return {**self._head, "choices": choices}
        depths = [event.depth for choice in self.choices for event in choice.events]
        prompt = sum(len(choice.prompt) for choice in self.choices[:: self.query.n])
        counts = {
            "prompt_tokens": prompt,
            "completion_tokens": len(depths),
            "total_tokens": prompt + len(depths),
            "mean_depth": sum(depths) / len(depths) / self._num_layers if depths else None,
        }
        whole = {**self._head, "choices": choices, "usage": counts}
        return whole | self.choices[0].prompt_logprobs() if isinstance(self.query, ChatRequest) else whole

    def end(self) -> bytes:
        """End of a stream: the usage if requested, and the mark."""
        wanted = self.query.stream_options and self.query.stream_options.include_usage
        return (server_sent(self.body([])) if wanted else b"") + b"data: [DONE]\n\n"


def bounded(logprob: float) -> float:
    """Clip infinite values for JSON; NaN, of broken weights, stays and is refused there."""
    return max(logprob, LOWEST)


def server_sent(body: dict) -> bytes:
    """Format an event of a stream. Raises ValueError for NaN or infinity."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n".encode()
