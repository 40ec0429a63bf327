"""What is asked over HTTP: OpenAI's fields, and ours for early exits. What can't be done is refused by name."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from ...exit_rules import OFFERED, ExitRule, make_rule
from ..engine.request import Request
from ..engine.sampling import SamplingParams

STOPS, STOP_CHARACTERS, TOP_LOGPROBS = 16, 256, 20
# Below it the most probable token has all the weight that float32 can tell: it is taken as 0.
COLDEST = 1e-5
Text = Annotated[str, StringConstraints(min_length=1, max_length=STOP_CHARACTERS)]

_CALLS = "this server makes text and never calls functions; describe them in the prompt"
_UNWEIGHTED = "log-probabilities and exits are those of the model itself, so tokens can't be weighted; leave it out"
_TEXT_ONLY = "this server takes and makes text only; leave it out"
REFUSED = {
    "tools": _CALLS,
    "tool_choice": _CALLS,
    "parallel_tool_calls": _CALLS,
    "functions": _CALLS,
    "function_call": _CALLS,
    "tool_calls": _CALLS,
    "logit_bias": _UNWEIGHTED,
    "frequency_penalty": _UNWEIGHTED,
    "presence_penalty": _UNWEIGHTED,
    "best_of": "answers are not ranked here; ask for n and choose",
    "suffix": "text is written from left to right only; leave it out",
    "response_format": "the output's form can't be forced; ask for it in the prompt",
    "reasoning_effort": "how deep the model goes is set by exit_policy",
    "audio": _TEXT_ONLY,
    "modalities": _TEXT_ONLY,
    "prediction": "nothing is predicted from a given output; leave it out",
    "web_search_options": "this server reads nothing from a network; leave it out",
}
"""Fields of OpenAI's that are known and can't be followed, and why."""
NEUTRAL: dict[str, tuple] = {
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
}
"""Values of these that ask for nothing, beside null, [] and {}."""


class BadRequest(Exception):
    """What the client did wrong, in one line; `status`, `code` and `param` as OpenAI's errors have them."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


BROKEN = BadRequest("the server failed to answer this; its log says why", 500)
NO_MEMORY = BadRequest("there is no memory for this request now; try again later or ask for less", 503, "no_memory")


class Given(BaseModel):
    """Fields from a client: unknown ones are refused, null is as good as none, numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def asked(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None:
                continue
            if name in REFUSED and name not in cls.model_fields:
                if value in ([], {}) or value in NEUTRAL.get(name, ()):
                    continue
                raise BadRequest(f"{name}: {REFUSED[name]}", code="unsupported_parameter", param=name)
            kept[name] = value
        return kept


class Exits(Given):
    """`exit_policy`: an exit rule that users may name, and its number; without one the rule's default."""

    kind: Literal[OFFERED]  # type: ignore[valid-type]
    value: float | None = None


class StreamOptions(Given):
    include_usage: bool = False
    include_obfuscation: bool = False


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


class Asked(Given):
    """Fields that both endpoints share.

    Beyond OpenAI's: exit_policy, top_k. `seed` makes an answer a function of the request.
    """

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    n: int = Field(1, ge=1)
    stop: Annotated[list[Text], Field(max_length=STOPS), BeforeValidator(_listed)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    exit_policy: Exits | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @property
    def top(self) -> int | None:
        """How many of the most probable tokens are named with each; None: not even the chosen one's log-probability."""
        raise NotImplementedError

    def requests(self, prompts: list[list[int]], tokens: list[int], default_exits: ExitRule) -> list[Request]:
        """`n` requests per prompt, with `tokens` new ones at most each; they share a seed and differ in `sample`."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        stop = tuple(self.stop or ())
        temperature = self.temperature if self.temperature >= COLDEST else 0.0
        sampling = [SamplingParams(temperature, limit, stop, self.top_k, self.top_p) for limit in tokens]
        exits = make_rule(self.exit_policy.kind, self.exit_policy.value) if self.exit_policy else default_exits
        return [
            Request(prompt, params, exits, seed, str(number or ""), sample=k, stream=True, top_logprobs=self.top or 0)
            for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
            for k in range(self.n)
        ]


class CompletionRequest(Asked):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: bool = False

    @model_validator(mode="after")
    def something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest(
                "max_tokens: 0 makes nothing, unless echo says that the prompt is wanted", param="max_tokens"
            )
        return self

    @property
    def top(self) -> int | None:
        return self.logprobs


class ContentPart(Given):
    type: Literal["text"]
    text: str


class Message(Given):
    """`content` may be null, which is the empty text, and parts of text, which are joined."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list | None = None

    def plain(self) -> dict[str, str]:
        given = self.content or ""
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        return {"role": self.role, "content": text}


class ChatRequest(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)

    @model_validator(mode="after")
    def together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs: needs logprobs: true", param="top_logprobs")
        return self

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(model: type[Asked], body: bytes | bytearray) -> Any:
    """Raises BadRequest with one line on the first thing wrong."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        # Where a field may have several forms, what is wrong furthest inside is what was meant.
        first = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))
        where = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] in ("missing", "json_invalid") else f" (found {str(first['input'])[:80]!r})"
        raise BadRequest(" ".join(f"{where or 'body'}: {first['msg']}{found}".split()), param=where or None) from None
