"""The HTTP side: /v1/completions, /v1/chat/completions, /v1/models, /health."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import PreTrainedTokenizerBase

from ...exit_rules import ExitRule
from ..engine.prompts import encode_text
from ..engine.request import Event
from ..engine.request import Request as EngineRequest
from .protocol import Asked, BadRequest, ChatRequest, Choice, CompletionRequest, parse, usage
from .worker import Busy, Engine, Ticket

# How often a request that waits for tokens looks whether its client is still there, seconds.
LOOK_S = 0.2


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: positions of prompt and answer together, answers, bytes of its body; new tokens
    where it doesn't say how many."""

    max_length: int
    max_answers: int = 128
    max_body: int = 4 << 20
    default_tokens: int = 256


@dataclass
class Service:
    """All that a request needs. `tokenizer` is the HTTP side's own: the engine's thread uses another."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    name: str
    exits: ExitRule
    limits: Limits
    api_key: str | None = None
    describe: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))


def make_app(service: Service) -> FastAPI:
    app = FastAPI(title="ee-megatron", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(BadRequest)
    async def refuse(_: Request, error: BadRequest) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(StarletteHTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        return JSONResponse(BadRequest(str(error.detail), error.status_code).body(), error.status_code)

    @app.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        body = {"status": "ok" if alive else "stopped", "model": service.name, **service.describe}
        return JSONResponse({**body, **service.engine.health()}, 200 if alive else 503)

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        check_key(service, request)
        return {"object": "list", "data": [describe_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict:
        check_key(service, request)
        check_model(service, name)
        return describe_model(service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        check_key(service, request)
        asked: CompletionRequest = parse(CompletionRequest, await read_body(service, request))
        given = asked.prompt
        prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        tokens = [encode_text(service.tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]  # type: ignore
        return await answer(service, request, asked, tokens, asked.max_tokens, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        check_key(service, request)
        asked: ChatRequest = parse(ChatRequest, await read_body(service, request))
        limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        return await answer(service, request, asked, [chat_tokens(service, asked)], limit, chat=True)

    return app


def check_key(service: Service, request: Request) -> None:
    if service.api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), service.api_key.encode()):
        raise BadRequest("the API key is missing or wrong; send 'Authorization: Bearer KEY'", 401, "invalid_api_key")


def check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise BadRequest(
            f"model {name!r} is not served here; ask for {service.name!r}", 404, "model_not_found", "model"
        )


def describe_model(service: Service) -> dict:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "ee-megatron",
        "max_model_len": service.limits.max_length,
    }


async def read_body(service: Service, request: Request) -> bytes:
    """The body, read no further than the limit."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > service.limits.max_body:
            raise BadRequest(f"the body is larger than {service.limits.max_body} bytes; shorten the prompt", 413)
    return bytes(body)


