"""Routes of the HTTP server: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from ...exit_rules import ExitRule
from ..engine.prompts import encode_chat, encode_text, piece
from ..engine.request import Event
from ..engine.scoring import PromptScore, score_prompts
from .protocol import BadRequest, ChatRequest, CompletionRequest, GenerationFields, error_body, first_error
from .response_format import Choice, Reply, server_sent
from .worker import ServingEngine, Ticket

log = logging.getLogger(__name__)
T = TypeVar("T")
# Bytes of a body; characters that are tokenised in the event loop.
MAX_BODY, QUICK_CHARACTERS = 4 << 20, 1 << 12
# Prompt positions, padding included, that are scored at once.
SCORE_POSITIONS = 2048
BROKEN = BadRequest("the server failed to answer this; its log says why", 500)
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    - max_length, max_prompt: positions of prompt and answer together, of the prompt alone
    - max_answers: prompts x n
    - max_entries: tokens of all answers and echoed prompts x (1 + logprobs); each takes 30 to 50 bytes of the reply
    - default_tokens: new tokens of a request that doesn't say
    """

    max_length: int
    max_prompt: int
    max_answers: int = 128
    max_entries: int = 1 << 18
    default_tokens: int = 256


@dataclass
class Service:
    """State of the server that the routes use.

    - exits: of requests that don't say
    - host: where the server listens if that is the loopback interface, so that any other name is DNS rebinding
    - origins: web pages that may ask ("*": any); their hosts may be named too
    - key: the API key that clients send; None: no key needed
    - template_variables: of the chat template, where a request's chat_template_kwargs don't have them
    """

    engine: ServingEngine
    tokenizer: PreTrainedTokenizerBase
    name: str
    exits: ExitRule
    limits: Limits
    host: str | None = "127.0.0.1"
    origins: frozenset[str] = frozenset()
    key: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    piece: Callable[[int], str] = field(init=False)

    def __post_init__(self) -> None:
        self.piece = lru_cache(1 << 17)(partial(piece, self.tokenizer))

    async def encode(self, query: ChatRequest | CompletionRequest) -> list[list[int]]:
        """Tokenise the prompts. Raises BadRequest for messages that the chat template refuses."""
        if isinstance(query, ChatRequest):
            messages = [message.plain() for message in query.messages]
            size = sum(len(text) for message in messages for text in message.values())
            variables = {**self.template_variables, **query.chat_template_kwargs}
            ending = query.add_generation_prompt, query.continue_final_message
            try:
                return [await aside(size, lambda: encode_chat(self.tokenizer, messages, variables, *ending))]
            except ValueError as error:
                raise BadRequest(f"messages: {' '.join(str(error).split())[:300]}", param="messages") from None
        size = sum(len(prompt) for prompt in query.prompts if isinstance(prompt, str))
        try:
            return await aside(
                size, lambda: [encode_text(self.tokenizer, p) if isinstance(p, str) else p for p in query.prompts]
            )
        except ValueError as error:
            raise BadRequest(f"prompt: {error}", param="prompt") from None

    def check_size(self, prompts: list[list[int]], query: GenerationFields) -> list[int]:
        """Most new tokens of answers to each prompt. Raises BadRequest for what is too long or too much."""
        limits, vocab, allowed = self.limits, self.engine.decoder.dims.vocab, list[int]()
        if not prompts or len(prompts) * query.n > limits.max_answers:
            raise BadRequest(
                f"{len(prompts)} prompts x n={query.n}: expected 1 to {limits.max_answers} answers", param="n"
            )
        if any(not 0 <= token < vocab for token in query.stop_token_ids):
            raise BadRequest(f"stop_token_ids must lie in 0..{vocab - 1}", param="stop_token_ids")
        for prompt in prompts:
            if not prompt or min(prompt) < 0 or max(prompt) >= vocab:
                raise BadRequest(f"a prompt needs tokens, and their ids must lie in 0..{vocab - 1}", param="prompt")
            room = limits.max_length - len(prompt)
            wanted = min(limits.default_tokens, max(1, room)) if query.max_tokens is None else query.max_tokens
            if wanted > room or len(prompt) > limits.max_prompt:
                raise BadRequest(
                    f"the prompt has {len(prompt)} tokens and max_tokens is {wanted}; this server takes "
                    f"{limits.max_length} together, {limits.max_prompt} in a prompt; shorten it or lower max_tokens",
                    code="context_length_exceeded",
                )
            allowed.append(wanted)
        read, top, scored = sum(map(len, prompts)), query.top or 0, query.prompt_logprobs
        tokens = sum(allowed) + query.echo * read
        entries = query.n * (tokens * (1 + top) + (0 if scored is None else read * (1 + scored)))
        if entries > limits.max_entries:
            raise BadRequest(
                f"{tokens} tokens (max_tokens, and prompts by echo) x n={query.n} x (1 + logprobs={top}), and "
                f"prompt_logprobs, are {entries} entries; at most {limits.max_entries} a request; lower one of these, "
                "or send fewer prompts",
                param="max_tokens",
            )
        return allowed

    async def score(self, request: Request, prompts: list[list[int]], top: int) -> list[PromptScore]:
        """Score the prompts' own tokens, as many at a time as are prefilled together; other requests run in between."""
        scores: list[PromptScore] = []
        while len(scores) < len(prompts):
            some, longest = list[list[int]](), 0
            for prompt in prompts[len(scores) :]:
                longest = max(longest, len(prompt))
                if some and longest * (len(some) + 1) > SCORE_POSITIONS:
                    break
                some.append(prompt)
            if await request.is_disconnected():
                raise as_refusal(ClientDisconnect())
            work = partial(score_prompts, self.engine.decoder, some, [top] * len(some))
            try:
                scores += await asyncio.wrap_future(self.engine.call(work))
            except Exception as error:
                raise as_refusal(error) from error
        return scores

    def submit(self, request: Request, requests: list) -> AsyncIterator[tuple[int, Event]]:
        """Queue requests in the engine and yield (index of the answer, its next token), until the client disconnects.
        Raises BadRequest if the queue is full, and for the engine's errors."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event | Exception]]()

        def tell(index: int, event: Event | Exception) -> None:
            # The loop may be gone when the server is stopped in the middle.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        async def watch() -> None:
            try:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
            finally:
                self.engine.cancel(tickets)
                events.put_nowait((0, ClientDisconnect()))

        async def follow() -> AsyncIterator[tuple[int, Event]]:
            left = len(tickets)
            try:
                while left:
                    index, event = await events.get()
                    if isinstance(event, Exception):
                        raise as_refusal(event)
                    left -= event.finished is not None
                    yield index, event
            finally:
                watching.cancel()

        tickets = [Ticket(item, partial(tell, i)) for i, item in enumerate(requests)]
        self.engine.submit(tickets)
        watching = asyncio.create_task(watch())
        return follow()

    async def answer(self, request: Request, query: ChatRequest | CompletionRequest) -> Response:
        """Answer a request: check, queue, and either stream or collect."""
        if query.model != self.name:
            message = f"model {query.model[:100]!r} is not served here; ask for {self.name!r}"
            raise BadRequest(message, 404, "model_not_found", "model")
        engine, prompts = self.engine, await self.encode(query)
        allowed = self.check_size(prompts, query)
        try:
            requests = query.requests(prompts, [max(1, tokens) for tokens in allowed], self.exits)
            requests[0].exits.check(engine.decoder.layout, engine.decoder.gates is not None)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        echoes, scores = [""] * len(prompts), list[PromptScore | None]([None] * len(prompts))
        if isinstance(query, CompletionRequest) and query.echo:
            echoes = [p if isinstance(p, str) else str(self.tokenizer.decode(p)) for p in query.prompts]
        wanted = [count for count in (query.top if query.echo else None, query.prompt_logprobs) if count is not None]
        if wanted:
            scores = [*await self.score(request, prompts, max(wanted))]
        choices = [
            Choice(i, prompts[i // query.n], query, self.piece, echoes[i // query.n], scores[i // query.n])
            for i in range(len(requests))
        ]
        reply = Reply(query, choices, engine.decoder.dims.num_layers, self.name)
        events = self.submit(request, requests if query.max_tokens != 0 else [])
        if query.stream:
            return StreamingResponse(stream(reply, events), 200, {"Cache-Control": "no-cache"}, "text/event-stream")
        events_of = [list[Event]() for _ in choices]
        async for index, event in events:
            events_of[index].append(event)

        def response() -> Response:
            parts = [choice.add(tokens, echo=True) for choice, tokens in zip(choices, events_of, strict=True)]
            return JSONResponse(reply.body(parts))

        # Long answers make long bodies, with a text for every token.
        return await asyncio.to_thread(response)


async def aside(size: int, work: Callable[[], T]) -> T:
    """Call `work` on so many characters, in a thread unless they are few."""
    return work() if size <= QUICK_CHARACTERS else await asyncio.to_thread(work)


async def stream(reply: Reply, events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[bytes]:
    """Stream server-sent events: a chunk per token, the usage if requested, [DONE]; an error ends them."""
    try:
        for choice in reply.choices if reply.query.echo else ():
            # A prompt may have as much to say as a whole answer: not in the event loop.
            yield server_sent(reply.body([await asyncio.to_thread(choice.add, [], echo=True)], usage=False))
        async for index, event in events:
            yield server_sent(reply.body([reply.choices[index].add([event])], usage=False))
        yield reply.end()
    except Exception as error:
        if not isinstance(error, BadRequest):
            log.exception("a stream failed")
            error = BROKEN
        yield server_sent(error_body(error))


def as_refusal(error: Exception) -> BadRequest:
    """An engine error as the client receives it."""
    if isinstance(error, BadRequest):
        return error
    if isinstance(error, ClientDisconnect):
        return BadRequest("the client has left", 499)
    text = " ".join(str(error).split())
    # torch raises RuntimeErrors when memory runs out.
    if isinstance(error, MemoryError | OSError) or "alloc" in text or "out of memory" in text:
        return BadRequest("not enough memory for this request now; try again later or request less", 503, "no_memory")
    return BadRequest(text) if isinstance(error, ValueError) else BadRequest(f"the engine failed: {text}", 500)


def make_app(service: Service) -> FastAPI:
    engine, created, key = service.engine, int(time.time()), service.key
    app = FastAPI(title="ee-megatron", docs_url=None, redoc_url=None, openapi_url=None, max_body_size=MAX_BODY)
    if service.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=sorted(service.origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization"],
        )  # fmt: skip
    if service.host is not None:
        named = {service.host, *(urlsplit(origin).hostname or "*" for origin in service.origins)}
        app.add_middleware(
            TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", *named], www_redirect=False
        )

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404 and not isinstance(error, BadRequest):
            path = request.url.path[:100]
            error = BadRequest(f"{path!r} is not served here; ask /v1/chat/completions or /v1/completions", 404)
        headers = {"Retry-After": "1"} if error.status_code in (429, 503) else {}
        return JSONResponse(error_body(error), error.status_code, {**headers, **(error.headers or {})})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await refuse(request, first_error(error.errors()))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        reply = await refuse(request, as_refusal(error) if isinstance(error, MemoryError) else BROKEN)
        # The server closes the connection after an exception; a client that isn't told sends its next request into it.
        reply.headers["Connection"] = "close"
        return reply

    def has_key(given: Bearer) -> bool:
        return key is None or (given is not None and hmac.compare_digest(given.credentials.encode(), key.encode()))

    def check_key(sent: bool = Depends(has_key)) -> None:
        if not sent:
            message = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
            raise BadRequest(message, 401, "invalid_api_key")

    guarded = [Depends(check_key)]

    @app.get("/health")
    async def health(sent: bool = Depends(has_key)) -> Response:
        body = {"status": "ok" if engine.alive else "stopped", "model": service.name}
        return JSONResponse(body | engine.health() if sent else body, 200 if engine.alive else 503)

    @app.get("/metrics", dependencies=guarded)
    async def prometheus() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict:
        about = {"object": "model", "created": created, "owned_by": "ee-megatron"}
        return {"object": "list", "data": [{"id": service.name, **about, "max_model_len": service.limits.max_length}]}

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(query: CompletionRequest, request: Request) -> Response:
        return await service.answer(request, query)

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(query: ChatRequest, request: Request) -> Response:
        return await service.answer(request, query)

    return app
