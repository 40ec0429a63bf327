"""What is asked over HTTP and how it is answered: OpenAI's fields, and ours for early exits."""

from __future__ import annotations

import secrets
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ...exit_rules import OFFERED, ExitRule, make_rule
from ..engine.request import Event, Request
from ..engine.sampling import SamplingParams

Text = Annotated[str, StringConstraints(min_length=1)]


class BadRequest(Exception):
    """What the client did wrong, in one line; `status`, `code` and `param` as OpenAI's errors have them."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Exits(BaseModel):
    """`exit_policy`: an exit rule that users may name, and its number; without one the rule's default."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal[OFFERED]  # type: ignore[valid-type]
    value: float | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class Asked(BaseModel):
    """Fields that both endpoints share. Unknown ones are refused; some of OpenAI's are allowed at their defaults only.

    Beyond OpenAI's: exit_policy, top_k. `seed` makes an answer a function of the request.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1)
    stop: Text | list[Text] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    exit_policy: Exits | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    frequency_penalty: Literal[0, None] = 0
    presence_penalty: Literal[0, None] = 0
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    def requests(self, prompts: list[list[int]], tokens: list[int], default_exits: ExitRule) -> list[Request]:
        """`n` requests per prompt, with `tokens` new ones at most each; they share a seed and differ in `sample`."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = [SamplingParams(self.temperature, limit, stop, self.top_k, self.top_p) for limit in tokens]
        exits = make_rule(self.exit_policy.kind, self.exit_policy.value) if self.exit_policy else default_exits
        return [
            Request(prompt, params, exits, seed, str(number or ""), sample=k, stream=True)
            for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
            for k in range(self.n)
        ]


class CompletionRequest(Asked):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=1)
    echo: Literal[False, None] = False
    best_of: Literal[1, None] = None
    suffix: Literal["", None] = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class ContentPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    content: str | list[ContentPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class TextFormat(BaseModel):
    type: Literal["text"]


class ChatRequest(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Literal[0, None] = None
    response_format: TextFormat | None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


def parse(model: type[Asked], body: bytes) -> Any:
    """Raises BadRequest with one line on the first thing wrong."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] in ("missing", "json_invalid") else f" (found {str(first['input'])[:80]!r})"
        raise BadRequest(f"{where or 'body'}: {first['msg']}{found}", param=where or None) from None


class Choice:
    """One answer as it grows: events in, fields of a response out."""

    def __init__(self, index: int, prompt_tokens: int, chat: bool, logprobs: bool, piece: Any):
        self.index, self.prompt_tokens, self.chat, self.logprobs = index, prompt_tokens, chat, logprobs
        self._piece = piece
        self.events: list[Event] = []

    @property
    def finished(self) -> str | None:
        return self.events[-1].finished if self.events else None

    def whole(self) -> dict:
        """The choice of a response that isn't streamed."""
        text = "".join(event.text for event in self.events)
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return self._fields(content, self.events, 0)

    def piece(self, event: Event) -> dict:
        """The choice of a streamed chunk that reports one token."""
        self.events.append(event)
        if not self.chat:
            content: dict[str, Any] = {"text": event.text}
        else:
            role = {"role": "assistant"} if len(self.events) == 1 else {}
            content = {"delta": {**role, "content": event.text}}
        return self._fields(content, [event], sum(len(e.text) for e in self.events[:-1]) if self.logprobs else 0)

    def _fields(self, content: dict, events: list[Event], offset: int) -> dict:
        return {
            "index": self.index,
            **content,
            "finish_reason": self.finished,
            "logprobs": self._logprobs(events, offset) if self.logprobs else None,
            "early_exit": {
                "token_ids": [event.token for event in events],
                "depths": [event.depth for event in events],
                "logprobs": [event.logprob for event in events],
                "exit_logprobs": [event.exit_logprob for event in events],
            },
        }

    def _logprobs(self, events: list[Event], offset: int) -> dict:
        pieces = [self._piece(event.token) for event in events]
        if self.chat:
            return {
                "content": [
                    {"token": p, "logprob": e.full_logprob, "bytes": list(p.encode()), "top_logprobs": []}
                    for p, e in zip(pieces, events, strict=True)
                ]
            }
        offsets = list(accumulate((len(event.text) for event in events[:-1]), initial=offset))
        logprobs = [event.full_logprob for event in events]
        return {"tokens": pieces, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


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
