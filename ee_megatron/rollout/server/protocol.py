"""Request bodies: OpenAI's fields and ours for early exits, validated by pydantic."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ...exit_rules import OFFERED, ExitRule, make_rule
from ..engine.request import Request
from ..engine.sampling import SamplingParams

# Below it float32 gives the most probable token all the weight: greedy.
COLDEST = 1e-5
TOP_LOGPROBS = 20
NEUTRAL: dict[str, Any] = {"tool_choice": "none", "function_call": "none", "response_format": {"type": "text"}}
NEUTRAL |= {"frequency_penalty": 0, "presence_penalty": 0, "best_of": 1, "suffix": ""}
"""Values of OpenAI's fields that ask for nothing, as do null, [] and {}: clients send them. Others are refused."""


class BadRequest(HTTPException):
    """Raised for a request that is refused: the reason in one line; `code` and `param` as in OpenAI's errors."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(status, message)
        self.code, self.param = code, param

    def __str__(self) -> str:
        return str(self.detail)


def error_body(error: HTTPException) -> dict:
    """Body of an error in OpenAI's format."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error"
    )
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


class Fields(BaseModel):
    """Base class of request bodies: unknown fields are refused, null counts as not given, numbers are finite."""

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
    """Field `exit_policy`: an exit rule that users may choose, and its number (by default the rule's own)."""

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
    """Body of /v1/completions. `max_tokens: 0` with `echo` scores the prompt and generates nothing."""

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
    """A chat message. `content` may be null, which is the empty text, or parts of text, which are joined."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[ContentPart] = ""
    name: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: Literal[False] = False

    @model_validator(mode="after")
    def has_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
        return self

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def first_error(errors: Sequence[Any]) -> BadRequest:
    """Format the first of pydantic's errors in one line that names the field."""
    # Of a field that may have several forms, the innermost error is about the form that was meant.
    first = max(errors, key=lambda error: len(error["loc"]))
    where, message = ".".join(str(part) for part in first["loc"] if part != "body"), first["msg"]
    if first["type"] == "json_invalid":
        where, message = "", f"{message} at character {where}: {first['ctx']['error']}"
    elif first["type"] == "extra_forbidden":
        message = "this server has no such field; leave it out"
    elif first["type"] != "missing":
        message += f" (found {str(first['input'])[:80]!r})"
    return BadRequest(" ".join(f"{where or 'body'}: {message}".split()), param=where or None)
