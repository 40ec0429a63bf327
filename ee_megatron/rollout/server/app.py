"""The HTTP side: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import PreTrainedTokenizerBase

from ...exit_rules import ExitRule
from ..engine.prompts import encode_text
from .answers import Answers, Reply
from .choices import Choice
from .guard import Access, Bodies, Guard, refusal
from .metrics import CONTENT_TYPE
from .protocol import BROKEN, NO_MEMORY, Asked, BadRequest, ChatRequest, CompletionRequest, parse
from .texts import QUICK, Texts
from .worker import Engine, Ticket


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: positions of prompt and answer together, of the prompt, answers, new tokens of all
    of them, tokens and log-probabilities of the prompts echoed in all of them (30 to 50 bytes of the reply each, 8 to
    14 MB in all; a prompt of 131,072 tokens can still be scored); new tokens where it doesn't say how many."""

    max_length: int
    max_prompt: int
    max_answers: int = 128
    max_new: int = 1 << 18
    max_echoed: int = 1 << 18
    default_tokens: int = 256


@dataclass
class Service:
    """All that a request needs. `describe` is what /health says of the server to those who have the key."""

    engine: Engine
    texts: Texts
    name: str
    exits: ExitRule
    limits: Limits
    access: Access = field(default_factory=Access)
    describe: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    bodies: Bodies = field(default_factory=Bodies)
    stopping: bool = False
    under_way: WeakSet[Answers] = field(default_factory=WeakSet)

    def end(self) -> None:
        """Tell everyone who still waits that the server stops. In the event loop's thread."""
        for answers in list(self.under_way):
            answers.end(STOPPING)


STOPPING = BadRequest("the server is stopping; ask again when it is back", 503, "stopping")