def chat_tokens(service: Service, asked: ChatRequest) -> list[int]:
    tokenizer = service.tokenizer
    if not tokenizer.chat_template:
        raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
    try:
        text = tokenizer.apply_chat_template(
            [message.plain() for message in asked.messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # Templates refuse roles and orders of messages in exceptions of their own.
        raise BadRequest(f"messages: the chat template refuses them: {error}", param="messages") from None
    # The template writes the beginning of the sequence itself.
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def check_lengths(service: Service, prompts: list[list[int]], limit: int | None, n: int) -> list[int]:
    """New tokens that each prompt's answers may have. Raises BadRequest for what is too long or too much."""
    limits, allowed = service.limits, []
    vocab = service.engine.vocab
    if len(prompts) * n > limits.max_answers:
        raise BadRequest(f"{len(prompts)} prompts x n={n}: at most {limits.max_answers} answers a request", param="n")
    if not prompts:
        raise BadRequest("prompt is empty; give at least one", param="prompt")
    for prompt in prompts:
        if not prompt:
            raise BadRequest("a prompt has no tokens; give it a text", param="prompt")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise BadRequest(f"prompt token ids must lie in 0..{vocab - 1}", param="prompt")
        room = limits.max_length - len(prompt)
        if room < 1 or (limit or 1) > room:
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens and max_tokens is {limit or 'not given'}; this server takes "
                f"{limits.max_length} in all; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
            )
        allowed.append(min(limits.default_tokens, room) if limit is None else limit)
    return allowed


async def answer(
    service: Service, request: Request, asked: Asked, prompts: list[list[int]], limit: int | None, chat: bool
) -> Response:
    """Check, queue, and either stream or collect."""
    check_model(service, asked.model)
    allowed = check_lengths(service, prompts, limit, asked.n)
    try:
        requests = asked.requests(prompts, allowed, service.exits)
        service.engine.check(requests[0])
    except ValueError as error:
        raise BadRequest(str(error)) from None
    wants = asked.wants_logprobs  # type: ignore[attr-defined]
    choices = [
        Choice(i, len(item.prompt), chat, wants, lambda token: service.tokenizer.decode([token]))
        for i, item in enumerate(requests)
    ]
    under_way = Answers(service.engine, requests)
    kind = ("chat.completion.chunk" if asked.stream else "chat.completion") if chat else "text_completion"
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }
    if asked.stream:
        events = stream(service, asked, head, choices, under_way, request)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    try:
        async for index, event in under_way.events(request):
            choices[index].events.append(event)
    finally:
        under_way.cancel()
    if any(choice.finished is None for choice in choices):
        # The client has left; nobody reads this.
        return Response(status_code=499)
    counts = usage(choices, asked.n, service.engine.num_layers)
    return JSONResponse({**head, "choices": [choice.whole() for choice in choices], "usage": counts})


async def stream(
    service: Service, asked: Asked, head: dict, choices: list[Choice], under_way: Answers, request: Request
) -> AsyncIterator[bytes]:
    """Server-sent events: a chunk per token, the usage if asked for, [DONE]; an error ends them."""
    try:
        async for index, event in under_way.events(request):
            yield sse({**head, "choices": [choices[index].piece(event)]})
        if asked.stream_options and asked.stream_options.include_usage:
            yield sse({**head, "choices": [], "usage": usage(choices, asked.n, service.engine.num_layers)})
        yield b"data: [DONE]\n\n"
    except BadRequest as error:
        yield sse(error.body())
    finally:
        under_way.cancel()


def sse(body: dict) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


class Answers:
    """Requests of one client in the engine, and their events as they come. Raises BadRequest if the queue is full."""

    def __init__(self, engine: Engine, requests: list[EngineRequest]):
        self._engine, self._left = engine, len(requests)
        self._events: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def sink(index: int):
            # From the engine's thread; the loop may be gone when the server is stopped in the middle.
            def tell(event: Event | Exception) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return tell

        try:
            self._tickets: list[Ticket] = engine.submit([(item, sink(i)) for i, item in enumerate(requests)])
        except Busy as error:
            raise BadRequest(str(error), 429, "queue_full") from None
        except RuntimeError as error:
            raise BadRequest(str(error), 503) from None

    async def events(self, request: Request) -> AsyncIterator[tuple[int, Event]]:
        """(index of the answer, event) until all have finished or the client is gone."""
        loop = asyncio.get_running_loop()
        look = loop.time() + LOOK_S
        while self._left:
            if loop.time() >= look:
                if await request.is_disconnected():
                    return
                look = loop.time() + LOOK_S
            try:
                index, event = await asyncio.wait_for(self._events.get(), LOOK_S)
            except TimeoutError:
                continue
            if isinstance(event, Exception):
                status = 400 if isinstance(event, ValueError) else 500
                raise BadRequest(" ".join(str(event).split()), status)
            self._left -= event.finished is not None
            yield index, event

    def cancel(self) -> None:
        """What has not finished is given up; safe to call always."""
        self._engine.cancel(self._tickets)
