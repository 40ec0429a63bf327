"""Requests as clients send them: OpenAI's fields and ours for early exits, checked by pydantic."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ...exit_rules import OFFERED, ExitRule, make_rule
from ..engine.request import Request
from ..engine.sampling import SamplingParams

# Below it float32 gives the most probable token all the weight: greedy.
COLDEST = 1e-5
TOP_LOGPROBS = 20
NEUTRAL: dict[str, Any] = {"tool_choice": "none", "function_call": "none", "response_format": {"type": "text"}}
NEUTRAL |= {"frequency_penalty": 0, "presence_penalty": 0, "best_of": 1, "suffix": ""}
"""Values of OpenAI's fields that ask for nothing, as do null, [] and {}: clients send them. Others are refused."""


class BadRequest(Exception):
    """Why a request gets no answer, in one line; `status`, `code` and `param` as in OpenAI's errors."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Fields(BaseModel):
    """Unknown fields are refused, null counts as not given, numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None and value not in ([], {}) and (name not in NEUTRAL or value != NEUTRAL[name])
        }


class ExitPolicy(Fields):
    """`exit_policy`: an exit rule that users may name, and its number (by default the rule's own)."""

    kind: Literal[OFFERED]  # type: ignore[valid-type]
    value: float | None = None


class StreamOptions(Fields):
    include_usage: bool = False


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[
    list[StopString], Field(max_length=16), BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
]


class GenerationFields(Fields):
    """Fields of both endpoints; exit_policy and top_k are not OpenAI's."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    n: int = Field(1, ge=1)
    stop: StopStrings | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    exit_policy: ExitPolicy | None = None
    user: str | None = None
    echo: bool = False

    @property
    def limit(self) -> int | None:
        """New tokens of an answer; None: not given."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the most probable tokens to list at each position; None: no log-probabilities at all."""
        raise NotImplementedError

    def requests(self, prompts: list[list[int]], tokens: list[int], default_exits: ExitRule) -> list[Request]:
        """`n` requests per prompt, with at most tokens[i] new ones each; they share a seed and differ in `sample`."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        temperature = self.temperature if self.temperature >= COLDEST else 0.0
        exits = make_rule(self.exit_policy.kind, self.exit_policy.value) if self.exit_policy else default_exits
        stop, top = tuple(self.stop or ()), self.top or 0
        sampling = [SamplingParams(temperature, limit, stop, self.top_k, self.top_p) for limit in tokens]
        return [
            Request(prompt, sampling[i], exits, seed, str(i or ""), sample=k, stream=True, top_logprobs=top)
            for i, prompt in enumerate(prompts)
            for k in range(self.n)
        ]


class CompletionRequest(GenerationFields):
    """`max_tokens: 0` with `echo` scores the prompt and generates nothing."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)

    @model_validator(mode="after")
    def has_output(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("max_tokens: 0 generates nothing; set echo to score the prompt", param="max_tokens")
        return self

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One prompt, or a list of them; an empty list of any kind holds none."""
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if one else self.prompt  # type: ignore[list-item, return-value]


class ContentPart(Fields):
    type: Literal["text"]
    text: str


class Message(Fields):
    """`content` may be null, which is the empty text, or parts of text, which are joined."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[ContentPart] = ""
    name: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: Literal[False] = False

    @model_validator(mode="after")
    def has_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(model: type[GenerationFields], body: bytes | bytearray) -> Any:
    """Raises BadRequest with one line on the first thing wrong."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        where, message = first_error(error)
        raise BadRequest(message, param=where or None) from None


def first_error(error: ValidationError) -> tuple[str, str]:
    """(name of a field, one line on what is wrong with it)."""
    # Of a field that may have several forms, the innermost error is about the form that was meant.
    first = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))
    where, message = ".".join(map(str, first["loc"])), first["msg"]
    if first["type"] == "extra_forbidden":
        message = "this server has no such field; leave it out"
    elif first["type"] not in ("missing", "json_invalid"):
        message += f" (found {str(first['input'])[:80]!r})"
    return where, " ".join(f"{where or 'body'}: {message}".split())