def make_app(service: Service) -> Guard:
    app = FastAPI(title="ee-megatron", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(BadRequest)
    async def refuse(_: Request, error: BadRequest) -> Response:
        return refusal(error)

    @app.exception_handler(StarletteHTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path[:100]}"
        reply = refusal(BadRequest(f"{where}: {error.detail}", error.status_code))
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(MemoryError)
    async def scarce(_: Request, error: MemoryError) -> Response:
        return refusal(NO_MEMORY)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return refusal(BROKEN)

    @app.get("/health")
    async def health(request: Request) -> Response:
        alive = service.engine.alive and not service.stopping
        body = {"status": "ok" if alive else "stopped", "model": service.name}
        if service.access.knows(request):
            body |= {**service.describe, **service.engine.health()}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.access.check_key(request)
        return Response(service.engine.metrics_text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        service.access.check_key(request)
        return {"object": "list", "data": [describe_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict:
        service.access.check_key(request)
        check_model(service, name)
        return describe_model(service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked: CompletionRequest = await read(service, request, CompletionRequest)
        return await complete(service, request, asked)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked: ChatRequest = await read(service, request, ChatRequest)
        limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        return await answer(service, request, asked, [await chat_tokens(service, asked)], limit)

    return Guard(app, service.access, service.engine.metrics)


def check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise BadRequest(
            f"model {name[:100]!r} is not served here; ask for {service.name!r}", 404, "model_not_found", "model"
        )


def describe_model(service: Service) -> dict:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "ee-megatron",
        "max_model_len": service.limits.max_length,
    }


async def read(service: Service, request: Request, kind: type[Asked]) -> Any:
    """What is asked. Raises BadRequest."""
    service.access.check_key(request)
    if service.stopping:
        raise STOPPING
    body = await service.bodies.read(request)
    asked = parse(kind, body) if len(body) <= QUICK else await service.texts.run(len(body), lambda _: parse(kind, body))
    check_model(service, asked.model)
    return asked


async def complete(service: Service, request: Request, asked: CompletionRequest) -> Response:
    given = asked.prompt
    # One prompt, or a list of them; an empty list of any kind is none.
    prompts: list = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    check_count(service, len(prompts), asked.n)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for text in texts:
        service.texts.check(text)

    def encode(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        return [encode_text(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]

    tokens = await service.texts.run(sum(map(len, texts)), encode)
    echoes: list[str] | None = None
    if asked.echo:
        check_lengths(service, tokens, asked.max_tokens, asked.n)
        check_echo(service, tokens, asked)
        echoes = [p if isinstance(p, str) else service.texts.decode(p) for p in prompts]
    return await answer(service, request, asked, tokens, asked.max_tokens, echoes)


async def chat_tokens(service: Service, asked: ChatRequest) -> list[int]:
    texts = service.texts
    if not texts.template:
        raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
    messages = [message.plain() for message in asked.messages]
    size = sum(len(message["content"]) for message in messages)

    def encode(tokenizer: PreTrainedTokenizerBase) -> list[int]:
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            # Templates refuse roles and orders of messages in exceptions of their own.
            said = " ".join(str(error).split())[:300]
            raise BadRequest(f"messages: the chat template refuses them: {said}", param="messages") from None
        texts.check(text)
        # The template writes the beginning of the sequence itself.
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return await texts.run(size, encode)


def check_count(service: Service, prompts: int, n: int) -> None:
    most = service.limits.max_answers
    if prompts * n > most:
        raise BadRequest(f"{prompts} prompts x n={n}: at most {most} answers a request", param="n")
    if not prompts:
        raise BadRequest("prompt is empty; give at least one", param="prompt")


def check_lengths(service: Service, prompts: list[list[int]], limit: int | None, n: int) -> list[int]:
    """New tokens that each prompt's answers may have. Raises BadRequest for what is too long or too much."""
    limits, allowed = service.limits, []
    vocab = service.engine.vocab
    for prompt in prompts:
        if not prompt:
            raise BadRequest("a prompt has no tokens; give it a text", param="prompt")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise BadRequest(f"prompt token ids must lie in 0..{vocab - 1}", param="prompt")
        room = limits.max_length - len(prompt)
        if room < (limit if limit is not None else 1):
            asked = "not given" if limit is None else limit
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and max_tokens is {asked}; this server takes {limits.max_length} "
                "in all; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
            )
        if len(prompt) > limits.max_prompt:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens; there is memory to read {limits.max_prompt}; shorten it",
                code="context_length_exceeded",
            )
        allowed.append(min(limits.default_tokens, room) if limit is None else limit)
    if n * sum(allowed) > limits.max_new:
        raise BadRequest(
            f"{len(prompts)} prompts x n={n} ask for {n * sum(allowed)} new tokens; at most {limits.max_new} a request",
            param="max_tokens",
        )
    return allowed


def check_echo(service: Service, prompts: list[list[int]], asked: CompletionRequest) -> None:
    """Raises BadRequest where prompts, repeated with each of their answers, would make more of a reply than is due."""
    positions, top, most = sum(map(len, prompts)), asked.logprobs or 0, service.limits.max_echoed
    if (echoed := positions * asked.n * (1 + top)) > most:
        raise BadRequest(
            f"echo: {positions} prompt tokens x n={asked.n} x (1 + logprobs={top}) are {echoed} entries; "
            f"at most {most} a request; lower n or logprobs, or send fewer prompts at a time",
            param="echo",
        )


async def answer(
    service: Service,
    request: Request,
    asked: Asked,
    prompts: list[list[int]],
    limit: int | None,
    echoes: list[str] | None = None,
) -> Response:
    """Check, queue, and either stream or collect."""
    chat, generate = isinstance(asked, ChatRequest), limit != 0
    check_count(service, len(prompts), asked.n)
    allowed = check_lengths(service, prompts, limit, asked.n)
    try:
        # Without a new token the prompt is only scored; what the engine would be asked is checked all the same.
        requests = asked.requests(prompts, [max(1, tokens) for tokens in allowed], service.exits)
        service.engine.check(requests[0])
    except ValueError as error:
        raise BadRequest(str(error)) from None
    said = [None] * len(requests) if echoes is None else [echo for echo in echoes for _ in range(asked.n)]
    choices = [
        Choice(i, item.prompt, chat, asked.top, service.texts.decode, echo)  # type: ignore[arg-type]
        for i, (item, echo) in enumerate(zip(requests, said, strict=True))
    ]
    reply = Reply(asked, choices, chat, service.engine.num_layers, service.name)
    score = asked.top if echoes is not None else None
    if not generate and score is None:
        # The prompt's text alone: nothing to compute.
        for choice in choices:
            choice.scored(None, last=True)
    if service.stopping:
        raise STOPPING
    count = 0 if not generate and score is None else len(requests)
    under_way = Answers(service.engine, count, lambda i, sink: Ticket(requests[i], sink, score, generate))
    service.under_way.add(under_way)
    if asked.stream:
        return reply.stream(request, under_way, generate, echo=echoes is not None and score is None)
    return await reply.collect(request, under_way, generate)
