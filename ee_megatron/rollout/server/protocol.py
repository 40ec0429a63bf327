"""Request bodies: OpenAI's fields and ours for early exits, validated by pydantic."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ...config.errors import lines_of
from ...exit_rules import OFFERED, ExitRule, make_rule, read_rule
from ..engine.request import Request
from ..engine.sampling import SamplingParams

# Below it float32 gives the most probable token all the weight: greedy.
COLDEST = 1e-5
TOP_LOGPROBS = 20
NEUTRAL: dict[str, Any] = {"tool_choice": "none", "function_call": "none", "response_format": {"type": "text"}}
NEUTRAL |= {"best_of": 1, "suffix": "", "top_k": -1, "min_tokens": 0, "ignore_eos": False, "length_penalty": 1}
NEUTRAL |= {"use_beam_search": False, "skip_special_tokens": True, "spaces_between_special_tokens": True}
NEUTRAL |= {"include_stop_str_in_output": False}
"""Values of OpenAI's and vLLM's fields that ask for nothing, as do null, [] and {}: clients send them. Others are
refused."""
IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
IGNORED |= {"request_id", "priority", "cache_salt"}
"""Fields that change no answer."""


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
            if name not in IGNORED and value not in (None, [], {}) and (name not in NEUTRAL or value != NEUTRAL[name])
        }


class ExitPolicy(Fields):
    """Field `exit_policy`: an exit rule that users may choose, and its number (by default the rule's own); or, as on
    the command line, "threshold:0.7"."""

    kind: Literal[OFFERED]  # type: ignore[valid-type]
    value: float | None = None

    @model_validator(mode="before")
    @classmethod
    def read_text(cls, data: Any) -> Any:
        return read_rule(data).to_json() if isinstance(data, str) else data


class StreamOptions(Fields):
    include_usage: bool = False


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopStrings = Annotated[
    list[StopString], Field(max_length=16), BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
]


class GenerationFields(Fields):
    """Fields of both endpoints: OpenAI's, vLLM's, which mean what they mean there, and exit_policy."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    n: int = Field(1, ge=1)
    stop: StopStrings | None = None
    stop_token_ids: list[int] = Field([], max_length=128)
    prompt_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    exit_policy: ExitPolicy | None = None
    echo: bool = False

    @model_validator(mode="after")
    def has_whole_prompt(self) -> GenerationFields:
        if self.stream and self.prompt_logprobs is not None:
            raise BadRequest("prompt_logprobs: not in a stream; leave out stream", param="prompt_logprobs")
        return self

    @property
    def top(self) -> int | None:
        """How many of the most probable tokens to list at each position; None: no log-probabilities at all."""
        raise NotImplementedError

    def requests(self, prompts: list[list[int]], tokens: list[int], default_exits: ExitRule) -> list[Request]:
        """`n` requests per prompt, with at most tokens[i] new ones each; they share a seed and differ in `sample`."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        temperature = self.temperature if self.temperature >= COLDEST else 0.0
        exits = make_rule(self.exit_policy.kind, self.exit_policy.value) if self.exit_policy else default_exits
        same = {f.name: getattr(self, f.name) for f in fields(SamplingParams) if f.name in type(self).model_fields}
        same |= {"temperature": temperature, "stop": self.stop or ()}
        sampling, top = [SamplingParams(**same, max_new_tokens=limit) for limit in tokens], self.top or 0
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
    """A chat message. `content` may be null, which is the empty text, or parts of text, which are joined. Reasoning has
    two names among clients and templates."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | list[ContentPart] = ""
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        thought = self.reasoning_content if self.reasoning is None else self.reasoning
        plain = {"role": self.role, "content": text}
        return plain if thought is None else {**plain, "reasoning": thought, "reasoning_content": thought}


class ChatRequest(GenerationFields):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: Literal[False] = False
    continue_final_message: bool = False
    add_generation_prompt: bool = Field(default_factory=lambda given: not given.get("continue_final_message"))
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def role(self) -> str:
        """Whose message the answer belongs to."""
        return "assistant" if self.add_generation_prompt else self.messages[-1].role

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
        name = str(first["loc"][-1])
        known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
        # A field about exits must not be lost; others may be of programs that are not known here.
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0 if name.startswith("exit") else 0.75)
        message = f"this server has no such field; {f'did you mean {near[0]}?' if near else 'leave it out'}"
    elif first["type"] != "missing":
        message += f" (found {str(first['input'])[:80]!r})"
    # Names of fields are the client's, too.
    return BadRequest(lines_of(ValueError(f"{where[:200] or 'body'}: {message}"))[0], param=where[:200] or None)
